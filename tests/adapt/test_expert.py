"""An expert file gives back what was saved, only on its own base, and survives nothing that was done to it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from havoc_core.adapt.basis import Basis, compute_basis
from havoc_core.adapt.commands import show_expert
from havoc_core.adapt.expert import Expert, expert_path, load_expert, load_experts, lora_ratio, save_expert
from havoc_core.adapt.tensor_file import digest_of
from havoc_core.errors import HavocError

NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
BASE, OTHER_BASE = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def basis() -> Basis:
    generator = torch.Generator().manual_seed(0)
    tensors = {NAME: torch.randn(6, 4, generator=generator), OTHER: torch.randn(4, 6, generator=generator)}
    return compute_basis(tensors, base_hash=BASE)


def make_expert(basis: Basis, domain: str = "math", seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return Expert(
        domain=domain,
        deltas={name: 0.1 * torch.randn(4, generator=generator) for name in basis.matrices},
        base_hash=basis.base_hash,
        basis_hash=basis.hash,
        settings={"learning_rate": 2e-3, "steps": 30, "note": "Größe \n ✓"},
        seed=7,
        score={"num_right": 870, "num_rows": 1000, "low": 0.848, "high": 0.89},
    )


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: str | None) -> None:
    """Write the file again with changed tensors or metadata, its digest right: what a hostile writer would do."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = kept if tensors is None else tensors
    metadata |= {"tensors_sha256": digest_of(tensors)}
    metadata = {name: value for name, value in (metadata | changes).items() if value is not None}
    save_file(tensors, path, metadata=metadata)


def refusal(path: Path, **expected: object) -> str:
    """The one line that loading `path` ends with."""
    with pytest.raises(HavocError) as caught:
        load_expert(path, **expected)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    assert str(path) in line
    return line


def test_round_trip_is_exact(tmp_path: Path, basis: Basis) -> None:
    """Vectors come back bit for bit, and every field with them."""
    expert = make_expert(basis)
    path = save_expert(expert, tmp_path)
    assert path.name == "z_vectors_math.safetensors"
    loaded = load_expert(path, base_hash=BASE, basis_hash=basis.hash, basis=basis)
    assert loaded.hash == expert.hash
    assert all(torch.equal(loaded.deltas[name], delta) for name, delta in expert.deltas.items())
    assert replace(loaded, deltas={}) == replace(expert, deltas={})
    assert loaded.num_parameters == 8


def test_lora_trains_32_times_as_many_numbers_on_square_matrices() -> None:
    """Against the matrices that LoRA adds, A [16, N] and B [M, 16], counted: seed 003's factor where M = N."""
    weights = {"a": torch.zeros(64, 64), "b": torch.zeros(96, 32)}
    expert = Expert(
        domain="math", deltas={"a": torch.zeros(64), "b": torch.zeros(32)}, base_hash="", basis_hash="", seed=0
    )
    added = sum(
        torch.zeros(16, weight.shape[1]).numel() + torch.zeros(weight.shape[0], 16).numel()
        for weight in weights.values()
    )
    assert lora_ratio(expert, weights) == added / (64 + 32)
    square = replace(expert, deltas={"a": torch.zeros(64)})
    assert lora_ratio(square, weights) == 32


def test_same_expert_is_the_same_file(tmp_path: Path, basis: Basis) -> None:
    """Saving twice gives the same bytes, so its hash can stand in a manifest."""
    first = save_expert(make_expert(basis), tmp_path / "a").read_bytes()
    assert save_expert(make_expert(basis), tmp_path / "b").read_bytes() == first


def test_experts_are_loaded_in_the_order_of_alpha(tmp_path: Path, basis: Basis) -> None:
    """The order is the caller's, not the directory's."""
    for seed, domain in enumerate(("math", "code", "vision")):
        save_expert(make_expert(basis, domain, seed), tmp_path)
    experts = load_experts(tmp_path, ["vision", "math", "code"], basis=basis)
    assert [expert.domain for expert in experts] == ["vision", "math", "code"]
    with pytest.raises(HavocError, match="no such file"):
        load_experts(tmp_path, ["reasoning"])


def test_a_renamed_expert_is_not_taken_for_another(tmp_path: Path, basis: Basis) -> None:
    """A math expert under the code expert's name would be mixed with the wrong weight."""
    save_expert(make_expert(basis), tmp_path).rename(expert_path(tmp_path, "code"))
    with pytest.raises(HavocError, match="was trained for 'math'"):
        load_experts(tmp_path, ["code"])


