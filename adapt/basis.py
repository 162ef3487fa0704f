"""The basis of a base checkpoint: one orthogonal factor and the singular values of each adapted matrix, cached on disk.

An expert scales singular values, W' = U diag(s z) V^T. Because W V = U diag(s), that is W + W V diag(z - 1) V^T, so one
factor is enough: V if the matrix has at least as many rows as columns, else U. It comes from the eigendecomposition of
the smaller Gram matrix in float64, which costs less than an SVD and takes half the storage. It is accurate enough (the
squared condition number reduces the precision of float64, not that of the stored float32) that two machines get the
same basis up to float32 rounding. So a z vector stays valid if the basis is computed again on another machine.

S smaller side, R directions (R <= S)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import HavocError
from ..progress import SILENT, Progress
from ..storage import sha256_json
from .tensor_file import read_tensor_file, write_tensor_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ..model.checkpoint import Base

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules adapted by default: every linear layer but the embedding and the head."""

Side = Literal["right", "left"]

_FORMAT = "havoc-basis/1"
_KIND = "gram-eigh-float64/1"
_FACTOR, _SINGULAR_VALUES = ".factor", ".singular_values"


@dataclass(frozen=True, kw_only=True)
class MatrixBasis:
    """The basis of one matrix: `factor` [S, R] fp32 with orthonormal columns, `singular_values` [R] fp32, falling.

    `side` "right" means rows >= columns and the factor holds right singular vectors; "left" the opposite. The largest
    component of each vector is positive.
    """

    factor: Tensor
    singular_values: Tensor
    side: Side

    @property
    def num_directions(self) -> int:
        """R, the length of this matrix's z vector."""
        return int(self.singular_values.numel())


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The basis of a base: one `MatrixBasis` per adapted matrix, by Hugging Face tensor name."""

    matrices: Mapping[str, MatrixBasis]
    base_hash: str

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the basis's description: base hash, method, and each matrix's name, side and size.

        It is not a hash of the bytes: another CPU or thread count rounds the last bit differently, but z vectors stay
        valid.
        """
        sizes = {name: [basis.side, *basis.factor.shape] for name, basis in self.matrices.items()}
        return sha256_json({"base_hash": self.base_hash, "kind": _KIND, "matrices": sizes})

    def num_directions(self) -> dict[str, int]:
        """Length of the z vector of each matrix."""
        return {name: matrix.num_directions for name, matrix in self.matrices.items()}

    def save(self, path: Path) -> None:
        """Write `basis.safetensors` atomically."""
        tensors: dict[str, Tensor] = {}
        for name, matrix in self.matrices.items():
            tensors[name + _FACTOR] = matrix.factor
            tensors[name + _SINGULAR_VALUES] = matrix.singular_values
        sides = ",".join(name for name, matrix in self.matrices.items() if matrix.side == "left")
        metadata = {"format": _FORMAT, "kind": _KIND, "base_hash": self.base_hash, "left": sides}
        write_tensor_file(path, tensors, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Basis:
        """Read a basis; a missing, damaged or inconsistent file is a `HavocError`."""
        tensors, metadata = read_tensor_file(path, format_name=_FORMAT)
        if metadata.get("kind") != _KIND:
            raise HavocError(
                f"{path}: made by method {metadata.get('kind')!r}, this version uses {_KIND!r}; make it again"
            )
        lefts = set(metadata.get("left", "").split(","))
        names = sorted(name.removesuffix(_FACTOR) for name in tensors if name.endswith(_FACTOR))
        if set(tensors) != {name + end for name in names for end in (_FACTOR, _SINGULAR_VALUES)}:
            raise HavocError(f"{path}: each matrix needs a factor and its singular values; make the basis again")
        matrices = {
            name: MatrixBasis(
                factor=tensors[name + _FACTOR],
                singular_values=tensors[name + _SINGULAR_VALUES],
                side="left" if name in lefts else "right",
            )
            for name in names
        }
        for name, matrix in matrices.items():
            _check(matrix, name, path)
        return cls(matrices=matrices, base_hash=metadata.get("base_hash", ""))


def _check(matrix: MatrixBasis, name: str, path: Path) -> None:
    factor, values = matrix.factor, matrix.singular_values
    if factor.ndim != 2 or values.shape != factor.shape[1:] or factor.shape[1] > factor.shape[0]:  # noqa: PLR2004
        raise HavocError(f"{path}: {name} has a factor {list(factor.shape)} and {list(values.shape)} singular values")
    if factor.dtype != torch.float32 or not (factor.isfinite().all() and values.isfinite().all()):
        raise HavocError(f"{path}: {name} is not finite float32; make the basis again")


def is_target(name: str, targets: tuple[str, ...] = TARGETS) -> bool:
    """Whether the tensor `name` is the weight of one of the modules `targets`, as in "…self_attn.q_proj.weight"."""
    return any(f".{name}".endswith(f".{target}.weight") for target in targets)


def compute_basis(
    tensors: Mapping[str, Tensor],
    *,
    targets: tuple[str, ...] = TARGETS,
    base_hash: str = "",
    precision: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float32,
    progress: Progress = SILENT,
) -> Basis:
    """Compute the basis of every matrix of `tensors` (Hugging Face names, [rows, columns]) that `targets` name.

    `tensors` may be lazy: each matrix is read once. The Gram matrix and its eigenvectors are computed in
    `precision` and stored as `dtype`. A target that is not a finite matrix, or no target at all, is a `HavocError`.
    """
    names = [name for name in tensors if is_target(name, targets)]
    if not names:
        raise HavocError(f"none of the {len(tensors)} tensors belongs to a target module ({', '.join(targets)})")
    matrices = {}
    with progress.stage("basis", len(names), unit="matrices") as stage:
        for name in names:
            matrices[name] = matrix_basis(tensors[name], name=name, precision=precision, dtype=dtype)
            stage.advance(note=name)
    return Basis(matrices=matrices, base_hash=base_hash)


def matrix_basis(
    weight: Tensor,
    *,
    name: str = "matrix",
    precision: torch.dtype = torch.float64,
    dtype: torch.dtype = torch.float32,
) -> MatrixBasis:
    """Basis of one matrix [M, N] by `eigh` of its smaller Gram matrix [S, S] in `precision`, stored as `dtype`."""
    if weight.ndim != 2:  # noqa: PLR2004
        raise HavocError(f"{name} has shape {list(weight.shape)}; only a matrix has singular values")
    exact = weight.detach().to(precision)
    side: Side = "right" if weight.shape[0] >= weight.shape[1] else "left"
    gram_SS = exact.T @ exact if side == "right" else exact @ exact.T
    if not gram_SS.isfinite().all():
        raise HavocError(f"{name} holds NaN or Inf (or overflows when squared); the base checkpoint is damaged")
    eigenvalues_R, vectors_SR = _eigh(gram_SS)
    vectors_SR = vectors_SR.to(dtype).flip(1)
    peaks = vectors_SR.gather(0, vectors_SR.abs().argmax(0, keepdim=True))
    return MatrixBasis(
        factor=(vectors_SR * peaks.sign()).contiguous(),
        singular_values=eigenvalues_R.flip(0).clamp(min=0).sqrt().to(dtype),
        side=side,
    )


def _eigh(gram_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [S], rising, and eigenvectors [S, S]; float64 on a CPU by NumPy's LAPACK, the faster there."""
    if gram_SS.device.type != "cpu" or gram_SS.dtype != torch.float64:
        eigenvalues_S, vectors_SS = torch.linalg.eigh(gram_SS)
        return eigenvalues_S, vectors_SS
    found = np.linalg.eigh(gram_SS.numpy())
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)


def cached_basis(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    base_hash: str,
    targets: tuple[str, ...] = TARGETS,
    progress: Progress = SILENT,
) -> Basis:
    """Load the basis at `path` if it belongs to this base and these targets, else compute it and write it there.

    A damaged cache is replaced, with a warning that says what was wrong.
    """
    wanted = {name for name in tensors if is_target(name, targets)}
    for basis in _loadable(path):
        if base_hash and basis.base_hash == base_hash and set(basis.matrices) == wanted:
            return basis
    basis = compute_basis(tensors, targets=targets, base_hash=base_hash, progress=progress)
    basis.save(path)
    return basis


def _loadable(path: Path) -> Iterator[Basis]:
    if not path.exists():
        return
    try:
        yield Basis.load(path)
    except HavocError as error:
        warnings.warn(f"the cached basis is computed again: {error}", stacklevel=3)


def base_basis(base: Base, out: Path, progress: Progress) -> Basis:
    """Return the basis of `base`, from `out`/basis.safetensors if it is there and fits."""
    if base.directory is None:
        raise HavocError("a preset has random weights, so an expert has nothing to scale; give a trained base")
    return cached_basis(
        out / "basis.safetensors",
        base.tensors(),
        base_hash=base.weight_hash,
        progress=progress,
    )
