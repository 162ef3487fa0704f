"""Next-token loss on right answers: for tasks whose sampled rewards are almost always 0, where sampling learns nothing.

A step minimises the cross-entropy of the reference completion and its end token, given the prompt, and the KL term:

    L = - sum_n sum_t log pi(y_t | y_<t, x_n) / sum_n T_n
        + beta * 1/N sum_n mean_t KL(pi(. | y_<t, x_n) || base(. | y_<t, x_n))

It teaches the way of answering in the references; the score on the search split, not the loss, chooses the step that is
kept.

Legend: N rows of a step, T_n tokens of row n's reference with its end token.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .branches import Branched, batches, encode_branches, log_likelihoods
from .expected_reward import MAX_TOKENS_OF_A_PASS
from .objectives import Descent, TrainingSettings, rows_of_step
from .reading import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base
    from .adapter import Adapter
    from .tasks.task import Row, Task


class NextToken:
    """The objective of the module docstring, bound to a base, a task and its train rows."""

    def __init__(
        self, base: Base, adapter: Adapter, task: Task, rows: Sequence[Row], settings: TrainingSettings
    ) -> None:
        """Encode every row once."""
        self._settings, self._name = settings, task.name
        self._rows = [reference_of(base, task, row) for row in rows]
        self._reader = Reader(base.model, adapter, pad_id=base.tokenizer.pad_id)

    def descend(self, step: int) -> Descent:
        """Accumulate the gradients of one step over rows that differ from those of the steps before."""
        settings, beta = self._settings, self._settings.optimizer.kl_coefficient
        chosen = rows_of_step(
            len(self._rows), settings.prompts_per_step, seed=f"{settings.seed}:{self._name}", step=step
        )
        num_tokens = sum(len(self._rows[index].branches[0]) for index in chosen)
        total, nats, kl = 0.0, 0.0, 0.0
        for batch in batches([self._rows[index] for index in chosen], max_tokens=MAX_TOKENS_OF_A_PASS):
            indices = [chosen[place] for place in batch]
            rows = [self._rows[index] for index in indices]
            log_p_PV, layout = self._reader.policy(indices, rows)
            loss = -log_likelihoods(log_p_PV, layout).sum() / num_tokens
            nats += loss.item()
            if beta:
                kl_B = self._reader.kl(log_p_PV, layout, indices, rows)
                loss = loss + beta * kl_B.sum() / len(chosen)
                kl += kl_B.detach().sum().item()
            loss.backward()
            total += loss.item()
        return Descent(total, {"nats_per_token": nats, "kl": kl / len(chosen) if beta else None})


def reference_of(base: Base, task: Task, row: Row) -> Branched:
    """Token ids of a row's prompt and of its reference completion, closed by the end token."""
    encoded = encode_branches(base.model, base.tokenizer, task.prompt(row), [task.reference(row)])
    return dataclasses.replace(encoded, branches=[[*encoded.branches[0], base.tokenizer.eos_ids[0]]])
