"""The ONNX graphs of an artifact, written node by node: the decoder, and for vision models its two companions.

One graph serves prefill, chunked prefill, single steps and left-padded batches: the past has a dynamic length, which
may be zero, or is in a static cache. Names of inputs and outputs are those of onnxruntime-genai. Nothing is traced,
so no source path and no library version enters the file, and the weights are references into the data file planned by
`layout`: the bytes depend on configuration, structure and options only.

    B batch, T new tokens, D model, V vocab, R image patches
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..errors import HavocError
from ..model.tensors import EMBEDDING, VISION_PROJECTION
from .layout import Layout, StoredWeight, plan_layout
from .runtime import decoder
from .runtime.dialects import DIALECTS
from .runtime.options import DEFAULT_OPTIONS, GraphOptions
from .tape import CONTRIB, GraphTape

if TYPE_CHECKING:
    from collections.abc import Collection

    from ..model.config import HavocConfig, VisionConfig
    from ..model.structure import BlockFormat, Structure
    from .decoder import DecoderGraph


def build_graphs(
    config: HavocConfig,
    structure: Structure,
    options: GraphOptions = DEFAULT_OPTIONS,
    *,
    layout: Layout | None = None,
    replaceable: Collection[str] = (),
) -> dict[str, ir.Model]:
    """Build every graph of an artifact by file name: the decoder, and for vision configurations its two companions.

    Logits of the last position are fp32 [B, 1, V], those of all positions fp32 [B, T, V]. `replaceable` names the
    decoder's initializers that are inputs too: a caller may hand over others, and without that the stored ones count.
    """
    layout = layout or plan_layout(config, structure)
    graphs = {decoder.DECODER: build_graph(config, structure, options, layout=layout, replaceable=replaceable)}
    if config.vision is not None:
        graphs[decoder.EMBEDDING] = build_embedding_graph(config, structure, layout=layout)
        graphs[decoder.VISION] = build_vision_graph(config, structure, layout=layout)
    for model in graphs.values():
        model.ir_version = options.ir_version
        model.graph.opset_imports[""] = options.opset
    return graphs


def build_graph(
    config: HavocConfig,
    structure: Structure,
    options: GraphOptions = DEFAULT_OPTIONS,
    *,
    layout: Layout | None = None,
    replaceable: Collection[str] = (),
) -> ir.Model:
    """Build the decoder: ids (embeddings in vision configurations), mask, positions, past to logits, present.

    Heads that the dialect's attention cannot take are a `HavocError`.
    """
    dialect = DIALECTS[options.dialect]
    dialect.require_heads(config.attention.head_dim)
    graph = GraphTape(structure, layout or plan_layout(config, structure), replaceable=replaceable)
    if config.vision is None:
        x_BTD = _embed(graph, config, graph.input("input_ids", ir.DataType.INT64, ["batch", "sequence"]))
    else:
        x_BTD = graph.input("inputs_embeds", graph.activation, ["batch", "sequence", config.d_model])
    module, _, name = dialect.decoders[options.cache].partition(":")
    decoder_class: type[DecoderGraph] = getattr(import_module(module, __package__), name)
    return decoder_class(config, graph, options).build(x_BTD)


def build_embedding_graph(config: HavocConfig, structure: Structure, *, layout: Layout | None = None) -> ir.Model:
    """Build ids [B, T] and image features [R, D] to embeddings [B, T, D]; the first R image tokens take them."""
    vision = _vision(config)
    graph = GraphTape(structure, layout or plan_layout(config, structure))
    ids_BT = graph.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    features_RD = graph.input("image_features", graph.activation, ["num_patches", config.d_model])
    x_BTD = _embed(graph, config, ids_BT)
    is_image = graph.op("is_image", "Equal", [ids_BT, graph.constant("image_token", vision.image_token_id)])
    where_2R = graph.op("image_positions", "NonZero", [is_image])
    where_X2 = graph.op("image_positions_by_row", "Transpose", [where_2R], perm=[1, 0])
    num_patches = graph.op("num_patches", "Shape", [features_RD], start=0, end=1)
    where_R2 = graph.op("filled_positions", "Slice", [where_X2, graph.constant("first", [0]), num_patches])
    embeds_BTD = graph.op("inputs_embeds", "ScatterND", [x_BTD, where_R2, features_RD], output="inputs_embeds")
    return graph.finish("embedding", [graph.typed(embeds_BTD, graph.activation, ["batch", "sequence", config.d_model])])


def build_vision_graph(config: HavocConfig, structure: Structure, *, layout: Layout | None = None) -> ir.Model:
    """Build patches [R, patch_size**2 * channels] to image features [R, D]: one linear projection."""
    vision = _vision(config)
    graph = GraphTape(structure, layout or plan_layout(config, structure))
    patches = graph.input("patches", graph.activation, ["num_patches", vision.patch_dim])
    features = graph.linear("projection", patches, VISION_PROJECTION, output="image_features")
    return graph.finish("vision", [graph.typed(features, graph.activation, ["num_patches", config.d_model])])


def _vision(config: HavocConfig) -> VisionConfig:
    if config.vision is None:
        raise HavocError("this configuration has no vision part")
    return config.vision


def serialize(model: ir.Model) -> bytes:
    """The protobuf bytes of a graph; weights stay references into the data file."""
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _embed(graph: GraphTape, config: HavocConfig, ids_BT: ir.Value) -> ir.Value:
    """Rows of the embedding table [B, T, D]; a quantized table is read from the bytes the head multiplies by."""
    weight = graph.layout[EMBEDDING]
    if weight.blocks is None:
        rows = graph.op("embed_tokens", "Gather", [graph.part(EMBEDDING), ids_BT])
        if graph.part(EMBEDDING).dtype == graph.activation:
            return rows
        return graph.op("embed_tokens/cast", "Cast", [rows], to=int(graph.activation))
    padded_len = weight.initializers[1].shape[1] * weight.blocks.block_size
    padded = _block_rows(graph, weight, weight.blocks, ids_BT, padded_len)
    if padded_len == config.d_model:
        return padded
    start, end, axis = (
        graph.constant(name, [value]) for name, value in (("zero", 0), ("d_model", config.d_model), ("last_axis", 2))
    )
    return graph.op("embed_tokens", "Slice", [padded, start, end, axis])


def _block_rows(
    graph: GraphTape, weight: StoredWeight, blocks: BlockFormat, ids_BT: ir.Value, padded_len: int
) -> ir.Value:
    """Rows of a quantized table with their padding, from the very initializer that the head multiplies by.

    A second view of the same bytes would be dropped from a CPU's memory once packed, but on a GPU it is a second copy.
    Zero points are packed by row, so a table with them cannot be shared: it is read as rows.
    """
    (num_rows, num_blocks), num_bytes = weight.initializers[1].shape, weight.initializers[0].num_bytes
    if blocks.zeros == "points":
        packed = graph.reshaped(EMBEDDING, 0, f"{EMBEDDING}_rows", (num_rows, num_bytes // num_rows))
        scales = graph.as_activation(graph.part(EMBEDDING, 1))
        inputs, axis = [packed, ids_BT, scales, graph.part(EMBEDDING, 2)], 1
        name = "embed_tokens/rows"
    else:
        scales = graph.reshaped(EMBEDDING, 1, f"{EMBEDDING}_row_scales", (num_rows, num_blocks, 1))
        inputs, axis, name = [graph.part(EMBEDDING), ids_BT, graph.as_activation(scales)], 2, "embed_tokens/blocks"
    rows = graph.op(
        name,
        "GatherBlockQuantized",
        inputs,
        domain=CONTRIB,
        gather_axis=0,
        quantize_axis=axis,
        block_size=blocks.block_size,
        bits=blocks.num_bits,
    )
    if axis == 1:
        return rows
    if blocks.zeros == "minimums":
        centres = graph.op("embed_tokens/centres", "Gather", [graph.centres(weight), ids_BT])
        centres = graph.op("embed_tokens/each_centre", "Unsqueeze", [centres, graph.constant("block_axis", [3])])
        rows = graph.op("embed_tokens/moved", "Add", [rows, centres])
    return graph.op("embed_tokens/rows", "Reshape", [rows, graph.constant("rows", [0, 0, padded_len])])
