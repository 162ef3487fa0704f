"""Expected reward and next-token: loss and gradient against the plain formula, against samples and against torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from havoc_core.adapt import expected_reward
from havoc_core.adapt.basis import Basis
from havoc_core.adapt.expected_reward import ExpectedReward, lengths_of, log_expected_rewards
from havoc_core.adapt.next_token import NextToken
from havoc_core.adapt.objectives import TrainingSettings, method_for, rows_of_step
from havoc_core.adapt.optimizer import MuGrokConfig
from havoc_core.adapt.reading import layer_of
from havoc_core.adapt.svf import SingularValueAdapter, attach
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.task import Row, Task, load_task
from havoc_core.adapt.training import trained_part
from havoc_core.config import ExpertSettings
from havoc_core.errors import HavocError
from havoc_core.jobs import training_settings
from havoc_core.model.checkpoint import Base

QUESTIONS = {
    "What do bees make?": ("12", "13", "24", "36"),
    "Dan has 5 apples and buys 9. How many has he now?": ("14", "15", "13", "24"),
    "Which is even?": ("1", "2", "30", "5 6"),
    "Dan has 7 pens and buys 20. How many has he now?": ("27", "37", "28", "1"),
    "Which number is the largest?": ("12", "15", "18", "14"),
}
RIGHT = "ABBAC"


def settings(**changes: object) -> TrainingSettings:
    beta = float(changes.pop("kl_coefficient", 0.0))
    optimizer = dataclasses.replace(MuGrokConfig.from_phase(7), kl_coefficient=beta)
    return dataclasses.replace(
        training_settings(ExpertSettings(), load_task("math")), prompts_per_step=5, optimizer=optimizer, **changes
    )


def rows() -> list[Row]:
    return [
        {
            "id": str(place),
            "question": question,
            "choices": {"text": list(texts), "label": list("ABCD")},
            "answerKey": key,
        }
        for place, ((question, texts), key) in enumerate(zip(QUESTIONS.items(), RIGHT, strict=True))
    ]


@pytest.fixture
def adapter(base: Base, basis: Basis) -> Iterator[SingularValueAdapter]:
    """Away from the base, so that the KL term has a gradient."""
    generator = torch.Generator().manual_seed(3)
    with attach(base.model, basis) as attached:
        attached.load(
            {name: 0.05 * torch.randn(delta.shape, generator=generator) for name, delta in attached.deltas.items()}
        )
        yield attached


@pytest.fixture(scope="module")
def choice_task() -> Task:
    return load_task("arc-easy", is_public=True)


def gradients(adapter: SingularValueAdapter) -> Tensor:
    """All deltas' gradients as one vector, which are then cleared."""
    found = torch.cat([delta.grad.flatten() for delta in adapter.parameters()])
    for delta in adapter.parameters():
        delta.grad = None
    return found


def log_probabilities(base: Base, ids: list[int], num_last: int) -> Tensor:
    """Log-probabilities [num_last, V] that a plain pass gives for the last tokens of `ids`."""
    return torch.log_softmax(base.model(torch.tensor([ids]))[0, -num_last - 1 : -1], dim=-1)


def plain_scores(base: Base, task: Task, row: Row) -> Tensor:
    """Log-likelihood of each choice by a pass of its own, [C]."""
    sums = []
    for choice in task.choices(row):
        prompt_ids, choice_ids = base.tokenizer.encode_continuation(task.prompt(row).text, choice)
        log_p_NV = log_probabilities(base, [*prompt_ids, *choice_ids], len(choice_ids))
        sums.append(log_p_NV[torch.arange(len(choice_ids)), torch.tensor(choice_ids)].sum())
    return torch.stack(sums)


def plain_kl(base: Base, adapter: SingularValueAdapter, prompt_ids: list[int], branches: list[list[int]]) -> Tensor:
    """KL(policy || base), mean over the places that predict: the prompt's end once, and every place in a branch."""
    places = [prompt_ids, *([*prompt_ids, *branch[:length]] for branch in branches for length in range(1, len(branch)))]
    total = torch.zeros(())
    for ids in places:
        log_p_V = log_probabilities(base, [*ids, 0], 1)[0]
        with torch.no_grad(), adapter.disabled():
            log_base_V = log_probabilities(base, [*ids, 0], 1)[0]
        total = total + (log_p_V.exp() * (log_p_V - log_base_V)).sum()
    return total / len(places)


