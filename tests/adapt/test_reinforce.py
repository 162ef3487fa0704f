"""REINFORCE on the bundled base: the gradient is the right one, and prompts are drawn until some carry a signal."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.adapt import reinforce
from havoc_core.adapt.optimizer import MuGrokConfig
from havoc_core.adapt.reinforce import Reinforce, leave_one_out, policy_loss, sample_rollout
from havoc_core.adapt.svf import attach
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.reward import Reward
from havoc_core.adapt.tasks.task import load_task
from havoc_core.config import ExpertSettings
from havoc_core.errors import HavocError
from havoc_core.jobs import training_settings

if TYPE_CHECKING:
    from havoc_core.adapt.svf import Basis
    from havoc_core.adapt.tasks.task import Row
    from havoc_core.model.checkpoint import Base

MATH = load_task("math")
SMALL = dataclasses.replace(
    training_settings(ExpertSettings(), MATH),
    num_steps=4,
    prompts_per_step=12,
    samples_per_prompt=4,
    num_train_rows=40,
    num_validation_rows=8,
    validate_every=2,
    optimizer=MuGrokConfig.from_phase(7),
)


def undecided_rows() -> list[Row]:
    """Rows that the base answers sometimes right and sometimes wrong, so that samples differ in reward."""
    return [row for row in sources.rows("math", "train", 60) if "Find the" in row["question"]][:8]


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), min_size=1, max_size=6))
def test_advantages_of_a_prompt_sum_to_zero(rewards: list[list[float]]) -> None:
    """The baseline removes what all samples of a prompt share, so it moves no probability by itself."""
    values = torch.tensor(rewards)
    advantages, num_flat = leave_one_out(values, torch.ones_like(values, dtype=torch.bool))
    assert torch.allclose(advantages.sum(dim=1), torch.zeros(len(rewards)), atol=1e-6)
    assert num_flat == sum(len(set(group)) == 1 for group in rewards)


def test_unjudged_completion_gets_no_advantage_and_moves_no_baseline() -> None:
    """A sandbox failure is neither right nor wrong: its neighbours are compared among themselves."""
    judged = torch.tensor([[True, True, False]])
    advantages, _ = leave_one_out(torch.tensor([[1.0, 0.0, 1.0]]), judged)
    assert advantages.tolist() == [[1.0, -1.0, 0.0]]


def test_gradient_is_that_of_the_formula(base: Base, basis: Basis) -> None:
    """Without KL, the loss is -mean(A log pi) over the sampled tokens, recomputed here one completion at a time."""
    rows = undecided_rows()
    with attach(base.model, basis) as adapter:
        rollout = sample_rollout(base, MATH, rows, SMALL, seed=5)
        loss, _ = policy_loss(base, adapter, rollout, kl_coefficient=0.0)
        assert loss is not None
        loss.backward()
        ours = {name: delta.grad.clone() for name, delta in adapter.deltas.items()}
        for delta in adapter.parameters():
            delta.grad = None
        total = torch.zeros(())
        for ids, mask, advantage in zip(rollout.ids, rollout.mask, rollout.advantages, strict=True):
            real = ids[mask.bool()]
            num_new = int(mask[rollout.num_prompt_tokens :].sum())
            log_p = torch.log_softmax(base.model(real[None])[0, :-1], dim=-1)
            taken = log_p[torch.arange(len(real) - 1), real[1:]][-num_new:]
            total = total - advantage * taken.sum() / len(rollout.ids)
        total.backward()
        assert loss.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
        for name, delta in adapter.deltas.items():
            scale = delta.grad.abs().max().clamp(min=1e-6)
            assert torch.allclose(ours[name], delta.grad, atol=2e-4 * float(scale) + 1e-7), name


def test_the_kl_term_is_in_the_loss_with_its_weight(base: Base, basis: Basis) -> None:
    """Away from the base: beta times the mean KL of the formula, recomputed here one completion at a time, and felt.

    Only rows that carry signal are read, and all sampled rows divide.
    """
    generator = torch.Generator().manual_seed(2)
    with attach(base.model, basis) as adapter:
        adapter.load({name: 0.1 * torch.randn(d.shape, generator=generator) for name, d in adapter.deltas.items()})
        rollout = sample_rollout(base, MATH, undecided_rows(), SMALL, seed=5)
        gradients = []
        losses = []
        for beta in (0.0, 0.7):
            loss, kl = policy_loss(base, adapter, rollout, kl_coefficient=beta)
            assert loss is not None
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([delta.grad for delta in adapter.parameters()]))
            for delta in adapter.parameters():
                delta.grad = None
        expected = []
        for ids, mask, advantage in zip(rollout.ids, rollout.mask, rollout.advantages, strict=True):
            if advantage == 0:
                continue
            real, num_new = ids[mask.bool()], int(mask[rollout.num_prompt_tokens :].sum())
            with torch.no_grad():
                log_p = torch.log_softmax(base.model(real[None])[0, :-1].double(), dim=-1)[-num_new:]
                with adapter.disabled():
                    log_q = torch.log_softmax(base.model(real[None])[0, :-1].double(), dim=-1)[-num_new:]
            expected.append(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()))
    assert sum(expected) > 0.05
    assert kl == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert losses[1] - losses[0] == pytest.approx(0.7 * sum(expected) / len(rollout.ids), rel=1e-2)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) > 1e-3


def test_kl_of_the_base_with_itself_is_zero(base: Base, basis: Basis) -> None:
    """Before the first step the policy is the base, so the KL term is 0."""
    rows = undecided_rows()
    with attach(base.model, basis) as adapter:
        rollout = sample_rollout(base, MATH, rows, SMALL, seed=5)
        _, kl = policy_loss(base, adapter, rollout, kl_coefficient=1.0)
    assert kl == pytest.approx(0.0, abs=1e-6)


def objective(base: Base, adapter: object, rows: list[Row], **changes: object) -> Reinforce:
    small = dataclasses.replace(SMALL, prompts_per_step=2, **changes)
    return Reinforce(base, adapter, MATH, rows, small)


def hopeless_rows() -> list[Row]:
    return [{"question": f"Say nothing {number} times.", "answer": "#### 123456789"} for number in range(6)]


def test_prompts_are_drawn_until_some_carry_a_signal(base: Base, basis: Basis) -> None:
    """Two prompts a draw, none of which differs in reward among its samples: four draws, then no step is taken."""
    with attach(base.model, basis) as adapter:
        descent = objective(base, adapter, hopeless_rows() * 2, max_draws=4).descend(1)
    assert (descent.loss, descent.figures["draws"], descent.figures["flat_groups"]) == (None, 4, 8)


def test_no_prompt_is_drawn_twice_in_a_step(base: Base, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows give three draws of two, however many more are allowed."""
    drawn: list[str] = []
    sample = reinforce.sample_rollout

    def watched(base: Base, task: object, rows: list[Row], settings: object, *, seed: int) -> object:
        drawn.extend(row["question"] for row in rows)
        return sample(base, task, rows, settings, seed=seed)

    monkeypatch.setattr(reinforce, "sample_rollout", watched)
    with attach(base.model, basis) as adapter:
        descent = objective(base, adapter, hopeless_rows(), max_draws=9).descend(1)
    assert (descent.figures["draws"], len(drawn), len(set(drawn))) == (3, 6, 6)


