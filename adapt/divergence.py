"""How far an expert or a mixture has moved from its base: KL(adapted || base) on rows of a task.

At every place that predicts a token of an answer, given the prompt and the answer so far, the KL divergence is summed
over the vocabulary. The figure is its mean over the places of a row, then over the rows, in nats per predicted token.
Answers are the row's choices, else its reference: the same places as in training's KL term. Seed 003 requires less than
1.0: above that the adapted model is another model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from .branches import Branched, batches, encode_branches
from .expected_reward import MAX_TOKENS_OF_A_PASS
from .mixture import mix
from .next_token import reference_of
from .reading import Reader
from .svf import attach

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..model.checkpoint import Base
    from .basis import Basis
    from .expert import Expert
    from .mixture import MixingRule
    from .tasks.task import Row, Task

MAX_TOKENS: Final = 1024
"""Tokens of a task's rows that are read, so that a divergence costs little compared with answers; at least one row."""


def compared_rows(base: Base, task: Task, rows: Sequence[Row]) -> list[Branched]:
    """Return the first of a task's rows, `MAX_TOKENS` tokens of them, with the answers that are compared.

    A prompt that is too long for the base's context loses its beginning, as it does when it is answered.
    """
    kept: list[Branched] = []
    num_tokens = 0
    for row in rows:
        if task.kind == "choice":
            encoded = encode_branches(base.model, base.tokenizer, task.prompt(row), task.choices(row))
        else:
            encoded = reference_of(base, task, row)
        encoded = _fitted(encoded, base.config.max_seq_len)
        num_tokens += encoded.num_tokens
        if kept and num_tokens > MAX_TOKENS:
            break
        kept.append(encoded)
    return kept


def _fitted(row: Branched, max_seq_len: int) -> Branched:
    room = max_seq_len - max(len(branch) for branch in row.branches) + 1
    if row.patches is not None or len(row.prompt_ids) <= room:
        return row
    return dataclasses.replace(row, prompt_ids=row.prompt_ids[-max(room, 1) :])


@torch.no_grad()
def mean_kl(reader: Reader, rows: Sequence[Branched]) -> float:
    """Mean over `rows` of KL(policy || base), nats a predicted token; the base's part of a row is read once."""
    total = 0.0
    for indices in batches(rows, max_tokens=MAX_TOKENS_OF_A_PASS):
        some = [rows[index] for index in indices]
        log_p_PV, layout = reader.policy(indices, some)
        total += float(reader.kl(log_p_PV, layout, indices, some).sum())
    return total / len(rows)


def divergences(
    base: Base,
    basis: Basis,
    experts: Sequence[Expert],
    alphas: Sequence[Sequence[float]],
    rows: Mapping[str, Sequence[Branched]],
    *,
    rule: MixingRule = "delta",
) -> list[dict[str, float]]:
    """KL(mixture || base) of each alpha on each task's rows; `base.model` is given back unchanged.

    Raises `HavocError` for an alpha that cannot be mixed.
    """
    part = _changed_part(basis, experts, rule)
    if not part.matrices:
        return [dict.fromkeys(rows, 0.0) for _ in alphas]
    values = {name: matrix.singular_values for name, matrix in part.matrices.items()} if rule == "renorm" else None
    found = []
    with attach(base.model, part) as adapter:
        readers = {task: Reader(base.model, adapter, pad_id=base.tokenizer.pad_id) for task in rows}
        for alpha in alphas:
            mixed = mix(experts, alpha, rule=rule, singular_values=values)
            adapter.load({name: delta for name, delta in mixed.items() if name in part.matrices})
            found.append({task: mean_kl(readers[task], some) for task, some in rows.items()})
    return found


def _changed_part(basis: Basis, experts: Sequence[Expert], rule: MixingRule) -> Basis:
    """Return the part of the basis with matrices that a mixture of the experts changes; only rule delta keeps some."""
    names = {name for expert in experts for name, delta in expert.deltas.items() if rule != "delta" or delta.any()}
    return dataclasses.replace(
        basis, matrices={name: matrix for name, matrix in basis.matrices.items() if name in names}
    )
