"""Mix experts: alpha, one weight per expert, and the rule that makes one z per matrix out of K.

    delta    z = 1 + sum_k alpha_k (z_k - 1)   the default: alpha = 0 is the base, the norm of the weights is kept
    literal  z = sum_k alpha_k z_k             as seed 003 writes it: every z_k is near 1, so it multiplies all weights
                                               by about sum(alpha), 4.4 for the seed's mixture [1.2, 0.8, 1.5, 0.9]
    renorm   z = c sum_k alpha_k z_k           Transformer-Squared's released code: c = sum_i s_i / sum_i,k s_i alpha_k
                                               z_ki keeps the sum of singular values; only ratios of alpha matter

All three are linear in dense weights up to the scalar c, so a mixture is one weighted sum of K dense deltas
D_k = W'(z_k) - W: bound by memory bandwidth, where recomputing U diag(z) V^T is bound by arithmetic (`DenseMixture`).

M rows, N columns, R directions, K experts, E elements of all adapted matrices together
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch
from torch import Tensor

from ..errors import HavocError
from .svf import fold_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .basis import Basis, MatrixBasis
    from .expert import Expert

MixingRule = Literal["delta", "literal", "renorm"]
MIXING_RULES: Final[tuple[MixingRule, ...]] = get_args(MixingRule)

_SMALLEST_NORM_SHARE = 1e-6
_PIECE_VALUES = 1 << 20


def mix(
    experts: Sequence[Expert],
    alpha: Sequence[float],
    *,
    rule: MixingRule = "delta",
    singular_values: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the mixture's delta = z - 1 [R] for every matrix that any expert adapts; computed in float64, fp32 out.

    An expert without a matrix counts there as z_k = 1. `renorm` needs `singular_values` [R] by name. `HavocError` is
    raised for experts of different bases, a wrong number of weights, a weight that is not finite, or (renorm) a mixture
    whose singular values sum to 0, which nothing can rescale.
    """
    _check(experts, alpha, rule)
    deltas = {}
    for name in dict.fromkeys(name for expert in experts for name in expert.deltas):
        constant, weighted = _parts(experts, alpha, name)
        values = singular_values.get(name) if singular_values is not None else None
        scale = _scale(rule, constant + weighted, values, name)
        z_minus_1 = weighted if rule == "delta" else scale * weighted + (scale * constant - 1)
        deltas[name] = z_minus_1.float()
    return deltas


def _check(experts: Sequence[Expert], alpha: Sequence[float], rule: str) -> None:
    if rule not in MIXING_RULES:
        raise HavocError(f"mixing rule {rule!r} is not known; choose one of {', '.join(MIXING_RULES)}")
    if not experts:
        raise HavocError("a mixture needs at least one expert")
    if len(alpha) != len(experts):
        domains = ", ".join(expert.domain for expert in experts)
        raise HavocError(f"alpha has {len(alpha)} weights for {len(experts)} experts ({domains})")
    if not all(math.isfinite(weight) for weight in alpha):
        raise HavocError(f"alpha {list(alpha)} holds a weight that is not finite")
    if not math.isfinite(sum(map(abs, alpha))):
        raise HavocError(f"alpha {list(alpha)} sums to more than a number can hold; choose smaller weights")
    origins = {(expert.base_hash, expert.basis_hash) for expert in experts}
    if len(origins) > 1:
        raise HavocError(f"the experts come from {len(origins)} different bases or basis files and cannot be mixed")


def _parts(experts: Sequence[Expert], alpha: Sequence[float], name: str) -> tuple[float, Tensor]:
    """Return sum_k alpha_k and sum_k alpha_k delta_k [R] in float64: sum_k alpha_k z_k is their sum."""
    pairs = [
        (weight, expert.deltas[name]) for weight, expert in zip(alpha, experts, strict=True) if name in expert.deltas
    ]
    if len({delta.shape for _, delta in pairs}) > 1:
        raise HavocError(f"{name}: the experts' vectors differ in length")
    return math.fsum(alpha), torch.stack([weight * delta.double() for weight, delta in pairs]).sum(0)


def _scale(rule: MixingRule, z: Tensor, singular_values: Tensor | None, name: str) -> float:
    """Return c: 1, or under `renorm` what keeps the sum of the signed singular values."""
    if rule != "renorm":
        return 1.0
    if singular_values is None:
        raise HavocError(f"{name}: the rule renorm needs the singular values of the basis")
    exact = singular_values.double()
    total, mixed = float(exact.sum()), float((exact * z).sum())
    if abs(mixed) <= _SMALLEST_NORM_SHARE * total:
        raise HavocError(f"{name}: the mixture's singular values sum to {mixed:.3g} of {total:.3g}; renorm needs more")
    return total / mixed


def mixed_singular_values(matrix: MatrixBasis, delta: Tensor) -> Tensor:
    """Singular values |s_i z_i| [R] of the folded matrix, in the order of the basis's directions (not sorted)."""
    return (matrix.singular_values * (1 + delta)).abs()


