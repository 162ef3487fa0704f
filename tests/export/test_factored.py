"""Projections of truncated rank: the best factors there are, proved, derived again and switched like whole ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from havoc_core import cli
from havoc_core.adapt.expert import Expert
from havoc_core.adapt.svf import Basis, matrix_basis
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export import fold
from havoc_core.export.candidates import CandidateSessions
from havoc_core.export.datafile import StoredWeights
from havoc_core.export.fold import FoldedTensors
from havoc_core.export.layout import DATA_FILE, plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.rederive import rederive
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure

ALPHA = (1.3, 0.6)
IDS = np.arange(4, 40)[None]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
STRUCTURES = [
    Structure(rank_fraction=0.25),
    Structure("fp16", "fp16", rank_fraction=0.25),
    Structure("int8", "fp32", 16, False, "rtn", 0.4),
    Structure("int4", "fp32", 16, False, "k_quant", 0.4),
]


@pytest.fixture(scope="module")
def deltas(experts: list[Expert]) -> dict[str, torch.Tensor]:
    return {name: ALPHA[0] * delta + ALPHA[1] * experts[1].deltas[name] for name, delta in experts[0].deltas.items()}


@pytest.mark.parametrize("rank", [1, 5, 16, 31])
@pytest.mark.parametrize("name", [UP, DOWN])
@pytest.mark.parametrize("has_experts", [True, False])
def test_no_factors_of_that_rank_are_nearer(
    source: Source, basis: Basis, deltas: dict[str, torch.Tensor], has_experts: bool, name: str, rank: int
) -> None:
    """The error is the norm of the discarded singular values of the folded matrix (Eckart-Young), for both shapes."""
    folded = FoldedTensors(source.tensors, deltas if has_experts else {}, basis)
    first_RN, second_MR = folded.factors(name, rank=rank)
    whole_MN = folded[name]
    assert (first_RN.shape, second_MR.shape) == ((rank, whole_MN.shape[1]), (whole_MN.shape[0], rank))
    singular_values = torch.linalg.svdvals(whole_MN.double())
    error = torch.linalg.norm((whole_MN - second_MR @ first_RN).double())
    assert float(error) == pytest.approx(float(singular_values[rank:].norm()), rel=1e-4)


def test_the_basis_is_found_where_none_is_given(source: Source, basis: Basis, deltas: dict[str, torch.Tensor]) -> None:
    """Without a cached basis the matrix's own is computed, and gives the same product."""
    given, found = (FoldedTensors(source.tensors, deltas, choice).factors(UP, rank=9) for choice in (basis, None))
    assert torch.allclose(given[1] @ given[0], found[1] @ found[0], atol=1e-5)


def test_a_whole_rank_changes_no_byte(source: Source, experts: list[Expert], tmp_path: Path) -> None:
    """Rank fraction 1 writes the artifact that leaving it out writes, and so does one above break-even but its name."""
    written = [
        export_artifact(source, tmp_path / str(rank), experts=experts, alpha=ALPHA, structure=Structure("int4", **rank))
        for rank in ({}, {"rank_fraction": 1.0}, {"rank_fraction": 0.99})
    ]
    files = [{file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} for folder in written]
    assert files[0] == files[1]
    assert all(files[0][name] == files[2][name] for name in (DATA_FILE, "model.onnx"))
    assert read_manifest(written[2]).graph["factored"] == "0 of 14 projections"


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_factored_export_is_proved_and_derived_again(
    source: Source, experts: list[Expert], base_directory: Path, tmp_path: Path, structure: Structure
) -> None:
    """The graph agrees with torch over the stored factors, the manifest says how many, and folding again fits."""
    artifact = export_artifact(source, tmp_path / "a", experts=experts, alpha=ALPHA, structure=structure)
    manifest = read_manifest(artifact)
    layout = plan_layout(source.config, structure)
    assert Structure.from_fields(manifest.structure) == structure
    assert layout.num_factored > 0
    assert manifest.graph["factored"] == f"{layout.num_factored} of 14 projections"
    card = (artifact / "README.md").read_text()
    assert f"{structure.rank_fraction:g} of the rank: {layout.num_factored} of 14 projections as two factors" in card
    graph = (artifact / "model.onnx").read_bytes()
    assert graph.count(b"/in") >= layout.num_factored
    (check,) = rederive(artifact, manifest, base_directory)
    num_items = len(list(layout.initializers()))
    assert f"{num_items} tensors from base" in check.finding
    assert f"{num_items} bit for bit" in check.finding