def test_another_base_or_basis_is_refused_with_both_hashes(tmp_path: Path, basis: Basis) -> None:
    """The line shows which base the expert wants and which one this is."""
    path = save_expert(make_expert(basis), tmp_path)
    line = refusal(path, base_hash=OTHER_BASE)
    assert "aaaaaaaaaaaa" in line
    assert "bbbbbbbbbbbb" in line
    assert basis.hash[:12] in refusal(path, basis_hash="c" * 64)
    refusal(path, basis=Basis(matrices=basis.matrices, base_hash=OTHER_BASE))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no vectors"),
        ({NAME: torch.zeros(4), "extra.weight": torch.zeros(4)}, "not an adapted matrix"),
        ({NAME: torch.zeros(5)}, "5 values, the basis 4"),
        ({NAME: torch.zeros(2, 2)}, "one float32 vector"),
        ({NAME: torch.zeros(4, dtype=torch.float16)}, "one float32 vector"),
        ({NAME: torch.zeros(4, dtype=torch.int64)}, "one float32 vector"),
        ({NAME: torch.tensor([0.0, float("nan"), 0.0, 0.0])}, "NaN or Inf"),
        ({NAME: torch.tensor([0.0, float("-inf"), 0.0, 0.0])}, "NaN or Inf"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    tmp_path: Path, basis: Basis, tensors: dict[str, torch.Tensor], message: str
) -> None:
    """Extra keys, wrong lengths, shapes and dtypes, and numbers that are not finite."""
    path = save_expert(make_expert(basis), tmp_path)
    rewrite(path, tensors)
    assert message in refusal(path, basis=basis)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "havoc-expert/9"},
        {"format": None},
        {"tensors_sha256": "0" * 64},
        {"tensors_sha256": None},
        {"formula": "sigmoid"},
        {"domain": "../../etc/passwd"},
        {"domain": None},
        {"settings": "{not json"},
        {"settings": "[" * 200_000},
        {"score": None},
        {"seed": "seven"},
        {"base_hash": None},
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, basis: Basis, changes: dict[str, str | None]) -> None:
    """A missing or nonsensical entry is one line, whatever it is."""
    path = save_expert(make_expert(basis), tmp_path)
    rewrite(path, None, **changes)
    refusal(path)


def test_hostile_headers_are_refused(tmp_path: Path) -> None:
    """A header longer than the file, larger than any file, overlapping or not JSON ends in one line, fast."""
    path = expert_path(tmp_path, "math")
    overlapping = {
        NAME: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        OTHER: {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
    }
    huge = {NAME: {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}
    for header in (json.dumps(overlapping), json.dumps(huge), "[" * 100_000, "nonsense", "\udcff"):
        data = header.encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(24))
        refusal(path)
    for length in (1 << 63, (1 << 64) - 1, 200_000_000, 1000):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refusal(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line(tmp_path: Path, basis: Basis, data: st.DataObject) -> None:
    """Whatever byte is changed, cut or added, loading gives back the saved vectors or one HavocError."""
    expert = make_expert(basis)
    path = save_expert(expert, tmp_path)
    whole = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
    position = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        whole[position] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del whole[position:]
    else:
        whole[position:position] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(whole)
    try:
        loaded = load_expert(path, basis=basis)
    except HavocError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.hash == expert.hash


def test_nothing_unfit_is_written(tmp_path: Path, basis: Basis) -> None:
    """NaN, no vectors, settings that are not JSON, and a path for a domain are refused before a file exists."""
    expert = make_expert(basis)
    for bad in (
        replace(expert, deltas={NAME: torch.tensor([float("nan")])}),
        replace(expert, deltas={}),
        replace(expert, settings={"lr": float("nan")}),
        replace(expert, settings={"path": Path("x")}),
        replace(expert, domain="../math"),
    ):
        with pytest.raises(HavocError):
            save_expert(bad, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_is_told_with_where_it_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    """In the document of `havoc train --json`; a file of an older program does not say."""
    for made_on in ({"device": "cuda", "name": "a card"}, None):
        about = {"method": "reinforce", "made_on": made_on}
        expert = Expert(domain="math", deltas={}, base_hash="", basis_hash="", settings=about, score={"step": 1})
        show_expert(expert, Path("z.safetensors"), 1.0, as_json=True)
        assert json.loads(capsys.readouterr().out)["made_on"] == made_on
