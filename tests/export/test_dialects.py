"""A dialect is an entry and a class: one that stands in this file is offered, written, proved, built anew and run."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from havoc_core.cli import main
from havoc_core.config import load_recipe
from havoc_core.errors import HavocError
from havoc_core.export.genai import genai_config
from havoc_core.export.graph import build_graphs
from havoc_core.export.rebuilt import require_own_graphs
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.dialects import BEST_DIALECT, DIALECTS, Dialect, choose_dialect
from havoc_core.export.runtime.options import CACHES, GraphOptions
from havoc_core.export.runtime.probe import fingerprint, fingerprint_distance
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.standard import StandardDecoder
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure


class FusedNormDecoder(StandardDecoder):
    """The standard decoder with ONNX Runtime's older name for RMS normalisation."""

    def _norm(self, name: str, x: ir.Value, source: str) -> ir.Value:
        inputs = [x, self.graph.part(source)]
        return self.graph.op(name, "SimplifiedLayerNormalization", inputs, axis=-1, epsilon=self.config.norm_eps)


FUSED_NORM = Dialect(
    name="fused-norm",
    decoders={"dynamic": f"{__name__}:FusedNormDecoder"},
    opsets={"dynamic": 23},
    ir_version=11,
    attention="Attention",
    head_dim_unit=8,
    lacks=frozenset({("cuda", "fp16")}),
)


@pytest.fixture
def _fused_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIALECTS, FUSED_NORM.name, FUSED_NORM)


@pytest.mark.usefixtures("_fused_norm")
def test_a_dialect_from_outside_is_used_by_the_verbs(
    text_base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`export` writes it and proves its parity; the artifact is built anew to the same bytes, opens and answers."""
    out, base = tmp_path / "artifact", str(text_base_directory)
    assert main(["export", base, "--dialect", "fused-norm", "--out", str(out), "--quiet"]) == 0
    assert "fused-norm dialect, dynamic cache" in capsys.readouterr().out
    operators = {node.op_type for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node}
    assert {"SimplifiedLayerNormalization", "Attention"} <= operators
    assert "RMSNormalization" not in operators
    manifest = read_manifest(out)
    assert manifest.graph["dialect"] == "fused-norm"
    assert require_own_graphs(out, manifest) == 1
    assert not fingerprint_distance(manifest.fingerprint, fingerprint(DecoderSession.open(out))) > 1e-5


@pytest.mark.usefixtures("_fused_norm")
def test_a_recipe_may_ask_for_it(tmp_path: Path) -> None:
    """The recipe's key takes every name of the table, and lists them where it gets another."""
    path = tmp_path / "recipe.toml"
    path.write_text('[export]\ndialect = "fused-norm"\n')
    assert load_recipe(path).export.dialect == "fused-norm"
    path.write_text('[export]\ndialect = "latin"\n')
    with pytest.raises(HavocError, match=r"export.dialect: .*standard, contrib, fused-norm"):
        load_recipe(path)


@pytest.mark.usefixtures("_fused_norm")
def test_its_limits_are_those_of_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, kernels and the choice of `auto` are asked of the entry."""
    monkeypatch.setitem(BEST_DIALECT, ("cpu", "fp32", "dynamic"), "fused-norm")
    chosen = {
        head_dim: choose_dialect("auto", device="cpu", activation_dtype="fp32", head_dim=head_dim)
        for head_dim in (64, 12)
    }
    assert chosen == {64: "fused-norm", 12: "standard"}
    with pytest.raises(HavocError, match="8, this model's have 12"):
        choose_dialect("fused-norm", device="cpu", activation_dtype="fp32", head_dim=12)
    with pytest.raises(HavocError, match="does not run in fp16 on CUDA"):
        choose_dialect("fused-norm", device="cuda", activation_dtype="fp16", head_dim=64)
    with pytest.raises(HavocError, match="no static cache; there are dynamic"):
        GraphOptions(dialect="fused-norm", cache="static")


@pytest.mark.parametrize("name", DIALECTS)
def test_every_entry_is_whole(name: str) -> None:
    """Every bundled dialect has a decoder and an opset for both caches, and says truly whether it reads positions."""
    dialect = DIALECTS[name]
    config = HavocConfig.preset("nano").replace(vision=None)
    for cache in CACHES:
        options = GraphOptions(dialect=name, cache=cache).fitted(config.max_seq_len)
        graph = build_graphs(config, Structure(), options)["model.onnx"].graph
        assert graph.opset_imports[""] == dialect.opsets[cache]
        assert ("position_ids" in {value.name for value in graph.inputs}) == dialect.has_positions
        inputs = genai_config(config, options)["model"]["decoder"]["inputs"]
        assert ("position_ids" in inputs) == dialect.has_positions
