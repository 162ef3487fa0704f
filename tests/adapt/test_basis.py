"""A basis is orthonormal, says what it is, survives the disk, and does not depend on who computed it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from havoc_core.adapt.basis import TARGETS, Basis, cached_basis, compute_basis, is_target, matrix_basis
from havoc_core.adapt.svf import fold_matrix
from havoc_core.errors import HavocError
from havoc_core.model.config import HavocConfig
from havoc_core.model.transformer import HavocModel

NAME = "model.layers.0.mlp.up_proj.weight"


def weight(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_basis(base_hash: str = "a" * 64) -> Basis:
    return compute_basis({NAME: weight(6, 4), NAME.replace("up", "down"): weight(4, 6)}, base_hash=base_hash)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99))
def test_factor_diagonalises_the_matrix(rows: int, columns: int, seed: int) -> None:
    """For tall, wide and square matrices the factor is orthonormal and its singular values are those of the SVD."""
    exact = weight(rows, columns, seed, torch.float64)
    basis = matrix_basis(exact, dtype=torch.float64)
    identity = torch.eye(min(rows, columns), dtype=torch.float64)
    torch.testing.assert_close(basis.factor.T @ basis.factor, identity, atol=1e-12, rtol=0)
    reference = torch.linalg.svdvals(exact)
    torch.testing.assert_close(basis.singular_values, reference, atol=1e-7 * float(reference[0]), rtol=1e-9)
    products = exact @ basis.factor if basis.side == "right" else exact.T @ basis.factor
    torch.testing.assert_close(products.norm(dim=0), reference, atol=1e-7 * float(reference[0]), rtol=1e-9)
    assert basis.side == ("right" if rows >= columns else "left")
    assert bool((basis.singular_values.diff() <= 0).all())


def test_half_the_storage_of_an_svd() -> None:
    """One factor is stored instead of two."""
    basis, (u, _, vt) = matrix_basis(weight(32, 32)), torch.linalg.svd(weight(32, 32))
    assert basis.factor.nbytes * 2 == u.nbytes + vt.nbytes


def test_any_computer_gets_the_same_fold() -> None:
    """z trained on one basis folds to the same weights through another method's: here, a float64 SVD."""
    exact = weight(96, 64) @ torch.diag(torch.logspace(0, -3, 64))
    delta = 0.3 * weight(1, 64, 1)[0]
    ours = matrix_basis(exact)
    _, _, vt = torch.linalg.svd(exact.double(), full_matrices=False)
    folded = fold_matrix(exact, ours.factor, ours.side, delta)
    theirs = fold_matrix(exact, vt.T.float(), "right", delta)
    assert float((folded - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_rank_deficient_and_zero_matrices_have_a_basis(seed: int) -> None:
    """Zero singular values are no obstacle: there z has nothing to scale."""
    exact = weight(8, 2, seed) @ weight(2, 6, seed + 9)
    basis = matrix_basis(exact)
    assert float(basis.singular_values[2:].max()) < 1e-3
    folded = fold_matrix(exact, basis.factor, basis.side, torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(folded, exact, atol=1e-5, rtol=0)
    assert matrix_basis(torch.zeros(4, 3)).factor.isfinite().all()


def test_targets_are_named_by_module() -> None:
    """Every projection of a decoder is adapted by default; embedding, norms and head are not."""
    model = HavocModel(HavocConfig.pico())
    basis = compute_basis(model.named_tensors())
    assert len(basis.matrices) == 7 * model.config.num_layers
    assert is_target("vision.projection.weight", ("vision.projection",))
    assert not is_target("vision.projection.weight")
    assert not is_target("model.layers.0.mlp.myup_proj.weight")
    only = compute_basis(model.named_tensors(), targets=("q_proj",))
    assert {name.split(".")[-2] for name in only.matrices} == {"q_proj"}
    assert set(TARGETS) >= {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": torch.ones(3)}, "none of the 1 tensors"),
        ({NAME: torch.ones(3)}, "only a matrix"),
        ({NAME: torch.tensor([[1.0, float("nan")]])}, "NaN or Inf"),
        ({NAME: torch.tensor([[1.0, float("inf")]])}, "NaN or Inf"),
    ],
)
def test_what_has_no_basis_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    """No target, no matrix, no finite numbers: one line says which."""
    with pytest.raises(HavocError, match=message):
        compute_basis(tensors)


def test_hash_names_the_base_not_the_rounding() -> None:
    """The hash changes with base, names and sizes, and not with the last bit of a factor."""
    basis = small_basis()
    nudged = {
        name: type(matrix)(factor=matrix.factor * (1 + 1e-7), singular_values=matrix.singular_values, side=matrix.side)
        for name, matrix in basis.matrices.items()
    }
    assert Basis(matrices=nudged, base_hash=basis.base_hash).hash == basis.hash
    assert small_basis("b" * 64).hash != basis.hash
    assert Basis(matrices={NAME: basis.matrices[NAME]}, base_hash=basis.base_hash).hash != basis.hash


def test_save_and_load_are_exact(tmp_path: Path) -> None:
    """What is loaded is what was saved, bit for bit, with its hash."""
    basis = small_basis()
    basis.save(tmp_path / "basis.safetensors")
    loaded = Basis.load(tmp_path / "basis.safetensors")
    assert loaded.hash == basis.hash
    assert loaded.num_directions() == {NAME: 4, NAME.replace("up", "down"): 4}
    for name, matrix in basis.matrices.items():
        assert torch.equal(loaded.matrices[name].factor, matrix.factor)
        assert torch.equal(loaded.matrices[name].singular_values, matrix.singular_values)
        assert loaded.matrices[name].side == matrix.side


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "directory", "foreign"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    """A file that is not a whole basis of this version ends in a HavocError that names it."""
    path = tmp_path / "basis.safetensors"
    small_basis().save(path)
    data = path.read_bytes()
    path.unlink()
    match damage:
        case "truncated":
            path.write_bytes(data[:-5])
        case "flipped":
            path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "empty":
            path.write_bytes(b"")
        case "directory":
            path.mkdir()
        case "foreign":
            save_file({"a": torch.ones(2)}, path)
    with pytest.raises(HavocError) as caught:
        Basis.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cache_belongs_to_one_base(tmp_path: Path) -> None:
    """The cache is read for its own base and targets, and replaced for another."""
    path, tensors = tmp_path / "basis.safetensors", {NAME: weight(6, 4)}
    first = cached_basis(path, tensors, base_hash="a" * 64)
    written = path.stat().st_mtime_ns
    again = cached_basis(path, tensors, base_hash="a" * 64)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(again.matrices[NAME].factor, first.matrices[NAME].factor)
    other = cached_basis(path, {NAME: weight(6, 4, 5)}, base_hash="b" * 64)
    assert Basis.load(path).base_hash == other.base_hash == "b" * 64
    wider = {NAME: weight(6, 4, 5), NAME.replace("up", "gate"): weight(6, 4, 6)}
    assert set(cached_basis(path, wider, base_hash="b" * 64).matrices) == set(wider)


def test_damaged_cache_is_replaced_with_a_warning(tmp_path: Path) -> None:
    """A broken cache costs time, never the run, and is not swallowed."""
    path = tmp_path / "basis.safetensors"
    path.write_bytes(b"not a basis")
    with pytest.warns(UserWarning, match="computed again"):
        cached_basis(path, {NAME: weight(6, 4)}, base_hash="a" * 64)
    assert NAME in Basis.load(path).matrices
    assert set(load_file(path)) == {NAME + ".factor", NAME + ".singular_values"}
