"""How far a training has moved each matrix: the figures of its delta = z - 1, its gradient and its weight.

W' - W = U diag(s delta) V^T, so its singular values are |s delta|: its norm and its effective rank cost no product. The
effective rank is exp(H(p)) with p = |s delta| / sum |s delta| (Roy and Vetterli, EUSIPCO 2007). Matrices with as many
directions are computed together, since each call costs more than its numbers.

K matrices with R directions
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reading import layer_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .basis import Basis

FIGURES = ("norm", "mean", "min", "max", "gradient_norm", "effective_rank", "weight_change")


class DeltaFigures:
    """The figures of the matrices of `deltas`, parameters [R] by tensor name, in `basis`."""

    def __init__(self, basis: Basis, deltas: Mapping[str, torch.nn.Parameter]) -> None:
        """Group the matrices by their number of directions."""
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name, delta in deltas.items():
            names[delta.numel()].append(name)
        self._groups = [
            (group, [deltas[name] for name in group], _singular_values(basis, group, deltas[group[0]]))
            for group in names.values()
        ]

    @torch.no_grad()
    def read(self, *, gradient_scale: float = 1.0) -> dict[str, float | None]:
        """Each figure of each matrix, under "layer/matrix/figure", such as "0/q_proj/norm".

        The gradients are the current ones times `gradient_scale`. None for a missing gradient, and for the effective
        rank of a change that is 0.
        """
        found: dict[str, float | None] = {}
        for names, parameters, singular_values_KR in self._groups:
            delta_KR = torch.stack([parameter.detach() for parameter in parameters])
            rows = _figures(delta_KR, _gradients(parameters) * gradient_scale, singular_values_KR).tolist()
            for name, row in zip(names, rows, strict=True):
                place = f"{layer_of(name)}/{name.split('.')[-2]}"
                found |= {
                    f"{place}/{figure}": value if value == value else None  # noqa: PLR0124 - only NaN differs from itself
                    for figure, value in zip(FIGURES, row, strict=True)
                }
        return found


def _singular_values(basis: Basis, names: Sequence[str], like: Tensor) -> Tensor:
    return torch.stack([basis.matrices[name].singular_values for name in names]).to(like)


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """Gradients [K, R]; NaN for a missing gradient."""
    gradients = [parameter.grad for parameter in parameters]
    return torch.stack(
        [
            torch.full_like(parameter, torch.nan) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def _figures(delta_KR: Tensor, gradient_KR: Tensor, singular_values_KR: Tensor) -> Tensor:
    """`FIGURES` of each matrix, [K, 7]."""
    change_KR = (delta_KR * singular_values_KR).abs()
    share_KR = change_KR / change_KR.sum(dim=1, keepdim=True)
    low_K, high_K = delta_KR.aminmax(dim=1)
    columns = (
        delta_KR.norm(dim=1),
        delta_KR.mean(dim=1),
        low_K,
        high_K,
        gradient_KR.norm(dim=1),
        torch.special.entr(share_KR).sum(dim=1).exp(),
        change_KR.norm(dim=1) / singular_values_KR.norm(dim=1),
    )
    return torch.stack(columns, dim=1)
