"""KL(policy || base) where a method predicts, summed over the whole vocabulary; the base is read once per row.

Only what the head reads is kept of the base, D numbers a place instead of V, because experts leave the head as it is.
A row is read by itself, not in the batch it happens to share, so its reference does not depend on when it was read.

Legend: P predicting places, D model, V vocabulary, B rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .branches import Branched, Layout, hidden_at_places, lay_out, log_probabilities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.transformer import HavocModel
    from .svf import SingularValueAdapter

_MAX_KEPT_BYTES = 1_000_000_000


class BaseReference:
    """What the base's head reads at the places of each row, kept by the row's number while there is room."""

    def __init__(self, model: HavocModel, adapter: SingularValueAdapter, *, pad_id: int) -> None:
        """Read nothing yet."""
        self._model, self._adapter, self._pad_id = model, adapter, pad_id
        self._kept: dict[int, Tensor] = {}
        self._num_bytes = 0

    @torch.no_grad()
    def log_probabilities(self, indices: Sequence[int], rows: Sequence[Branched]) -> Tensor:
        """Log-probabilities of the base at the places of `rows`, one row after the other, float32 [P, V]."""
        hidden = [self._hidden(index, row) for index, row in zip(indices, rows, strict=True)]
        return log_probabilities(self._model, torch.cat(hidden))

    def _hidden(self, index: int, row: Branched) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        with self._adapter.disabled():
            hidden_PD = hidden_at_places(self._model, lay_out([row], pad_id=self._pad_id))
        if self._num_bytes + hidden_PD.nbytes <= _MAX_KEPT_BYTES:
            self._kept[index] = hidden_PD
            self._num_bytes += hidden_PD.nbytes
        return hidden_PD


def mean_kl(log_p_PV: Tensor, log_base_PV: Tensor, layout: Layout) -> Tensor:
    """KL(policy || base) in nats, mean over the places of each row: [B]."""
    kl_P = (log_p_PV.exp() * (log_p_PV - log_base_PV)).sum(dim=1)
    num_rows = len(layout.ids_BT)
    total_B = kl_P.new_zeros(num_rows).index_add(0, layout.row_of_P, kl_P)
    return total_B / torch.bincount(layout.row_of_P, minlength=num_rows)
