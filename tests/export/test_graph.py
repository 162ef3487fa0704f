"""The graph is what the runtime loads, the same bytes every time, and holds each weight once."""

from __future__ import annotations

import itertools
import json
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from havoc_core.errors import HavocError
from havoc_core.export.graph import build_graphs, serialize
from havoc_core.export.layout import DATA_FILE, plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.dialects import DIALECTS
from havoc_core.export.runtime.options import CACHES, LOGITS, GraphOptions
from havoc_core.export.runtime.providers import SHAPE_OPERATORS
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import WEIGHT_FORMATS, Structure
from havoc_core.model.tensors import tensor_shapes


def test_header_is_pinned_and_names_no_path(config: HavocConfig) -> None:
    """Opset 23 and IR 11, whatever onnx defaults to; no version, date, path or doc string inside."""
    for graph in build_graphs(config, Structure()).values():
        model = onnx.load_from_string(serialize(graph))
        assert model.ir_version == 11
        assert {item.domain: item.version for item in model.opset_import} | {"com.microsoft": 1} == {
            "": 23,
            "com.microsoft": 1,
        }
        assert model.producer_name == "havoc"
        assert not model.producer_version
        assert b"/home" not in serialize(graph)
        assert b".py" not in serialize(graph)
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize(
    ("options", "opset", "ir_version", "operators"),
    [
        (GraphOptions(), 23, 11, {"Attention", "RMSNormalization", "RotaryEmbedding"}),
        (GraphOptions(cache="static"), 24, 11, {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}),
        (
            GraphOptions(dialect="contrib"),
            22,
            10,
            {"GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"},
        ),
    ],
    ids=["standard", "static", "contrib"],
)
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_each_dialect_is_written_in_its_own_operators(
    configs: dict[str, HavocConfig], with_wide_heads, kind, options: GraphOptions, opset, ir_version, operators
) -> None:
    """The header is the oldest that holds the operators; none of the other dialect slips in."""
    special = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    special |= {"GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
    graphs = build_graphs(with_wide_heads(configs[kind]), Structure(), options)
    for graph in graphs.values():
        model = onnx.load_from_string(serialize(graph))
        assert (model.ir_version, {item.domain: item.version for item in model.opset_import}[""]) == (ir_version, opset)
    found = {node.op_type for node in graphs["model.onnx"].graph}
    assert found & special == operators


READ_ON_THE_HOST = {
    "ConstantOfShape": {0},
    "Expand": {1},
    "Range": {0, 1, 2},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "GroupQueryAttention": {6},
}
"""Inputs that kernels of the CUDA provider read in the CPU's memory."""


@pytest.mark.parametrize(
    "options", [GraphOptions(dialect=d, cache=c, logits=n) for d, c, n in product(DIALECTS, CACHES, LOGITS)], ids=str
)
@pytest.mark.parametrize("kind", ["text", "vision", "qwen3"])
def test_no_length_is_copied_to_a_card(configs, with_wide_heads, kind: str, options: GraphOptions) -> None:
    """ONNX Runtime computes on the CPU what comes from shapes alone; a node on a card that reads it elsewhere than on
    the host makes a copy, which no CUDA graph can hold. In the standard dialect there is no such node at all.
    """
    for name, graph in build_graphs(with_wide_heads(configs[kind]), Structure(), options).items():
        model = onnx.load_from_string(serialize(graph)).graph
        inputs, initializers = {item.name for item in model.input}, {item.name for item in model.initializer}
        on_host: set[str] = set()
        shape_nodes = []
        for node in model.node:
            read = {value: READ_ON_THE_HOST.get(node.op_type, set()) for value in on_host & set(node.input)}
            copied = [value for value, places in read.items() if list(node.input).index(value) not in places]
            if node.op_type == "Shape":
                on_host |= set(node.output)
            elif copied and set(node.input) <= on_host | inputs | initializers:
                shape_nodes.append(node)
                on_host |= set(node.output)
            else:
                assert not copied, f"{name}: {node.name} reads {copied} on the card"
        assert {node.op_type for node in shape_nodes} <= SHAPE_OPERATORS
        assert bool(shape_nodes) == (options.dialect == "contrib" and name == "model.onnx")


def test_heads_that_cannot_be_rotated_are_refused(configs: dict[str, HavocConfig]) -> None:
    """GroupQueryAttention takes heads of a multiple of 16 only: said by the exporter, not by the runtime."""
    with pytest.raises(HavocError, match="16, this model's have 8: .*--dialect standard"):
        build_graphs(configs["text"], Structure(), GraphOptions(dialect="contrib"))


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_graph_bytes_depend_on_configuration_and_structure_only(config: HavocConfig, weight_format: str) -> None:
    """Built twice, a graph is the same bytes."""
    structure = Structure(weight_format)
    first, second = ({name: serialize(g) for name, g in build_graphs(config, structure).items()} for _ in range(2))
    assert first == second


def test_inputs_and_outputs_are_those_of_genai(configs: dict[str, HavocConfig]) -> None:
    """A text decoder has genai's names, so its runtime finds them."""
    graph = build_graphs(configs["text"], Structure())["model.onnx"].graph
    past = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(name.replace("past_key_values", "present") for name in past),
    ]


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("kind", ["text", "vision", "untied"])
def test_each_table_is_stored_once(configs: dict[str, HavocConfig], kind: str, weight_format: str) -> None:
    """The data file holds a tied table once, and not much besides the weights."""
    config = configs[kind].replace(vocab_size=5000, max_seq_len=16)
    layout = plan_layout(config, Structure(weight_format))
    bits = {"fp32": 32, "fp16": 16, "int8": 9, "int4": 5}[weight_format]
    num_tables = 2 if kind == "untied" else 1
    expected = num_tables * 5000 * config.d_model * bits / 8
    others = sum(np.prod(shape) for shape in tensor_shapes(config.replace(vocab_size=4)).values()) * 4 + 4096 * 60
    assert expected <= layout.num_bytes <= expected + others
    offsets = [(item.offset_bytes, item.offset_bytes + item.num_bytes) for item in layout.initializers()]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(offsets))