def test_another_expert_is_noticed(source: Source, experts: list[Expert], base_directory: Path, tmp_path: Path) -> None:
    """Factors of another mixture do not pass for this one's."""
    structure = Structure(rank_fraction=0.25)
    artifact = export_artifact(source, tmp_path / "a", experts=experts, alpha=ALPHA, structure=structure)
    document = json.loads((artifact / "manifest.json").read_text())
    document["mixture"]["alpha"] = {"math": 1.2, "code": 0.6}
    (artifact / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(IdentityError, match="of its range off base"):
        rederive(artifact, read_manifest(artifact), base_directory)


def test_what_truncation_costs_is_reported(source: Source, tmp_path: Path) -> None:
    """The divergence from the exact fold grows as the rank falls; without truncation fp32 has none."""
    moved = []
    for fraction in (1.0, 0.4, 0.1):
        artifact = export_artifact(source, tmp_path / str(fraction), structure=Structure(rank_fraction=fraction))
        moved.append((read_manifest(artifact).format_cost or {})["kl_mean"])
    assert moved[0] < 1e-9
    assert moved[0] < moved[1] < moved[2]


def test_stored_factors_stand_for_their_product(source: Source, basis: Basis, tmp_path: Path) -> None:
    """Read back, a factored projection is the matrix the graph computes with."""
    structure = Structure(rank_fraction=0.25)
    artifact = export_artifact(source, tmp_path / "a", structure=structure, basis=basis)
    stored = StoredWeights(artifact / DATA_FILE, plan_layout(source.config, structure))
    first_RN, second_MR = FoldedTensors(source.tensors, {}, basis).factors(UP, rank=8)
    assert torch.equal(stored[UP], second_MR @ first_RN)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_candidates_are_the_export_of_the_experts(
    base_directory: Path, source: Source, basis: Basis, experts: list[Expert], tmp_path: Path, structure: Structure
) -> None:
    """A candidate's factors are the ones that an export of its mixture stores, bit for bit."""
    sessions = CandidateSessions(base_directory, basis, experts, num_threads=1)
    artifact = export_artifact(source, tmp_path / "a", experts=experts, alpha=ALPHA, structure=structure, basis=basis)
    content = (artifact / DATA_FILE).read_bytes()
    layout = plan_layout(source.config, structure)
    encoded = sessions.encoded(ALPHA, structure)
    for weight in layout.weights:
        for item in weight.initializers if weight.factors else ():
            shipped = content[item.offset_bytes : item.offset_bytes + item.num_bytes]
            assert encoded[item.offset_bytes].tobytes() == shipped
    live, fresh = sessions.open(ALPHA, structure), DecoderSession.open(artifact, num_threads=1)
    difference = np.abs(live.prefill(IDS)[0] - fresh.prefill(IDS)[0]).max()
    assert difference < (1e-4 if structure.weight_format == "fp32" else 1.0)
    assert not np.array_equal(live.prefill(IDS)[0], sessions.open((0.0, 0.0), structure).prefill(IDS)[0])


@pytest.mark.parametrize("kind", ["text", "vision", "untied", "odd-sizes", "qwen2"])
@pytest.mark.parametrize(
    "structure",
    [
        Structure("int4", "fp32", 16, False, compute="fp32"),
        Structure("int4", "fp32", 64, False, "hqq", compute="fp32"),
        Structure("int4", "fp32", 64, False, "hqq"),
        Structure("int4", "fp16", 32, False, "k_quant"),
        Structure("int8", "fp32", 256, False, "k_quant"),
        Structure("int8", "fp32", 32, compute="fp32"),
        Structure("int4", "fp32", 128, compute="fp32"),
        Structure("int4", "fp32", 128),
    ],
    ids=str,
)
def test_every_block_format_agrees_with_torch(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, kind: str, structure: Structure
) -> None:
    """Zero points, block sizes and quantizers: tables read by row and multiplied by, exact where computed in fp32."""
    artifact = export_artifact(source_with(configs[kind]), tmp_path / "a", structure=structure)
    manifest = read_manifest(artifact)
    assert Structure.from_fields(manifest.structure) == structure
    worst = max(case["error"] for case in manifest.parity["cases"])
    least, most = {"fp32-fp32": (0, 1e-5), "fp16-fp32": (0, 5e-3), "fp32-int8": (1e-4, 0.1)}[
        f"{structure.activation_dtype}-{structure.compute}"
    ]
    assert least < worst < most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantizer", "hqq"), "hqq chooses zero points: ask for asymmetric blocks as well"),
        (("--weights", "fp16", "--block-size", "64"), "fp16 weights have no blocks: leave out block size 64"),
        (("--rank", "1.5"), "the share of the rank to keep must be above 0 and at most 1, not 1.5"),
        (("--rank", "0.5", "--to", "hf"), "--to hf stores whole fp32 or fp16 weights, not"),
    ],
)
def test_the_command_refuses_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    """What does not fit together is one line and exit 2, before the base is even looked for."""
    weights = () if "--weights" in options or "--rank" in options else ("--weights", "int4")
    assert cli.main(["export", "nowhere", *weights, *options, "--out", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_command_says_what_it_wrote(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary names blocks, quantizer and rank, and how many projections became two factors."""
    options = "--weights int4 --block-size 16 --asymmetric --quantizer k-quant --rank 0.4".split()
    assert cli.main(["export", str(base_directory), *options, "--out", str(tmp_path / "a"), "--quiet"]) == 0
    described = "int4 weights (asymmetric blocks of 16, k_quant), fp32 activations computed in int8, 0.4 of the rank"
    assert f"{described}, 14 of 14 projections as two factors" in capsys.readouterr().out
    assert Structure.from_fields(read_manifest(tmp_path / "a").structure) == Structure(
        "int4", "fp32", 16, False, "k_quant", 0.4
    )


def test_deltas_of_no_matrix_are_refused() -> None:
    """How many, and the first by name."""
    deltas = {name: torch.ones(2) for name in ("b", "a", "known")}
    with pytest.raises(HavocError, match="^2 deltas .*first is a$"):
        FoldedTensors({"known": torch.ones(2, 2)}, deltas)


def test_what_is_not_changed_is_the_bases_own() -> None:
    """A delta of zeros leaves the tensor in its own dtype; float64 becomes float32."""
    tensors = {"half": torch.ones(3, 2, dtype=torch.float16), "wide": torch.ones(3, 2, dtype=torch.float64)}
    folded = FoldedTensors(tensors, {"half": torch.zeros(2), "wide": torch.zeros(2)})
    assert folded["half"].dtype == torch.float16
    assert folded["wide"].dtype == torch.float32
    assert (list(folded), len(folded)) == (["half", "wide"], 2)
    assert FoldedTensors(tensors, {"half": torch.ones(2)})["half"].dtype == torch.float32


def test_a_basis_that_is_given_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A basis takes seconds a matrix at full size."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    basis = Basis(matrices={"m": matrix_basis(weight)}, base_hash="")
    monkeypatch.setattr(fold, "matrix_basis", None)
    assert not torch.equal(FoldedTensors({"m": weight}, {"m": torch.ones(4)}, basis)["m"], weight)
