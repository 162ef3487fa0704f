"""Base tensors with mixed experts folded in, computed when needed, one tensor at a time.

Nothing is kept: for a base of any size, memory has at most one matrix, its basis and its folded copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapt.mixture import low_rank_factors
from ..adapt.svf import fold_matrix, matrix_basis
from ..errors import HavocError

if TYPE_CHECKING:
    from ..adapt.svf import Basis, MatrixBasis


class FoldedTensors(Mapping[str, Tensor]):
    """The tensors of a base with `deltas` folded in, fp32; if a delta is 0, the base's tensor in its own dtype."""

    def __init__(self, tensors: Mapping[str, Tensor], deltas: Mapping[str, Tensor], basis: Basis | None = None) -> None:
        """`deltas` [R] by tensor name; without `basis` each matrix's basis is computed when the matrix is needed."""
        unknown = sorted(set(deltas) - set(tensors))
        if unknown:
            raise HavocError(f"{len(unknown)} deltas have no matrix in this base, the first is {unknown[0]}")
        self._tensors = tensors
        self._deltas = {name: delta for name, delta in deltas.items() if bool(delta.any())}
        self._basis = basis

    def __getitem__(self, name: str) -> Tensor:
        weight = self._tensors[name].detach()
        if weight.dtype == torch.float64:
            weight = weight.to(torch.float32)  # values beyond its range become infinite here and are refused later
        delta = self._deltas.get(name)
        if delta is None:
            return weight
        weight = weight.to(torch.float32)
        matrix = self._matrix_basis(name, weight)
        return fold_matrix(weight, matrix.factor, matrix.side, delta)

    def factors(self, name: str, *, rank: int) -> tuple[Tensor, Tensor]:
        """The folded matrix [M, N] as its best two factors, `in` [rank, N] and `out` [M, rank]: W' is near out @ in."""
        weight = self._tensors[name].detach().to(torch.float32)
        matrix = self._matrix_basis(name, weight)
        delta = self._deltas.get(name, torch.zeros(matrix.num_directions))
        second_MR, first_RN = low_rank_factors(weight, matrix, delta, rank=rank)
        return first_RN, second_MR

    def _matrix_basis(self, name: str, weight: Tensor) -> MatrixBasis:
        return matrix_basis(weight, name=name) if self._basis is None else self._basis.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