@pytest.mark.parametrize("weight_format", ["fp32", "int8", "int4"])
def test_a_tied_table_is_once_in_memory_after_optimisation(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, weight_format: str
) -> None:
    """ONNX Runtime's optimised graph has the table's bytes once: nothing was transposed or unpacked into a copy."""
    config = configs["text"].replace(vocab_size=4096)
    artifact = export_artifact(source_with(config), tmp_path / "a", structure=Structure(weight_format))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    table_values = 4096 * config.d_model // (2 if weight_format == "int4" else 1)
    large = {item.name for item in optimised.graph.initializer if np.prod(item.dims) >= table_values}
    written = onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer
    places = {
        item.name: {entry.key: entry.value for entry in item.external_data}["offset"]
        for item in written
        if item.name in large
    }
    assert large == set(places)
    assert len(set(places.values())) == 1, places


def test_two_exports_are_the_same_bytes(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """Every file of an artifact, the manifest included, is byte-identical when made twice."""
    for kind in ("text", "vision"):
        folders = [export_artifact(source_with(configs[kind]), tmp_path / f"{kind}{turn}") for turn in range(2)]
        first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
        assert first == second
        assert DATA_FILE in first


def test_graph_file_is_small(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """Weights lie in the data file; the manifest lists both."""
    artifact = export_artifact(source_with(configs["vision"]), tmp_path / "a")
    assert sum(file.stat().st_size for file in artifact.glob("*.onnx")) < 30_000
    listed = json.loads((artifact / "manifest.json").read_text())["files"]
    assert {file.relative_to(artifact).as_posix() for file in artifact.rglob("*") if file.is_file()} == {
        *listed,
        "manifest.json",
    }