def test_expected_reward_is_that_of_the_formula(base: Base, adapter: SingularValueAdapter, choice_task: Task) -> None:
    """Loss and gradient of a step equal autograd through one plain pass per choice."""
    descent = ExpectedReward(base, adapter, choice_task, rows(), settings()).descend(0)
    ours = gradients(adapter)
    log_rewards = [
        torch.log_softmax(plain_scores(base, choice_task, row), 0)[choice_task.right_choice(row)] for row in rows()
    ]
    loss = -torch.stack(log_rewards).mean()
    loss.backward()
    theirs = gradients(adapter)
    assert descent.loss == pytest.approx(loss.item(), rel=1e-4)
    assert descent.figures["reward"] == pytest.approx(torch.stack(log_rewards).exp().mean().item(), rel=1e-4)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))


def test_expected_reward_is_what_samples_estimate(
    base: Base, adapter: SingularValueAdapter, choice_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the logarithm, REINFORCE over sampled choices has the step's gradient as its mean."""
    monkeypatch.setattr(expected_reward, "losses", lambda log_reward_B: -log_reward_B.exp())
    some = rows()[:2]
    ExpectedReward(base, adapter, choice_task, some, settings()).descend(0)
    exact = gradients(adapter)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for row in some:
        log_p_C = torch.log_softmax(plain_scores(base, choice_task, row), 0)
        picked = torch.multinomial(log_p_C.detach().exp(), 1_000_000, replacement=True, generator=generator)
        share_C = torch.bincount(picked, minlength=len(log_p_C)) / len(picked)
        reward_C = F.one_hot(torch.tensor(choice_task.right_choice(row)), len(log_p_C)).float()
        baseline = float((share_C * reward_C).sum())
        loss = loss - (share_C * (reward_C - baseline) * log_p_C).sum() / len(some)
    loss.backward()
    sampled = gradients(adapter)
    assert float((sampled - exact).norm() / exact.norm()) < 0.03


def test_frozen_layers_are_read_once_and_change_nothing(
    base: Base, basis: Basis, choice_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the last two of four layers trained, loss and gradients are those of the whole pass; a second step over the
    same rows enters the layers beneath no more.
    """
    some = settings(kl_coefficient=0.5)
    with attach(base.model, basis) as adapter:
        whole = ExpectedReward(base, adapter, choice_task, rows(), some).descend(0)
        wanted = {name: delta.grad.clone() for name, delta in adapter.deltas.items() if layer_of(name) >= 2}
    with attach(base.model, trained_part(basis, base, 2)) as adapter:
        part = ExpectedReward(base, adapter, choice_task, rows(), some)
        first = part.descend(0)
        assert set(adapter.deltas) == set(wanted)
        for name, delta in adapter.deltas.items():
            assert torch.allclose(delta.grad, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max())), (
                name
            )
        entered: list[int] = []
        layer = base.model.layers[0]
        monkeypatch.setattr(layer, "forward", lambda *given, own=layer.forward: (entered.append(1), own(*given))[1])
        again = part.descend(0)
    assert first.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (again.loss, entered) == (first.loss, [])


@pytest.mark.parametrize("kind", ["choice", "next-token"])
def test_kl_term_is_that_of_the_formula(
    base: Base, adapter: SingularValueAdapter, choice_task: Task, kind: str
) -> None:
    """With beta the loss and its gradient grow by beta times the mean KL over the predicting places of each row."""
    if kind == "choice":
        task, some, method = choice_task, rows(), ExpectedReward
    else:
        task, method = load_task("math"), NextToken
        some = sources.rows("math", "train", 3)
    without = method(base, adapter, task, some, settings()).descend(0)
    plain = gradients(adapter)
    descent = method(base, adapter, task, some, settings(kl_coefficient=2.0)).descend(0)
    ours = gradients(adapter) - plain
    total = torch.zeros(())
    for row in some:
        texts = task.choices(row) if kind == "choice" else [task.reference(row)]
        pairs = [base.tokenizer.encode_continuation(task.prompt(row).text, text) for text in texts]
        ends = [] if kind == "choice" else [base.tokenizer.eos_ids[0]]
        total = total + plain_kl(base, adapter, pairs[0][0], [[*ids, *ends] for _, ids in pairs]) / len(some)
    (2.0 * total).backward()
    theirs = gradients(adapter)
    assert without.figures["kl"] is None
    assert total.item() > 1e-4
    assert descent.figures["kl"] == pytest.approx(total.item(), rel=1e-3)
    assert descent.loss - without.loss == pytest.approx(2.0 * total.item(), rel=1e-3)
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4 * float(theirs.abs().max()))


def test_kl_of_the_base_with_itself_is_zero(base: Base, basis: Basis, choice_task: Task) -> None:
    """Before the first step the policy is the base."""
    with attach(base.model, basis) as adapter:
        descent = ExpectedReward(base, adapter, choice_task, rows(), settings(kl_coefficient=1.0)).descend(0)
    assert descent.figures["kl"] == pytest.approx(0.0, abs=1e-5)


def test_next_token_is_torch_cross_entropy(base: Base, adapter: SingularValueAdapter) -> None:
    """The mean over all reference tokens of a step, the end token among them, and its gradient."""
    task, some = load_task("math"), sources.rows("math", "train", 5)
    descent = NextToken(base, adapter, task, some, settings()).descend(0)
    ours = gradients(adapter)
    logits, labels = [], []
    for row in some:
        prompt_ids, ids = base.tokenizer.encode_continuation(task.prompt(row).text, task.reference(row))
        target = [*ids, base.tokenizer.eos_ids[0]]
        logits.append(base.model(torch.tensor([[*prompt_ids, *target]]))[0, -len(target) - 1 : -1])
        labels += target
    loss = F.cross_entropy(torch.cat(logits), torch.tensor(labels))
    loss.backward()
    theirs = gradients(adapter)
    assert descent.loss == pytest.approx(loss.item(), rel=1e-5)
    assert descent.figures["nats_per_token"] == descent.loss
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))


def test_passes_of_a_step_add_up(
    base: Base, adapter: SingularValueAdapter, choice_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows share a pass, a step has the same loss and gradient."""
    whole = ExpectedReward(base, adapter, choice_task, rows(), settings(kl_coefficient=0.5)).descend(0)
    at_once = gradients(adapter)
    monkeypatch.setattr("havoc_core.adapt.expected_reward.MAX_TOKENS_OF_A_PASS", 1)
    single = ExpectedReward(base, adapter, choice_task, rows(), settings(kl_coefficient=0.5)).descend(0)
    assert single.loss == pytest.approx(whole.loss, rel=1e-5)
    assert torch.allclose(gradients(adapter), at_once, rtol=1e-3, atol=2e-5 * float(at_once.abs().max()))


def test_lengths_keep_the_order_of_acc_norm(choice_task: Task) -> None:
    """Scores are multiplied by mean length over length, so the likeliest choice is lm-eval's under acc_norm."""
    normed = dataclasses.replace(
        choice_task, definition=choice_task.definition.model_copy(update={"metric": "acc_norm"})
    )
    lengths_C = lengths_of(normed, rows()[2])
    characters_C = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert lengths_C.tolist() == pytest.approx((characters_C.mean() / characters_C).tolist())
    assert lengths_of(choice_task, rows()[2]).tolist() == [1.0] * 4


def test_expected_rewards_of_rows_of_different_size() -> None:
    """Rows may have any number of choices; each is a softmax of its own."""
    scores_C = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])
    log_reward_B, is_right_B = log_expected_rewards(scores_C, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 2]))
    assert log_reward_B.exp().tolist() == pytest.approx([0.5, torch.softmax(scores_C[2:], 0)[2].item()])
    assert is_right_B.tolist() == [False, True]


