"""More than sixty ways to write a wrong artifact: each is refused by one of the two proofs, and the right twin passes.

A defect is put into the graph or the data file between writing and proving, so that what is proved is what is on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from havoc_core.errors import MeasurementError
from havoc_core.export import package
from havoc_core.export.layout import DATA_FILE, plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.binding import BoundCall
from havoc_core.export.runtime.options import DEFAULT_OPTIONS, GraphOptions
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure

FP32 = Structure()
INT4, INT4A = Structure("int4", compute="fp32"), Structure("int4", is_symmetric=False, compute="fp32")
INT8, INT8_ROUNDED = Structure("int8", compute="fp32"), Structure("int8", compute="int8")
INT4_ROUNDED, FP16 = Structure("int4", compute="int8"), Structure("fp16")
HALF = Structure("fp16", "fp16")
CONTRIB, STATIC = GraphOptions(dialect="contrib"), GraphOptions(cache="static", cache_len=96)
CONTRIB_STATIC = GraphOptions(dialect="contrib", cache="static", cache_len=64)

Q, K, V, O = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qkvo")
GATE, UP, DOWN = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
TABLE = "model.embed_tokens.weight"


class Written:
    """An artifact's folder before it is proved, open for damage."""

    def __init__(self, folder: Path, config: HavocConfig, structure: Structure) -> None:
        self.folder, self.config = folder, config
        self.layout = plan_layout(config, structure)

    def stored(self, source: str, index: int = 0) -> np.ndarray:
        """One initializer as it lies in the file; writing to it writes the file."""
        item = self.layout[source].initializers[index]
        data = np.memmap(self.folder / DATA_FILE, np.uint8, mode="r+")
        return data[item.offset_bytes : item.offset_bytes + item.num_bytes].view(item.dtype).reshape(item.shape)

    def edit(self, change: Callable[[onnx.GraphProto], None]) -> None:
        path = self.folder / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model.graph)
        path.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class Defect:
    """One thing wrong: how, in which kind of decoder, stored and written how."""

    name: str
    damage: Callable[[Written], None]
    kind: str = "text"
    structure: Structure = FP32
    options: GraphOptions = field(default=DEFAULT_OPTIONS)


def damages(make: Callable[..., None]) -> Callable[..., Callable[[Written], None]]:
    """`make(written, ...)` as a function of the rest, which gives the damage."""
    return lambda *args, **kwargs: lambda written: make(written, *args, **kwargs)


def changes_graph(make: Callable[..., None]) -> Callable[..., Callable[[Written], None]]:
    """`make(graph, ...)` as a function of the rest, which gives the damage."""
    return damages(lambda written, *args, **kwargs: written.edit(lambda graph: make(graph, *args, **kwargs)))


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (found,) = [node for node in graph.node if node.name == f"/{name}"]
    return found


