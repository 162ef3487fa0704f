"""Read train rows with policy and base, and keep the values that do not change between steps.

Layers below the first trained one give the same output for every policy, so a row goes through them once. From the base
only the input of the head is kept, D numbers per place instead of V, because experts do not change the head. Kept
values are computed for each row alone, not in a batch, so they do not depend on when the row was read.

Legend: B rows, T tokens, P predicting places, D model, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .branches import Branched, BranchLayout, at_places, embedded, lay_out, log_probabilities, through_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..model.transformer import HavocModel
    from .adapter import Adapter

_MAX_KEPT_BYTES = 1_000_000_000


class _Kept:
    """Tensors by a row's number, as many as there is room for."""

    def __init__(self, compute: Callable[[int, Branched], Tensor]) -> None:
        self._compute = compute
        self._tensors: dict[int, Tensor] = {}
        self._num_bytes = 0

    def of(self, index: int, row: Branched) -> Tensor:
        if index in self._tensors:
            return self._tensors[index]
        tensor = self._compute(index, row)
        if self._num_bytes + tensor.nbytes <= _MAX_KEPT_BYTES:
            self._tensors[index] = tensor
            self._num_bytes += tensor.nbytes
        return tensor


class Reader:
    """Reads rows of a training whose layers beneath `first_layer` are the base's."""

    def __init__(self, model: HavocModel, adapter: Adapter, *, pad_id: int) -> None:
        """Read nothing yet; the first trained layer is the first that the adapter has a matrix of."""
        self._model, self._adapter, self._pad_id = model, adapter, pad_id
        first_layer = min(map(layer_of, adapter.deltas))
        self._lower, self._upper = range(first_layer), range(first_layer, len(model.layers))
        self._beneath = _Kept(self._read_beneath)
        self._base = _Kept(self._read_base)

    def policy(self, indices: Sequence[int], rows: Sequence[Branched]) -> tuple[Tensor, BranchLayout]:
        """Log-probabilities of the policy at the places of `rows`, float32 [P, V], with a gradient; and the layout."""
        layout = lay_out(rows, pad_id=self._pad_id).to(self._model.device)
        x_BTD = through_layers(self._model, self._from_beneath(indices, rows, layout), layout, self._upper)
        return log_probabilities(self._model, at_places(self._model, x_BTD, layout)), layout

    @torch.no_grad()
    def base(self, indices: Sequence[int], rows: Sequence[Branched]) -> Tensor:
        """Log-probabilities of the base at the places of `rows`, one row after the other, float32 [P, V]."""
        hidden = [self._base.of(index, row) for index, row in zip(indices, rows, strict=True)]
        return log_probabilities(self._model, torch.cat(hidden))

    def kl(self, log_p_PV: Tensor, layout: BranchLayout, indices: Sequence[int], rows: Sequence[Branched]) -> Tensor:
        """KL(policy || base) in nats, summed over the vocabulary, mean over the places of each row: [B]."""
        kl_P = (log_p_PV.exp() * (log_p_PV - self.base(indices, rows))).sum(dim=1)
        total_B = kl_P.new_zeros(len(rows)).index_add(0, layout.row_of_P, kl_P)
        return total_B / torch.bincount(layout.row_of_P, minlength=len(rows))

    def _from_beneath(self, indices: Sequence[int], rows: Sequence[Branched], layout: BranchLayout) -> Tensor:
        """The input of the first trained layer, [B, T, D]."""
        if not self._lower:
            return embedded(self._model, layout)
        parts = [self._beneath.of(index, row) for index, row in zip(indices, rows, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    @torch.no_grad()
    def _read_beneath(self, _: int, row: Branched) -> Tensor:
        """The input of the first trained layer for one row, [T, D]."""
        layout = lay_out([row], pad_id=self._pad_id).to(self._model.device)
        return through_layers(self._model, embedded(self._model, layout), layout, self._lower)[0]

    @torch.no_grad()
    def _read_base(self, index: int, row: Branched) -> Tensor:
        """The input of the head in the base at the row's places, [P, D]."""
        layout = lay_out([row], pad_id=self._pad_id).to(self._model.device)
        with self._adapter.disabled():
            x_1TD = through_layers(self._model, self._from_beneath([index], [row], layout), layout, self._upper)
        return at_places(self._model, x_1TD, layout)


def layer_of(name: str) -> int:
    """Number of the layer that a tensor of Hugging Face's name belongs to: model.layers.7.mlp.up_proj.weight is 7."""
    return int(name.split(".layers.")[1].partition(".")[0])