def low_rank_factors(weight: Tensor, matrix: MatrixBasis, delta: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors (A [M, rank], B [rank, N]) of the folded matrix, A B near W', at the price of a slice.

    The folded matrix has the basis's own singular vectors, so the best approximation (Eckart-Young) keeps the
    directions of the largest |s_i z_i|; no decomposition is computed.
    """
    num_directions = matrix.num_directions
    if not 1 <= rank <= num_directions:
        raise HavocError(f"rank {rank} is outside 1..{num_directions}")
    kept = mixed_singular_values(matrix, delta).topk(rank).indices.sort().values
    few_SR = matrix.factor[:, kept].to(weight.dtype)
    z_R = (1 + delta[kept]).to(weight.dtype)
    if matrix.side == "right":
        return (weight @ few_SR) * z_R, few_SR.T.contiguous()
    return few_SR * z_R, few_SR.T @ weight


class DenseMixture:
    """Fold any alpha by one weighted sum over dense deltas, into tensors that are allocated once.

    Per matrix it holds K + 1 rows (the base, then each expert's dense delta) as one array [K + 1, M N] and one output.
    A fold is one matrix-vector product over that array: every number is read once, and there is no temporary.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        basis: Basis,
        experts: Sequence[Expert],
        *,
        rule: MixingRule = "delta",
    ) -> None:
        """Compute the dense delta of every expert once; `tensors` gives the base weights [M, N] by name."""
        _check(experts, [0.0] * len(experts), rule)
        self._experts, self._rule = tuple(experts), rule
        names = list(dict.fromkeys(name for expert in experts for name in expert.deltas))
        missing = [name for name in names if name not in basis.matrices]
        if missing:
            raise HavocError(f"{len(missing)} matrices of the experts are not in the basis, the first is {missing[0]}")
        self._singular_values = {name: basis.matrices[name].singular_values for name in names}
        self._rows = {name: _dense_rows(tensors[name], basis.matrices[name], experts, name) for name in names}
        self._folded = {name: torch.empty(tensors[name].shape) for name in names}

    @property
    def num_bytes(self) -> int:
        """Memory held: K + 2 copies of the adapted weights."""
        return sum(tensor.nbytes for tensor in (*self._rows.values(), *self._folded.values()))

    @torch.no_grad()
    def fold(self, alpha: Sequence[float]) -> dict[str, Tensor]:
        """Return W' [M, N] fp32 by name; the tensors are overwritten by the next call.

        Where alpha changes nothing (rule delta, all 0) the base comes back bit for bit.
        """
        _check(self._experts, alpha, self._rule)
        if self._rule == "delta" and not any(alpha):
            for name, rows in self._rows.items():
                self._folded[name].view(-1).copy_(rows[0])
            return dict(self._folded)
        pieces = [piece for name in self._rows for piece in self._pieces(alpha, name)]
        num_threads = torch.get_num_threads()
        own, *others = [pieces[first::num_threads] for first in range(num_threads)]
        with ThreadPoolExecutor(num_threads) as pool:  # BLAS gives a matrix-vector product of this shape one thread
            finished = pool.map(_weighted_sums, others)
            _weighted_sums(own)
            list(finished)
        return dict(self._folded)

    def _pieces(self, alpha: Sequence[float], name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rows [K + 1, n], their coefficients [K + 1] and the result [n] of one matrix, n values at a time."""
        coefficients, folded = self._coefficients(alpha, name), self._folded[name].view(-1)
        for rows, result in zip(self._rows[name].split(_PIECE_VALUES, dim=1), folded.split(_PIECE_VALUES), strict=True):
            yield rows, coefficients, result

    def deltas(self, alpha: Sequence[float]) -> dict[str, Tensor]:
        """The mixture's delta [R] by name, as `mix` computes it."""
        return mix(self._experts, alpha, rule=self._rule, singular_values=self._singular_values)

    def _coefficients(self, alpha: Sequence[float], name: str) -> Tensor:
        """Weights [K + 1] of the base and of each expert's dense delta."""
        if self._rule == "delta":
            return torch.tensor([1.0, *alpha])
        constant, weighted = _parts(self._experts, alpha, name)
        scale = _scale(self._rule, constant + weighted, self._singular_values[name], name)
        return torch.tensor([scale * constant, *(scale * weight for weight in alpha)])


def _weighted_sums(pieces: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for rows, coefficients, result in pieces:
        torch.mv(rows.T, coefficients, out=result)


def _dense_rows(tensor: Tensor, matrix: MatrixBasis, experts: Sequence[Expert], name: str) -> Tensor:
    """Return [K + 1, M N] fp32: the base weight, then W'(delta_k) - W of each expert (0 where it adapts nothing)."""
    weight = tensor.float()
    rows = torch.zeros(1 + len(experts), weight.numel())
    rows[0] = weight.flatten()
    for row, expert in zip(rows[1:], experts, strict=True):
        if name in expert.deltas:
            fold_matrix(weight, matrix.factor, matrix.side, expert.deltas[name], out=row.view_as(weight)).sub_(weight)
    return rows