@changes_graph
def rewired(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Whatever reads `old` reads `new`."""
    reads = [(n, i) for n in graph.node for i, name in enumerate(n.input) if name == old]
    assert reads
    for reader, index in reads:
        reader.input[index] = new


@changes_graph
def reads(graph: onnx.GraphProto, name: str, index: int, value: str) -> None:
    """One node's input `index` is another value."""
    assert node(graph, name).input[index] != value
    node(graph, name).input[index] = value


@changes_graph
def swapped_inputs(graph: onnx.GraphProto, *places: tuple[str, int]) -> None:
    (one, i), (other, j) = ((node(graph, name), index) for name, index in places)
    one.input[i], other.input[j] = other.input[j], one.input[i]


@changes_graph
def swapped_outputs(graph: onnx.GraphProto, *places: tuple[str, int]) -> None:
    (one, i), (other, j) = ((node(graph, name), index) for name, index in places)
    one.output[i], other.output[j] = other.output[j], one.output[i]


@changes_graph
def with_type(graph: onnx.GraphProto, name: str, op_type: str, *, num_inputs: int | None = None) -> None:
    found = node(graph, name)
    assert found.op_type != op_type
    found.op_type = op_type
    del found.input[num_inputs or len(found.input) :]
    del found.attribute[:]


@changes_graph
def with_attribute(graph: onnx.GraphProto, name: str, **values: Any) -> None:
    found = node(graph, name)
    kept = [attribute for attribute in found.attribute if attribute.name not in values]
    del found.attribute[:]
    found.attribute.extend([*kept, *(helper.make_attribute(key, value) for key, value in values.items())])


@changes_graph
def inserted(
    graph: onnx.GraphProto,
    name: str,
    index: int,
    op_type: str,
    constant: np.ndarray | None = None,
    *,
    tag: str = "",
    **attributes: Any,
) -> None:
    """A node between an input of `name` and what it read."""
    found = node(graph, name)
    inputs = [found.input[index]]
    if constant is not None:
        graph.initializer.append(numpy_helper.from_array(constant, "defect.constant"))
        inputs.append("defect.constant")
    nodes = list(graph.node)
    place = next(i for i, other in enumerate(nodes) if other.name == found.name)
    new = helper.make_node(op_type, inputs, [f"defect{tag}.value"], name=f"/defect{tag}", **attributes)
    found.input[index] = f"defect{tag}.value"
    nodes[place] = found
    kept = [onnx.NodeProto.FromString(other.SerializeToString()) for other in nodes]
    del graph.node[:]
    graph.node.extend([*kept[:place], new, *kept[place:]])


@damages
def stored(written: Written, source: str, change: Callable[[np.ndarray], Any], index: int = 0) -> None:
    """An initializer in the data file, changed in place or replaced by what is returned."""
    array = written.stored(source, index)
    before = array.copy()
    result = change(array)
    if isinstance(result, np.ndarray):
        array[:] = result
    assert not np.array_equal(before, array)


def assign(*place: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[place] = value

    return change


def swap(one: Any, other: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[one], array[other] = array[other].copy(), array[one].copy()

    return change


def heads(array: np.ndarray, order: list[int], *, axis: int) -> np.ndarray:
    """Whole heads in another order."""
    parts = np.split(array, len(order), axis=axis)
    return np.concatenate([parts[index] for index in order], axis=axis)


@damages
def other_rope(written: Written, **changes: Any) -> None:
    from havoc_core.model.rope import rope_tables

    attention = replace(written.config.attention, **changes)
    tables = rope_tables(attention, written.config.max_seq_len)
    for source, table in zip(("rope.cos_cache", "rope.sin_cache"), tables, strict=True):
        written.stored(source)[:] = table


@damages
def both(written: Written, *damages: Callable[[Written], None]) -> None:
    for one in damages:
        one(written)


@damages
def another_table(written: Written, reader: str, index: int) -> None:
    """The table as it was before the last step of training, kept in the graph."""
    stale = written.stored(TABLE) * np.float32(0.99)

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(stale, "defect.table"))
        node(graph, reader).input[index] = "defect.table"

    written.edit(change)


def unquantized(written: Written) -> None:
    """One product with the exact matrix, in a graph of quantized ones."""
    exact = trained(written.config)[UP].numpy().T

    def change(graph: onnx.GraphProto) -> None:
        found = node(graph, "layers.1/mlp/up")
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(exact), "defect.matrix"))
        found.op_type, found.domain = "MatMul", ""
        del found.input[1:], found.attribute[:]
        found.input.append("defect.matrix")

    written.edit(change)


