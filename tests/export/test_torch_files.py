"""`--to pt` writes files that torch opens without running anything, with the bits of everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from havoc_core.adapt.expert import Expert, load_expert, save_expert
from havoc_core.adapt.svf import compute_basis
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.export.huggingface import export_huggingface
from havoc_core.export.source import Source, open_source
from havoc_core.export.torch_files import export_torch


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("nano")


@pytest.fixture(scope="module")
def experts(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two experts of nano."""
    folder = tmp_path_factory.mktemp("experts")
    basis = compute_basis(source.tensors, base_hash=source.hash)
    for seed, domain in enumerate(("math", "code")):
        draw = torch.Generator().manual_seed(seed)
        deltas = {name: 0.05 * torch.randn(size, generator=draw) for name, size in basis.num_directions().items()}
        save_expert(Expert(domain=domain, deltas=deltas, base_hash=source.hash, basis_hash=basis.hash), folder)
    return folder


def test_torch_opens_them_with_the_same_bits(experts: Path, tmp_path: Path) -> None:
    """Experts are those of the safetensors, the model is that of `--to hf`, weights_only and bit for bit."""
    words = ["export", "nano", "--experts", str(experts), "--alpha", "1.2,0.8", "--quiet"]
    assert main([*words, "--to", "pt", "--out", str(tmp_path / "pt")]) == 0
    assert main([*words, "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert sorted(path.name for path in (tmp_path / "pt").iterdir()) == [
        "mixture.json",
        "svf_adapted_model.pt",
        "z_vectors_code.pt",
        "z_vectors_math.pt",
    ]
    model = torch.load(tmp_path / "pt" / "svf_adapted_model.pt", weights_only=True)
    folded = load_file(tmp_path / "hf" / "model.safetensors")
    assert model.keys() == folded.keys()
    assert all(torch.equal(model[name], folded[name]) and model[name].dtype == torch.float32 for name in folded)
    for domain in ("math", "code"):
        found = torch.load(tmp_path / "pt" / f"z_vectors_{domain}.pt", weights_only=True)
        expert = load_expert(experts / f"z_vectors_{domain}.safetensors")
        assert (found["domain"], found["formula"]) == (domain, "delta")
        assert (found["base_hash"], found["basis_hash"]) == (expert.base_hash, expert.basis_hash)
        assert found["deltas"].keys() == expert.deltas.keys()
        assert all(torch.equal(found["deltas"][name], delta) for name, delta in expert.deltas.items())
    documents = [json.loads((tmp_path / kind / "mixture.json").read_text()) for kind in ("pt", "hf")]
    assert documents[0] == documents[1]


def test_half_of_it(source: Source, tmp_path: Path) -> None:
    """fp16 rounds as `--to hf` does; a base without experts is a model alone."""
    out = export_torch(source, tmp_path / "pt", weight_format="fp16")
    model = torch.load(out / "svf_adapted_model.pt", weights_only=True)
    theirs = load_file(export_huggingface(source, tmp_path / "hf", weight_format="fp16") / "model.safetensors")
    assert all(torch.equal(model[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in out.iterdir()) == ["mixture.json", "svf_adapted_model.pt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int8"], "--to pt stores whole fp32 or fp16 weights"),
        (["--dialect", "contrib"], "--to pt writes weights and no graph"),
        (["--calibration", "x.txt"], "--to pt stores weights as they are"),
    ],
    ids=["int8", "dialect", "calibration"],
)
def test_what_it_cannot_hold_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing configured is ignored silently, and nothing is written."""
    assert main(["export", "nano", "--to", "pt", *words, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neither_an_artifact_nor_a_directory_is_replaced(source: Source, tmp_path: Path) -> None:
    """What another `--to` wrote stays; its own result is written anew."""
    hf = export_huggingface(source, tmp_path / "hf")
    with pytest.raises(HavocError, match="choose another --out"):
        export_torch(source, hf)
    assert (hf / "model.safetensors").exists()
    for _ in range(2):
        export_torch(source, tmp_path / "pt")
