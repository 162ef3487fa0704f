"""REINFORCE on the bundled base: the gradient is the right one, a killed training goes on exactly, an expert
improves.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.adapt import reinforce
from havoc_core.adapt.commands import base_basis
from havoc_core.adapt.reinforce import (
    ReinforceSettings,
    leave_one_out,
    policy_loss,
    sample_rollout,
    train_expert,
)
from havoc_core.adapt.svf import attach
from havoc_core.adapt.tasks import sources
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT

if TYPE_CHECKING:
    from pathlib import Path

    from havoc_core.adapt.svf import Basis
    from havoc_core.adapt.tasks.task import Row
    from havoc_core.model.checkpoint import Base

SMALL = ReinforceSettings(
    num_steps=4, prompts_per_step=12, samples_per_prompt=4, num_train_rows=40, num_validation_rows=8, validate_every=2
)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("nano")


@pytest.fixture(scope="module")
def basis(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return base_basis(base, tmp_path_factory.mktemp("basis"), SILENT)


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
        rollout = sample_rollout(base, "math", rows, SMALL, seed=5)
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


def test_kl_of_the_base_with_itself_is_zero(base: Base, basis: Basis) -> None:
    """Before the first step the policy is the base, so the KL term is 0."""
    rows = undecided_rows()
    with attach(base.model, basis) as adapter:
        rollout = sample_rollout(base, "math", rows, SMALL, seed=5)
        _, kl = policy_loss(base, adapter, rollout, kl_coefficient=1.0)
    assert kl == pytest.approx(0.0, abs=1e-6)


def test_training_gives_the_base_back_bit_for_bit(base: Base, basis: Basis, tmp_path: Path) -> None:
    """An expert is a file of its own; the base model in memory is as before."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    one_step = dataclasses.replace(SMALL, num_steps=1)
    train_expert(base, basis, "math", settings=one_step, checkpoint_dir=tmp_path)
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class _InterruptedError(Exception):
    pass


class _InterruptingProgress:
    """Ends the process's work after so many steps, where Ctrl-C would."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps + 1  # one call announces where the run starts

    def stage(self, name: str, total: int | None, *, unit: str = "") -> _InterruptingProgress:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise _InterruptedError


@settings(deadline=None)
@given(st.just(2))
def test_interrupted_training_ends_as_if_it_had_not_been(num_steps: int) -> None:
    """Stopped after two of four steps and started again: the same deltas, bit for bit."""
    import tempfile
    from pathlib import Path

    base = load_base("nano")
    with tempfile.TemporaryDirectory() as folder:
        basis = base_basis(base, Path(folder), SILENT)
        whole = train_expert(base, basis, "math", settings=SMALL, checkpoint_dir=Path(folder) / "whole")
        cut = Path(folder) / "cut"
        with pytest.raises(_InterruptedError):
            train_expert(
                base, basis, "math", settings=SMALL, checkpoint_dir=cut, progress=_InterruptingProgress(num_steps)
            )
        again = train_expert(base, basis, "math", settings=SMALL, checkpoint_dir=cut)
    assert all(torch.equal(whole.deltas[name], again.deltas[name]) for name in whole.deltas)
    assert whole.settings["trace"] == again.settings["trace"]


def test_constant_reward_is_refused(basis: Basis, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every sample is wrong there is no gradient, so the run stops at once and says so."""
    hopeless = [{"question": "Say nothing.", "answer": "#### 123456789"}] * 40
    monkeypatch.setattr(sources, "rows", lambda *_, **__: hopeless)
    with pytest.raises(HavocError, match="nothing to learn"):
        train_expert(base, basis, "math", settings=SMALL, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("samples_per_prompt", 1, "at least 2"), ("num_steps", 0, "at least 1"), ("temperature", 0.0, "above 0")],
)
def test_settings_that_cannot_train_are_refused(field: str, value: float, words: str) -> None:
    """One line with the number and what it must be."""
    with pytest.raises(HavocError, match=words):
        dataclasses.replace(SMALL, **{field: value})


def test_non_finite_losses_are_skipped_counted_and_end_the_run(
    base: Base, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN never reaches the deltas; ten in a row end the training."""
    steps = []

    def broken(*_: object, **__: object) -> tuple[torch.Tensor, float]:
        steps.append(1)
        return torch.tensor(float("nan"), requires_grad=True), float("nan")

    monkeypatch.setattr(reinforce, "policy_loss", broken)
    with pytest.raises(MeasurementError, match="10 times in a row"):
        train_expert(base, basis, "math", settings=dataclasses.replace(SMALL, num_steps=20), checkpoint_dir=tmp_path)
    assert len(steps) == 10