def trained(config: HavocConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of `source_with`, again."""
    return _SOURCE(config, seed).tensors


@damages
def of_another_seed(written: Written, source: str) -> None:
    """A matrix of an older mixture: quantized as it should be, and not the one."""
    from havoc_core.export.encode import encode

    weight = written.layout[source]
    arrays = encode(weight, trained(written.config, 5)[source], INT8)
    for index, array in enumerate(arrays):
        written.stored(source, index)[:] = array


_SOURCE: Any = None

DEFECTS = [
    # rotary positions
    Defect("theta", other_rope(rope_theta=20_000.0)),
    Defect("theta-nearly", other_rope(rope_theta=10_010.0)),
    Defect("rope-scaling-missing", other_rope(rope_scaling=None), kind="llama3-rope"),
    Defect("rope-sine-negative", stored("rope.sin_cache", np.negative)),
    Defect("rope-interleaved", with_attribute("layers.1/attention/k_rotated", interleaved=1)),
    Defect("rope-query-off-by-one", inserted("layers.1/attention/q_rotated", 3, "Add", np.array(1, np.int64))),
    Defect("rope-missing-on-keys", rewired("layers.1/attention/k_rotated", "layers.1/attention/k")),
    Defect("rope-table-row-off", stored("rope.cos_cache", lambda a: np.roll(a, 1, 0)), options=CONTRIB),
    Defect("rope-off-in-static", other_rope(rope_theta=500_000.0), options=CONTRIB_STATIC, kind="qwen3"),
    # norms
    Defect("eps", with_attribute("layers.1/input_norm", epsilon=1e-6)),
    Defect("eps-qwen", with_attribute("layers.0/input_norm", epsilon=1e-5), kind="qwen2"),
    Defect("eps-contrib", with_attribute("layers.1/input_norm", epsilon=1e-3), options=CONTRIB),
    Defect("norm-weight-missing", rewired("model.layers.1.input_layernorm.weight", "model.norm.weight")),
    Defect("norm-skipped", rewired("final_norm", "last_position")),
    Defect("norms-swapped", swapped_inputs(("layers.0/input_norm", 1), ("layers.0/post_attention_norm", 1))),
    Defect("query-norm-missing", rewired("layers.1/attention/q_norm", "layers.1/attention/q_split"), kind="qwen3"),
    Defect(
        "query-and-key-norms-swapped",
        swapped_inputs(("layers.1/attention/q_norm", 1), ("layers.1/attention/k_norm", 1)),
        kind="qwen3",
    ),
    Defect("key-norm-eps", with_attribute("layers.0/attention/k_norm", epsilon=1e-3), kind="qwen3"),
    Defect("norm-before-residual", reads("layers.0/post_attention_norm", 0, "layers.0/attention/o")),
    # attention
    Defect("causal-mask-off", rewired("causal", "visible")),
    Defect("causal-one-too-far", inserted("query_column", 0, "Add", np.array(1, np.int64))),
    Defect("causal-without-itself", with_type("causal", "Less")),
    Defect("padding-seen", rewired("visible", "causal")),
    Defect("padding-seen-static", rewired("visible", "causal"), options=STATIC),
    Defect("attention-scale", with_attribute("layers.1/attention/Attention", scale=1 / 8)),
    Defect("attention-softcap", with_attribute("layers.0/attention/Attention", softcap=50.0)),
    Defect(
        "attention-scale-contrib", with_attribute("layers.1/attention/GroupQueryAttention", scale=0.3), options=CONTRIB
    ),
    Defect("query-key-swapped", swapped_inputs(("layers.1/attention/q", 1), ("layers.1/attention/k", 1)), kind="mha"),
    Defect(
        "key-value-swapped", swapped_inputs(("layers.1/attention/Attention", 1), ("layers.1/attention/Attention", 2))
    ),
    Defect("layers-share-keys", reads("layers.1/attention/k", 1, "model.layers.0.self_attn.k_proj.weight")),
    Defect("query-bias-missing", rewired("layers.1/attention/q_bias", "layers.1/attention/q"), kind="qwen2"),
    Defect("value-bias-missing", rewired("layers.0/attention/v_bias", "layers.0/attention/v"), kind="qwen2"),
    Defect(
        "bias-of-another-layer",
        reads("layers.1/attention/k_bias", 1, "model.layers.0.self_attn.k_proj.bias"),
        kind="qwen2",
    ),
    Defect("bias-subtracted", with_type("layers.1/attention/q_bias", "Sub"), kind="qwen2"),
    Defect("query-heads-swapped", stored(Q, lambda a: heads(a, [1, 0, 2, 3], axis=1))),
    Defect(
        "heads-mapped-to-wrong-keys",
        both(
            *(stored(name, lambda a, axis=axis: heads(a, [0, 2, 1, 3], axis=axis)) for name, axis in ((Q, 1), (O, 0)))
        ),
    ),
    Defect("key-heads-swapped", stored(K, lambda a: heads(a, [1, 0], axis=0), 0), structure=INT8),
    Defect("value-heads-swapped", stored(V, lambda a: heads(a, [1, 0], axis=0), 1), structure=INT4),
    # cache
    Defect(
        "cache-of-another-layer",
        swapped_outputs(("layers.0/attention/Attention", 1), ("layers.1/attention/Attention", 1)),
    ),
    Defect(
        "cache-key-value-swapped",
        swapped_outputs(("layers.1/attention/Attention", 1), ("layers.1/attention/Attention", 2)),
    ),
    Defect("cache-unrotated", inserted("causal", 0, "Sub", np.array(1, np.int64))),
    Defect("static-write-off-by-one", inserted("write_at", 0, "Add", np.array([1], np.int64)), options=STATIC),
    Defect("contrib-length-off-by-one", inserted("seqlens_k", 0, "Sub", np.array([1], np.int64)), options=CONTRIB),
    Defect("contrib-turn-missing", rewired("turned", "embed_tokens"), options=CONTRIB),
    Defect(
        "contrib-answer-off-by-one",
        inserted("last_position/places", 0, "Sub", np.array([1], np.int64)),
        options=CONTRIB,
    ),
    # residuals, layers, mlp
    Defect("attention-residual-dropped", rewired("layers.1/attention_residual", "layers.1/attention/o")),
    Defect("mlp-residual-dropped", rewired("layers.0/mlp_residual", "layers.0/mlp/down")),
    Defect("layer-skipped", rewired("layers.0/mlp_residual", "embed_tokens")),
    Defect("last-layer-skipped", rewired("layers.1/mlp_residual", "layers.1/attention_residual")),
    Defect("gelu", with_type("layers.1/mlp/silu", "Gelu", num_inputs=1)),
    Defect("relu", with_type("layers.0/mlp/sigmoid", "HardSigmoid")),
    Defect("gate-up-swapped", swapped_inputs(("layers.1/mlp/gate", 1), ("layers.1/mlp/up", 1))),
    Defect("gate-dropped", rewired("layers.1/mlp/gated", "layers.1/mlp/up")),
    Defect("down-of-another-layer", reads("layers.1/mlp/down", 1, "model.layers.0.mlp.down_proj.weight")),
    # head and tables
    Defect("head-stale", another_table("head", 1)),
    Defect("embedding-stale", another_table("embed_tokens", 0)),
    Defect("head-scaled", with_attribute("head", alpha=1.0001)),
    Defect("embedding-scaled", inserted("layers.0/input_norm", 0, "Mul", np.array(5.66, np.float32))),
    Defect("last-position-off-by-one", inserted("last_position", 1, "Sub", np.array([1], np.int64))),
    Defect("untied-head-is-the-table", reads("head", 1, TABLE), kind="untied"),
    Defect("ids-off-by-one", inserted("embed_tokens", 1, "Sub", np.array(1, np.int64))),
    # rounding that nobody asked for
    Defect(
        "one-layer-in-bfloat16",
        both(
            inserted("layers.1/mlp/gate", 0, "Cast", to=onnx.TensorProto.BFLOAT16),
            inserted("layers.1/mlp/gate", 0, "Cast", tag="_back", to=onnx.TensorProto.FLOAT),
        ),
    ),
    Defect("int8-activations-unasked", with_attribute("layers.1/mlp/down", accuracy_level=4), structure=INT4),
    Defect("one-layer-unquantized", unquantized, structure=INT4),
    Defect("one-layer-unquantized-rounded", unquantized, structure=INT4_ROUNDED),
    # the data file
    Defect("transposed", stored(Q, lambda a: a.T.copy())),
    Defect("transposed-int8", stored(O, lambda a: a[:, 0].T.copy()[:, None]), structure=INT8),
    Defect("block-zeroed-int4", stored(DOWN, assign(3, 1, value=0x88)), structure=INT4),
    Defect("block-zeroed-int8", stored(UP, assign(7, 0, value=128)), structure=INT8_ROUNDED),
    Defect("block-zeroed-fp32", stored(GATE, assign(slice(0, 32), 3, value=0.0))),
    Defect("block-zeroed-table", stored(TABLE, assign(9, 0, value=0x88)), structure=INT4),
    Defect("scales-swapped", stored(GATE, swap(0, 9), 1), structure=INT4),
    Defect("scales-of-the-next-block", stored(DOWN, lambda a: a[:, ::-1].copy(), 1), structure=INT4),
    Defect("scale-halved", stored(K, assign(0, 0, value=1e-3), 1), structure=INT8),
    Defect("scale-negative", stored(UP, assign(5, 0, value=-0.02), 1), structure=INT8_ROUNDED),
    Defect("zero-points-in-the-middle", stored(V, assign(slice(None), value=0x88), 2), structure=INT4A),
    Defect("zero-point-far-off", stored(DOWN, lambda a: (a ^ 0x0F)[...], 2), structure=INT4A),
    Defect("nibbles-swapped", stored(UP, lambda a: (a << 4) | (a >> 4)), structure=INT4),
    Defect("last-block-lost", stored(UP, assign(slice(None), -1, value=0), 1), kind="odd-sizes", structure=INT8),
    Defect("last-block-repeated", stored(GATE, assign(2, -1, value=0xFF)), kind="odd-sizes", structure=INT4),
    Defect("layer-stale", of_another_seed(UP), structure=INT8),
    Defect("layer-in-less-precision", stored(UP, lambda a: (a.view(np.uint32) & 0xFFFF0000).view(np.float32))),
    Defect("norm-weights-of-one", stored("model.layers.0.input_layernorm.weight", assign(slice(None), value=1.0))),
    Defect("bias-zero", stored("model.layers.0.self_attn.q_proj.bias", assign(slice(None), value=0.0)), kind="qwen2"),
    Defect("row-of-fp16-lost", stored(O, assign(slice(None), 4, value=0.0)), structure=FP16),
    # fp16 activations hide what is smaller than their rounding, and nothing else
    Defect("half-mask-off", rewired("causal", "visible"), structure=HALF),
    Defect(
        "half-gate-up-swapped",
        swapped_inputs(("layers.1/mlp/gate", 1), ("layers.1/mlp/up", 1)),
        structure=HALF,
        options=CONTRIB,
    ),
    Defect("half-theta", other_rope(rope_theta=20_000.0), structure=HALF),
]


@pytest.fixture(autouse=True)
def _remember_the_source(source_with: Callable[..., Any]) -> None:
    global _SOURCE
    _SOURCE = source_with


@pytest.fixture
def exported(
    configs: dict[str, HavocConfig], source_with, with_wide_heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`exported(defect)`: an export with the defect written into it; with `damage=False` without."""

    def export(defect: Defect, *, is_damaged: bool = True) -> Path:
        config = kinds(configs)[defect.kind]
        if defect.options.dialect == "contrib":
            config = with_wide_heads(config)
        write = package._write_model

        def damaged(folder: Path, *args: Any) -> str:
            digest = write(folder, *args)
            if is_damaged:
                defect.damage(Written(folder, config, defect.structure))
            return digest

        monkeypatch.setattr(package, "_write_model", damaged)
        return export_artifact(source_with(config), tmp_path / "a", structure=defect.structure, options=defect.options)

    return export


def kinds(configs: dict[str, HavocConfig]) -> dict[str, HavocConfig]:
    """Those of every test, and one whose queries and keys have the same shape."""
    text = configs["text"]
    return {**configs, "mha": text.replace(attention=replace(text.attention, num_kv_heads=text.attention.num_heads))}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_is_refused(defect: Defect, exported: Callable[..., Path], tmp_path: Path) -> None:
    """One line says what is off, and nothing is left."""
    with pytest.raises(MeasurementError, match=r"^the (exported graph|stored weights|format's cost)"):
        exported(defect)
    assert list(tmp_path.iterdir()) == []


CLEAN = list({(d.kind, d.structure, d.options): d for d in DEFECTS}.values())


@pytest.mark.parametrize("defect", CLEAN, ids=lambda defect: f"{defect.kind}-{defect.structure}-{defect.options}")
def test_the_same_without_a_defect_passes(defect: Defect, exported: Callable[..., Path]) -> None:
    """Every decoder, structure and way to write it that a defect was put into."""
    assert exported(defect, is_damaged=False).is_dir()


def test_at_least_fifty_are_known() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 50


def test_a_session_that_counts_positions_wrong_is_refused(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token behind others stands one place too far: only what reads token by token can tell."""
    run = BoundCall.run

    def off_by_one(self: BoundCall, buffers: Any, past: Any, ids: Any, mask: Any, positions: Any, features: Any) -> Any:
        return run(self, buffers, past, ids, mask, positions + (past.num_tokens > 0), features)

    monkeypatch.setattr(BoundCall, "run", off_by_one)
    with pytest.raises(MeasurementError, match="single steps"):
        export_artifact(source_with(configs["text"]), tmp_path / "a")
