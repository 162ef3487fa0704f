"""Expected reward of a task of choices and its gradient, exact: nothing is sampled.

A policy that answers by likelihood picks choice c of row n with probability

    p_n(c) = softmax over the row's choices of s_n(c)       s_n(c) = log pi(c | x_n),   or for a metric that divides by
                                                            length: log pi(c | x_n) * mean length / length of c

so the expected reward is the right choice's probability, and a step minimises

    L = - 1/N sum_n log p_n(right)  +  beta * 1/N sum_n mean_t KL(pi(. | x_n, c_<t) || base(. | x_n, c_<t))

The gradient of p_n is what REINFORCE estimates from samples (Williams, 1992), here with its expectation taken over all
choices; the logarithm divides it by p_n, so that rows the policy gets wrong count most (docs/log.md has both). Lengths
are those lm-eval divides by, in characters, scaled so that s stays in nats of a whole choice.

Legend: B rows of a pass, C choices of all its rows, N rows of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .branches import batches, encode_branches, log_likelihoods
from .objectives import Descent, TrainingSettings, rows_of_step
from .reading import Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base
    from .adapter import Adapter
    from .tasks.task import Row, Task

MAX_TOKENS_OF_A_PASS = 1024
"""Tokens of rows that share a pass: more save little on a CPU and take memory, about 0.4 MB a token at width 576."""


class ExpectedReward:
    """The objective of the module docstring, bound to a base, a task and its train rows."""

    def __init__(
        self, base: Base, adapter: Adapter, task: Task, rows: Sequence[Row], settings: TrainingSettings
    ) -> None:
        """Encode every row once."""
        self._settings, self._name = settings, task.name
        self._rows = [encode_branches(base.model, base.tokenizer, task.prompt(row), task.choices(row)) for row in rows]
        self._right = [task.right_choice(row) for row in rows]
        self._lengths = [lengths_of(task, row) for row in rows]
        self._reader = Reader(base.model, adapter, pad_id=base.tokenizer.pad_id)

    def descend(self, step: int) -> Descent:
        """Accumulate the gradients of one step over rows that differ from those of the steps before."""
        settings, beta = self._settings, self._settings.optimizer.kl_coefficient
        chosen = rows_of_step(
            len(self._rows), settings.prompts_per_step, seed=f"{settings.seed}:{self._name}", step=step
        )
        total, reward, kl, num_right = 0.0, 0.0, 0.0, 0
        for batch in batches([self._rows[index] for index in chosen], max_tokens=MAX_TOKENS_OF_A_PASS):
            indices = [chosen[place] for place in batch]
            rows = [self._rows[index] for index in indices]
            log_p_PV, layout = self._reader.policy(indices, rows)
            lengths_C = torch.cat([self._lengths[index] for index in indices]).to(log_p_PV.device)
            scores_C = log_likelihoods(log_p_PV, layout) * lengths_C
            right_B = torch.tensor([self._right[index] for index in indices])
            log_reward_B, is_right_B = log_expected_rewards(scores_C, layout.row_of_C, right_B)
            loss = losses(log_reward_B).sum()
            if beta:
                kl_B = self._reader.kl(log_p_PV, layout, indices, rows)
                loss = loss + beta * kl_B.sum()
                kl += kl_B.detach().sum().item()
            loss = loss / len(chosen)
            loss.backward()
            total += loss.item()
            reward += log_reward_B.detach().exp().sum().item()
            num_right += int(is_right_B.sum())
        figures = {
            "reward": reward / len(chosen),
            "right": num_right / len(chosen),
            "kl": kl / len(chosen) if beta else None,
        }
        return Descent(total, figures)


def losses(log_reward_B: Tensor) -> Tensor:
    """The loss of each row, [B], from the log of its expected reward."""
    return -log_reward_B


def log_expected_rewards(scores_C: Tensor, row_of_C: Tensor, right_B: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's right choice, [B], and whether it is the likeliest, bool [B].

    `scores_C` are the choices' log-likelihoods, row after row; `row_of_C` names their rows, `right_B` the right choice
    within each.
    """
    rows = [scores_C[row_of_C == row] for row in range(len(right_B))]
    pairs = list(zip(rows, right_B, strict=True))
    log_reward_B = torch.stack([torch.log_softmax(scores, dim=0)[right] for scores, right in pairs])
    is_right_B = torch.stack([scores.argmax() == right for scores, right in pairs])
    return log_reward_B, is_right_B


def lengths_of(task: Task, row: Row) -> Tensor:
    """The factor of each choice's log-likelihood, [C]: 1, or mean length over length for acc_norm."""
    choices = task.choices(row)
    if task.metric != "acc_norm":
        return torch.ones(len(choices))
    characters_C = torch.tensor([float(len(choice.strip())) for choice in choices])
    return characters_C.mean() / characters_C