def test_a_batch_with_signal_is_not_drawn_again(base: Base, basis: Basis) -> None:
    """By default one prompt with a signal is enough, and a limit of 1 never draws again."""
    with attach(base.model, basis) as adapter:
        assert objective(base, adapter, undecided_rows(), signal_prompts=0).descend(1).figures["draws"] == 1
        assert objective(base, adapter, hopeless_rows(), max_draws=1).descend(1).figures["draws"] == 1


def test_solved_prompts_are_not_drawn_again(base: Base, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every completion is right, more prompts are drawn in vain."""
    real = reinforce.sample_rollout

    def solved(*given: object, **named: object) -> reinforce.Rollout:
        rollout = real(*given, **named)
        return dataclasses.replace(
            rollout,
            rewards=torch.ones_like(rollout.rewards),
            advantages=torch.zeros_like(rollout.advantages),
            num_flat_groups=2,
        )

    monkeypatch.setattr(reinforce, "sample_rollout", solved)
    with attach(base.model, basis) as adapter:
        assert objective(base, adapter, undecided_rows(), max_draws=4).descend(1).figures["draws"] == 1


def test_draws_depend_on_seed_and_step_alone(base: Base, basis: Basis) -> None:
    """The same step again has the same figures; another step and another seed do not."""
    with attach(base.model, basis) as adapter:
        rows = undecided_rows()
        first = objective(base, adapter, rows, max_draws=3).descend(3)
        again = objective(base, adapter, rows, max_draws=3).descend(3)
        other = objective(base, adapter, rows, max_draws=3, seed=1).descend(3)
    assert first == again
    assert first != other


def test_resampled_gradients_are_those_of_all_draws(base: Base, basis: Basis) -> None:
    """Two draws add up: the deltas hold the sum of both policy gradients over the nominal number of rows."""
    with attach(base.model, basis) as adapter:
        rows = undecided_rows()
        trained = objective(base, adapter, rows, max_draws=2, signal_prompts=2)
        rollouts = trained._rollouts(5)
        trained.descend(5)
        ours = {name: delta.grad.clone() for name, delta in adapter.deltas.items()}
        for delta in adapter.parameters():
            delta.grad = None
        for rollout in rollouts:
            loss, _ = policy_loss(base, adapter, rollout, kl_coefficient=SMALL.optimizer.kl_coefficient)
            if loss is not None:
                (loss * len(rollout.advantages) / (2 * SMALL.samples_per_prompt)).backward()
        for name, delta in adapter.deltas.items():
            assert torch.allclose(ours[name], delta.grad, rtol=1e-4, atol=1e-7), name


def test_constant_reward_is_refused(base: Base, basis: Basis) -> None:
    """Where every sample of the first step is wrong there is no gradient, and another method is named."""
    with attach(base.model, basis) as adapter, pytest.raises(HavocError, match="nothing to learn.*next-token"):
        objective(base, adapter, hopeless_rows()).descend(0)


def test_pictures_are_repeated_with_their_prompts(base: Base) -> None:
    """Each sample of a prompt sees the prompt's picture; a prompt in words has none."""
    task = load_task("vision")
    settings = dataclasses.replace(SMALL, max_new_tokens=2)
    rollout = sample_rollout(base, task, sources.rows(task, "train", 2), settings, seed=0)
    assert rollout.patches is not None
    num = settings.samples_per_prompt
    assert len(rollout.patches) == len(rollout.ids) == 2 * num
    assert all(torch.equal(rollout.patches[place], rollout.patches[place // num * num]) for place in range(2 * num))
    assert not torch.equal(rollout.patches[0], rollout.patches[num])
    assert sample_rollout(base, MATH, undecided_rows(), settings, seed=0).patches is None


def test_the_divergence_told_is_the_mean_of_the_draws(
    base: Base, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over those with a signal; none of them diverges by nothing."""
    found = iter([(None, 0.0), (torch.zeros((), requires_grad=True), 0.2), (torch.zeros((), requires_grad=True), 0.6)])
    with attach(base.model, basis) as adapter:
        wanted = objective(base, adapter, hopeless_rows(), max_draws=3)
        monkeypatch.setattr(reinforce, "policy_loss", lambda *_, **__: next(found))
        descent = wanted.descend(1)
        assert descent.figures["draws"] == 3
        assert descent.figures["kl"] == pytest.approx(0.4)
        monkeypatch.setattr(reinforce, "policy_loss", lambda *_, **__: (None, 0.0))
        assert wanted.descend(1).figures["kl"] == 0


def test_a_batch_that_nobody_could_judge_has_rewards_and_no_signal(base: Base) -> None:
    """A mean over it is a number, every failure is counted, and nothing is learnt from it."""

    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(MATH, name)

        def judge(self, pairs: list[object]) -> list[Reward]:
            return [Reward(0.0, "failed", "the sandbox ended") for _ in pairs]

    settings = dataclasses.replace(SMALL, max_new_tokens=2)
    rollout = sample_rollout(base, Broken(), undecided_rows()[:2], settings, seed=0)  # type: ignore[arg-type]
    assert rollout.num_failed == len(rollout.rewards) == 2 * settings.samples_per_prompt
    assert not rollout.advantages.any()
