"""The ONNX graph of a HAVOC decoder, written node by node in the `standard` dialect (opset 23, IR 11).

One graph serves prefill, chunked prefill, single steps and left-padded batches: the past has a dynamic length, zero
included. Names of inputs and outputs are those of onnxruntime-genai. Nothing is traced, so no source path and no
library version enters the file, and the weights are references into the data file planned by `layout`: the bytes
depend on configuration and structure only.

    B batch, T new tokens, P past tokens, S = P + T, D model, H head dim, V vocab, R image patches

`LessOrEqual(key, query) and (real or key == query)`: a padding query sees itself, so that no row of scores is empty
and no NaN enters the cache; real queries never see padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ..errors import HavocError
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD, VISION_PROJECTION
from . import session
from .layout import NUM_BITS, ROPE_COS, ROPE_SIN, Layout, StoredWeight, plan_layout
from .options import DEFAULT_OPTIONS, GraphOptions
from .tape import CONTRIB, Dimensions, GraphTape

if TYPE_CHECKING:
    from ..model.config import HavocConfig, VisionConfig
    from ..model.structure import Structure


def build_graphs(
    config: HavocConfig, structure: Structure, options: GraphOptions = DEFAULT_OPTIONS
) -> dict[str, ir.Model]:
    """Build every graph of an artifact by file name: the decoder, and for vision configurations its two companions.

    Logits of the last position are fp32 [B, 1, V], those of all positions fp32 [B, T, V].
    """
    layout = plan_layout(config, structure)
    graphs = {session.DECODER: build_graph(config, structure, options, layout=layout)}
    if config.vision is not None:
        graphs[session.EMBEDDING] = build_embedding_graph(config, structure, layout=layout)
        graphs[session.VISION] = build_vision_graph(config, structure, layout=layout)
    return graphs


def build_graph(
    config: HavocConfig, structure: Structure, options: GraphOptions = DEFAULT_OPTIONS, *, layout: Layout | None = None
) -> ir.Model:
    """Build the decoder: ids (embeddings in vision configurations), mask, positions, past to logits, present."""
    graph = GraphTape(structure, layout or plan_layout(config, structure))
    return _Decoder(config, graph, options).build()


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
        msg = "this configuration has no vision part"
        raise HavocError(msg)
    return config.vision


def serialize(model: ir.Model) -> bytes:
    """The protobuf bytes of a graph; weights stay references into the data file."""
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def _embed(graph: GraphTape, config: HavocConfig, ids_BT: ir.Value) -> ir.Value:
    """Rows of the embedding table [B, T, D]; a quantized table is read from the bytes the head multiplies by."""
    weight = graph.layout[EMBEDDING]
    if weight.form == "plain":
        rows = graph.op("embed_tokens", "Gather", [graph.part(EMBEDDING), ids_BT])
        if graph.part(EMBEDDING).dtype == graph.activation:
            return rows
        return graph.op("embed_tokens/cast", "Cast", [rows], to=int(graph.activation))
    padded_len = weight.initializers[1].shape[1] * graph.structure.block_size
    padded = _block_rows(graph, weight, ids_BT, padded_len)
    if padded_len == config.d_model:
        return padded
    start, end, axis = (
        graph.constant(name, [value]) for name, value in (("zero", 0), ("d_model", config.d_model), ("last_axis", 2))
    )
    return graph.op("embed_tokens", "Slice", [padded, start, end, axis])


def _block_rows(graph: GraphTape, weight: StoredWeight, ids_BT: ir.Value, padded_len: int) -> ir.Value:
    """Rows of a quantized table with their padding; zero points are packed by row, so such a table is read as rows."""
    (num_rows, num_blocks), num_bytes = weight.initializers[1].shape, weight.initializers[0].num_bytes
    if graph.structure.is_symmetric:
        scales = graph.reshaped(EMBEDDING, 1, f"{EMBEDDING}_row_scales", (num_rows, num_blocks, 1))
        inputs, axis, name = [graph.part(EMBEDDING), ids_BT, scales], 2, "embed_tokens/blocks"
    else:
        packed = graph.reshaped(EMBEDDING, 0, f"{EMBEDDING}_rows", (num_rows, num_bytes // num_rows))
        inputs, axis = [packed, ids_BT, graph.part(EMBEDDING, 1), graph.part(EMBEDDING, 2)], 1
        name = "embed_tokens/rows"
    rows = graph.op(
        name,
        "GatherBlockQuantized",
        inputs,
        domain=CONTRIB,
        gather_axis=0,
        quantize_axis=axis,
        block_size=graph.structure.block_size,
        bits=NUM_BITS[graph.structure.weight_format],
    )
    if axis == 1:
        return rows
    return graph.op("embed_tokens/rows", "Reshape", [rows, graph.constant("rows", [0, 0, padded_len])])


class _Decoder:
    """The decoder's nodes, block by block, in the order of the forward pass."""

    def __init__(self, config: HavocConfig, graph: GraphTape, options: GraphOptions) -> None:
        self.config = config
        self.graph = graph
        self.options = options

    def build(self) -> ir.Model:
        graph, config = self.graph, self.config
        if config.vision is None:
            x_BTD = _embed(graph, config, graph.input("input_ids", ir.DataType.INT64, ["batch", "sequence"]))
        else:
            x_BTD = graph.input("inputs_embeds", graph.activation, ["batch", "sequence", config.d_model])
        mask_BS = graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.position_ids = graph.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.allowed = self._allowed(x_BTD, mask_BS)
        presents: list[ir.Value] = []
        for layer in range(config.num_layers):
            x_BTD, present = self._block(layer, x_BTD)
            presents += present
        return graph.finish("havoc", [self._head(x_BTD), *presents])

    def _allowed(self, x_BTD: ir.Value, mask_BS: ir.Value) -> ir.Value:
        """Which key each query may see, bool [B, 1, T, S]."""
        graph = self.graph
        zero, one = graph.constant("scalar_zero", 0), graph.constant("scalar_one", 1)
        num_new = graph.op("num_new", "Squeeze", [graph.op("num_new_1", "Shape", [x_BTD], start=1, end=2)])
        num_total = graph.op("num_total", "Squeeze", [graph.op("num_total_1", "Shape", [mask_BS], start=1, end=2)])
        key_S = graph.op("key_index", "Range", [zero, num_total, one])
        query_T = graph.op("query_index", "Range", [graph.op("num_past", "Sub", [num_total, num_new]), num_total, one])
        query_T1 = graph.op("query_column", "Unsqueeze", [query_T, graph.constant("axis_1", [1])])
        causal_TS = graph.op("causal", "LessOrEqual", [key_S, query_T1])
        itself_TS = graph.op("itself", "Equal", [key_S, query_T1])
        real_BS = graph.op("real", "Cast", [mask_BS], to=int(ir.DataType.BOOL))
        real_B11S = graph.op("real_keys", "Unsqueeze", [real_BS, graph.constant("axes_1_2", [1, 2])])
        visible = graph.op("visible", "Or", [real_B11S, itself_TS])
        return graph.op("allowed", "And", [causal_TS, visible])

    def _norm(self, name: str, x: ir.Value, source: str) -> ir.Value:
        scale = self.graph.part(source)
        return self.graph.op(name, "RMSNormalization", [x, scale], axis=-1, epsilon=self.config.norm_eps)

    def _block(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        graph, source = self.graph, f"model.layers.{layer}."
        name = f"layers.{layer}"
        normed = self._norm(f"{name}/input_norm", x_BTD, source + "input_layernorm.weight")
        attended, present = self._attention(layer, normed)
        x_BTD = graph.op(f"{name}/attention_residual", "Add", [x_BTD, attended])
        normed = self._norm(f"{name}/post_attention_norm", x_BTD, source + "post_attention_layernorm.weight")
        gate = graph.linear(f"{name}/mlp/gate", normed, source + "mlp.gate_proj.weight")
        up = graph.linear(f"{name}/mlp/up", normed, source + "mlp.up_proj.weight")
        silu = graph.op(f"{name}/mlp/silu", "Mul", [gate, graph.op(f"{name}/mlp/sigmoid", "Sigmoid", [gate])])
        hidden = graph.op(f"{name}/mlp/gated", "Mul", [silu, up])
        down = graph.linear(f"{name}/mlp/down", hidden, source + "mlp.down_proj.weight")
        return graph.op(f"{name}/mlp_residual", "Add", [x_BTD, down]), present

    def _attention(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        graph, attention = self.graph, self.config.attention
        name, source = f"layers.{layer}/attention", f"model.layers.{layer}.self_attn."
        q = self._rotated(layer, "q", x_BTD, attention.num_heads)
        k = self._rotated(layer, "k", x_BTD, attention.num_kv_heads)
        v = self._projected(layer, "v", x_BTD)
        cache: Dimensions = ["batch", attention.num_kv_heads, "past", attention.head_dim]
        past = [graph.input(f"past_key_values.{layer}.{kind}", graph.activation, cache) for kind in ("key", "value")]
        outputs = [f"{name}/heads", f"present.{layer}.key", f"present.{layer}.value"]
        heads, *present = graph.ops(
            f"{name}/Attention",
            "Attention",
            [q, k, v, self.allowed, *past],
            outputs,
            q_num_heads=attention.num_heads,
            kv_num_heads=attention.num_kv_heads,
        )
        cache[2] = "total"
        present = [graph.typed(value, graph.activation, cache) for value in present]
        return graph.linear(f"{name}/o", heads, source + "o_proj.weight"), present

    def _projected(self, layer: int, kind: str, x_BTD: ir.Value) -> ir.Value:
        name, source = f"layers.{layer}/attention/{kind}", f"model.layers.{layer}.self_attn.{kind}_proj."
        projected = self.graph.linear(name, x_BTD, source + "weight")
        if not self.config.attention.qkv_bias:
            return projected
        return self.graph.op(f"{name}_bias", "Add", [projected, self.graph.part(source + "bias")])

    def _rotated(self, layer: int, kind: str, x_BTD: ir.Value, num_heads: int) -> ir.Value:
        """Queries or keys [B, T, heads * H], normalised per head where Qwen3 does, rotated."""
        graph, attention = self.graph, self.config.attention
        name = f"layers.{layer}/attention/{kind}"
        x = self._projected(layer, kind, x_BTD)
        if attention.qk_norm:
            split = graph.constant(f"{kind}_heads", [0, 0, num_heads, attention.head_dim])
            x = graph.op(f"{name}_split", "Reshape", [x, split])
            x = self._norm(f"{name}_norm", x, f"model.layers.{layer}.self_attn.{kind}_norm.weight")
            joined = graph.constant(f"{kind}_joined", [0, 0, num_heads * attention.head_dim])
            x = graph.op(f"{name}_join", "Reshape", [x, joined])
        tables = [graph.part(ROPE_COS), graph.part(ROPE_SIN)]
        return graph.op(f"{name}_rotated", "RotaryEmbedding", [x, *tables, self.position_ids], num_heads=num_heads)

    def _head(self, x_BTD: ir.Value) -> ir.Value:
        graph, config = self.graph, self.config
        if self.options.logits == "last":
            x_BTD = graph.op("last_position", "Gather", [x_BTD, graph.constant("last", [-1])], axis=1)
        normed = self._norm("final_norm", x_BTD, FINAL_NORM)
        source = EMBEDDING if config.tie_word_embeddings else HEAD
        is_half = graph.activation == ir.DataType.FLOAT16
        logits = graph.linear("head", normed, source, output="" if is_half else "logits")
        if is_half:
            logits = graph.op("logits_fp32", "Cast", [logits], output="logits", to=int(ir.DataType.FLOAT))
        num_logits = 1 if self.options.logits == "last" else "sequence"
        return graph.typed(logits, ir.DataType.FLOAT, ["batch", num_logits, config.vocab_size])
