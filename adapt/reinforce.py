"""REINFORCE on sampled completions with a verifiable reward and a KL term to the base.

A step samples S completions for each of P prompts from the folded policy, judges them, and minimises

    L = - 1/N sum_n A_n sum_t log pi(y_t | y_<t, x)  +  beta * 1/N sum_n mean_t KL(pi(. | y_<t, x) || base(. | y_<t, x))

with the leave-one-out baseline A_n = r_n - mean of the other S - 1 rewards of the same prompt (RLOO, arXiv 2402.14740),
over the generated token ids with the end token. The KL is summed over the vocabulary at each sampled prefix, which has
the expectation of the single-sample estimate and less variance. Prompts whose rewards are all equal have no policy
gradient; they are left out of the backward pass and counted. If fewer than `signal_prompts` prompts have a gradient,
further prompts are drawn, up to `max_draws` times as many (dynamic sampling, DAPO, arXiv 2503.14476). If every
completion was right, no further prompts are drawn.

Legend: B rows (P prompts x S samples), T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import HavocError
from ..model.generation import completions, encode_prompts, sample_tokens
from .objectives import Descent, TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base
    from .adapter import Adapter
    from .tasks.task import Row, Task

_MIN_ADVANTAGE = 1e-9
"""An advantage below this is rounding: the prompt's rewards are equal."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completions of one step: ids and mask int64 [B, T + N], rewards and advantages float32 [B]."""

    ids: torch.Tensor
    mask: torch.Tensor
    patches: torch.Tensor | None
    num_prompt_tokens: int
    rewards: torch.Tensor
    advantages: torch.Tensor
    num_failed: int
    num_flat_groups: int


class Reinforce:
    """The objective of the module docstring, bound to a base, a task and its train rows."""

    def __init__(
        self, base: Base, adapter: Adapter, task: Task, rows: Sequence[Row], settings: TrainingSettings
    ) -> None:
        """Sample nothing yet."""
        self._base, self._adapter, self._task, self._rows, self._settings = base, adapter, task, rows, settings

    def descend(self, step: int) -> Descent:
        """Sample, judge, and accumulate the gradients of one step."""
        rollouts = self._rollouts(step)
        rewards = torch.cat([rollout.rewards for rollout in rollouts])
        if step == 0 and bool(rewards.min() == rewards.max()):
            raise HavocError(
                f"every sampled {self._task.name} reward is equal ({rewards.mean().item():.0%} right in "
                f"{len(rewards)}): there is nothing to learn from; use another base, easier rows, or "
                'method "next-token"'
            )
        num_rows = self._settings.prompts_per_step * self._settings.samples_per_prompt
        beta = self._settings.optimizer.kl_coefficient
        total, kls = 0.0, []
        for rollout in rollouts:
            loss, kl = policy_loss(self._base, self._adapter, rollout, kl_coefficient=beta)
            if loss is None:
                continue
            loss = loss * (len(rollout.advantages) / num_rows)
            total += loss.item()
            kls.append(kl)
            loss.backward()
        figures = {
            "reward": rewards.mean().item(),
            "kl": sum(kls) / len(kls) if kls else 0.0,
            "flat_groups": sum(rollout.num_flat_groups for rollout in rollouts),
            "failed": sum(rollout.num_failed for rollout in rollouts),
            "draws": len(rollouts),
        }
        return Descent(total if kls else None, figures)

    def _rollouts(self, step: int) -> list[Rollout]:
        """Draw prompts and sample until enough of them have a signal; the draw depends only on seed and step."""
        settings = self._settings
        rng = random.Random(f"{settings.seed}:{self._task.name}:{step}")
        unused = list(range(len(self._rows)))
        rollouts: list[Rollout] = []
        num_with_signal = 0
        while unused and len(rollouts) < settings.max_draws:
            chosen = rng.sample(unused, min(settings.prompts_per_step, len(unused)))
            rows = [self._rows[index] for index in chosen]
            rollouts.append(sample_rollout(self._base, self._task, rows, settings, seed=rng.getrandbits(48)))
            num_with_signal += len(rows) - rollouts[-1].num_flat_groups
            is_solved = all(bool((rollout.rewards == 1).all()) for rollout in rollouts)
            if is_solved or num_with_signal >= settings.signal_prompts:
                break
            unused = sorted(set(unused) - set(chosen))
        return rollouts