def test_an_epoch_meets_every_row_once() -> None:
    """Steps of 4 over 22 rows: the first five hold 20 different ones, the next epoch has an order of its own."""
    first = [rows_of_step(22, 4, seed="0:task", step=step) for step in range(5)]
    assert len({index for step in first for index in step}) == 20
    assert rows_of_step(22, 4, seed="0:task", step=5) != first[0]
    assert rows_of_step(22, 4, seed="0:task", step=2) == first[2]
    assert rows_of_step(22, 4, seed="1:task", step=2) != first[2]
    assert sorted(rows_of_step(3, 9, seed="", step=7)) == [0, 1, 2]


def test_auto_takes_the_exact_method_where_answers_can_be_listed(choice_task: Task) -> None:
    """A task of choices is trained by its expected reward; what cannot be is refused with the methods that can."""
    assert method_for(choice_task, "auto") == "expected-reward"
    assert method_for(load_task("math"), "auto") == "reinforce"
    assert method_for(load_task("gsm8k"), "auto") == method_for(load_task("mbpp"), "auto") == "next-token"
    assert method_for(load_task("gsm8k"), "reinforce") == "reinforce"
    assert method_for(choice_task, "next-token") == "next-token"
    with pytest.raises(HavocError, match="needs a task of choices"):
        method_for(load_task("math"), "expected-reward")
    with pytest.raises(HavocError, match="samples free text"):
        method_for(choice_task, "reinforce")
