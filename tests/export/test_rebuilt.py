"""A graph that HAVOC did not write is found without base and weights, whatever hides in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from havoc_core.errors import IdentityError
from havoc_core.export.package import export_artifact
from havoc_core.export.rebuilt import require_own_graphs, why_not_rebuilt
from havoc_core.export.runtime.artifact import MANIFEST, read_manifest
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.verify import verify_artifact
from havoc_core.model.structure import Structure
from havoc_core.storage import read_json, write_json
from tests.export.listed import relist

MADE = [
    (Structure(), GraphOptions()),
    (Structure(), GraphOptions(cache="static", cache_len=128, logits="all")),
    (Structure("fp16", "fp16"), GraphOptions(dialect="contrib", cache="static")),
    (Structure("int8", block_size=64, is_symmetric=False), GraphOptions(dialect="contrib", logits="all")),
    (Structure("int4", compute="fp32"), GraphOptions()),
    (Structure("int8", compute="w8a8"), GraphOptions()),
    (Structure("int4", quantizer="gptq"), GraphOptions()),
    (Structure("int4", average_bits=6.5), GraphOptions()),
    (Structure(rank_fraction=0.5), GraphOptions()),
]


@pytest.mark.parametrize(("structure", "options"), MADE, ids=str)
def test_what_was_exported_is_built_anew(
    base_directory: Path, tmp_path: Path, structure: Structure, options: GraphOptions
) -> None:
    """Every form of a weight, dialect and cache; text and the two graphs of vision."""
    artifact = export_artifact(base_directory, tmp_path / "a", structure=structure, options=options)
    manifest = read_manifest(artifact)
    assert why_not_rebuilt() is None
    assert require_own_graphs(artifact, manifest) == 3
    _, checks = verify_artifact(artifact)
    assert [check.finding[:13] for check in checks].count("3 built again") == 1


@pytest.mark.parametrize("name", ["model.onnx", "embedding.onnx", "vision.onnx"])
def test_the_smallest_change_of_a_graph_is_found(artifact: Path, name: str) -> None:
    """A doc string computes nothing; a node that skips the head from 512 tokens on is found by the same comparison."""
    model = onnx.load(artifact / name, load_external_data=False)
    model.graph.node[0].doc_string = "x"
    (artifact / name).write_bytes(model.SerializeToString(deterministic=True))
    relist(artifact, name)
    with pytest.raises(IdentityError, match=f"{name}: not the graph"):
        verify_artifact(artifact)


@pytest.mark.parametrize(
    "change",
    [
        {"graph": {"dialect": "contrib"}},
        {"graph": {"cache": "static", "cache_len": 64}},
        {"structure": {"weight_format": "int8"}},
        {"structure": {"weight_format": "int3"}},
        {"graph": {"logits": "no token"}},
        {"structure": {"weight_format": "int4", "average_bits": "6.5"}},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_no_way_around(artifact: Path, change: dict[str, dict]) -> None:
    """What it says is what is built: another dialect, another format, or nothing that can be built."""
    document = read_json(artifact / MANIFEST)
    for key, values in change.items():
        document[key] = {**document[key], **values}
    write_json(artifact / MANIFEST, document)
    with pytest.raises(IdentityError, match="not the graph|no graph can be built"):
        require_own_graphs(artifact, read_manifest(artifact))


def test_an_edge_says_that_it_cannot(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnx-ir nothing is claimed: the reason and the remedy stand among the checks."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    _, checks = verify_artifact(artifact)
    assert "not built again: onnx-ir, " in " ".join(c.finding for c in checks)