def sample_rollout(base: Base, task: Task, rows: Sequence[Row], settings: TrainingSettings, *, seed: int) -> Rollout:
    """Sample S completions for each row from the current policy and judge them; failed judgements get advantage 0."""
    num_samples, device = settings.samples_per_prompt, base.model.device
    ids_BT, mask_BT, patches = encode_prompts(base.model, base.tokenizer, [task.prompt(row) for row in rows])
    new_BN = sample_tokens(
        base.model,
        ids_BT,
        mask_BT,
        patches,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        generator=torch.Generator(device).manual_seed(seed),
        eos_id=base.tokenizer.eos_ids,
        num_samples=num_samples,
    ).clone()
    repeated = torch.arange(len(rows)).repeat_interleave(num_samples)
    texts = completions(base.tokenizer, ids_BT[repeated], mask_BT[repeated], new_BN)
    pairs = [(rows[index // num_samples], text) for index, text in enumerate(texts)]
    rewards = task.judge(pairs)
    is_judged = torch.tensor([reward.outcome != "failed" for reward in rewards], device=device)
    values = torch.tensor([reward.value for reward in rewards], device=device)
    advantages, num_flat = leave_one_out(values.view(-1, num_samples), is_judged.view(-1, num_samples))
    return Rollout(
        ids=torch.cat((ids_BT[repeated], new_BN), dim=1),
        mask=torch.cat((mask_BT[repeated], _generated_mask(new_BN, base.tokenizer.eos_ids)), dim=1),
        patches=None if patches is None else patches.view(len(rows), -1, patches.shape[-1])[repeated],
        num_prompt_tokens=ids_BT.shape[1],
        rewards=values[is_judged] if is_judged.any() else values,
        advantages=advantages.flatten(),
        num_failed=int((~is_judged).sum()),
        num_flat_groups=num_flat,
    )


def _generated_mask(new_BN: torch.Tensor, eos_ids: Sequence[int]) -> torch.Tensor:
    """1 for generated tokens up to and with the first end token, 0 for the padding after it: int64 [B, N]."""
    is_end = torch.isin(new_BN, torch.tensor(eos_ids, device=new_BN.device)).long()
    return ((is_end.cumsum(dim=1) - is_end) == 0).long()


def leave_one_out(rewards_PS: torch.Tensor, is_judged_PS: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Advantages [P, S]: each reward less the mean of the prompt's others judged; and the number of flat prompts.

    A completion that was not judged, or has no judged neighbour, gets 0.
    """
    judged = is_judged_PS.float()
    total = (rewards_PS * judged).sum(dim=1, keepdim=True)
    num_others = judged.sum(dim=1, keepdim=True) - judged
    others = (total - rewards_PS * judged) / num_others.clamp(min=1)
    advantages = torch.where((num_others > 0) & is_judged_PS, rewards_PS - others, 0.0)
    return advantages, int((advantages.abs().amax(dim=1) < _MIN_ADVANTAGE).sum())


def policy_loss(
    base: Base, adapter: Adapter, rollout: Rollout, *, kl_coefficient: float
) -> tuple[torch.Tensor | None, float]:
    """Loss of the module docstring over the rows with a signal, and their mean KL in nats per token.

    Returns (None, 0.0) if no row has a signal. Both terms are divided by the number of all sampled rows, so that a
    batch with little signal takes a small step.
    """
    kept = rollout.advantages.nonzero()[:, 0]
    if len(kept) == 0:
        return None, 0.0
    ids, mask, start = rollout.ids[kept], rollout.mask[kept], rollout.num_prompt_tokens
    patches = None if rollout.patches is None else rollout.patches[kept].flatten(0, 1)
    weight_BN = mask[:, start:].float()
    log_p_BNV = _log_probabilities(base, ids, mask, patches, start)
    with torch.no_grad(), adapter.disabled():
        log_base_BNV = _log_probabilities(base, ids, mask, patches, start)
    log_taken_BN = log_p_BNV.gather(2, ids[:, start:].unsqueeze(2)).squeeze(2)
    policy = -(rollout.advantages[kept] * (log_taken_BN * weight_BN).sum(dim=1)).sum()
    kl_BN = (log_p_BNV.exp() * (log_p_BNV - log_base_BNV)).sum(dim=2)
    kl_B = (kl_BN * weight_BN).sum(dim=1) / weight_BN.sum(dim=1)
    loss = (policy + kl_coefficient * kl_B.sum()) / len(rollout.advantages)
    return loss, kl_B.mean().item()


def _log_probabilities(
    base: Base, ids: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor | None, start: int
) -> torch.Tensor:
    """Log-probabilities [B, N, V] of the next token at every position that precedes a generated one."""
    logits = base.model(ids, mask, patches=patches)
    return torch.log_softmax(logits[:, start - 1 : -1].float(), dim=-1)
