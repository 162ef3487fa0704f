"""Adaptation on a card: every tensor is made where the base is, and the numbers are the CPU's.

The card is pretended (`tests/pretended_card.py`), so that the very code is run on any machine: one tensor that is made
or left on the CPU is an error. What a real card adds, its own rounding, is tested in `tests/gpu`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core import jobs, storage
from havoc_core.adapt.alpha_search import CrossEntropySettings
from havoc_core.adapt.basis import Basis, compute_basis
from havoc_core.adapt.classifier import train_classifier
from havoc_core.adapt.dispatch import open_mixtures
from havoc_core.adapt.divergence import compared_rows, divergences
from havoc_core.adapt.expert import load_experts
from havoc_core.adapt.few_shot import find_alpha
from havoc_core.adapt.pretrain import PretrainSettings, pretrain
from havoc_core.adapt.pretrain_text import TextSettings, pretrain_text
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.asked import Task
from havoc_core.adapt.tasks.reward import RIGHT, Reward, wrong
from havoc_core.adapt.tasks.task import load_task
from havoc_core.adapt.training import train_expert
from havoc_core.adapt.training_state import state_path
from havoc_core.config import ExpertSettings, Recipe
from havoc_core.errors import HavocError
from havoc_core.export.candidates import CandidateSessions
from havoc_core.export.runtime.devices import CUDA_PROVIDER
from havoc_core.jobs import training_settings
from havoc_core.messages import plain
from havoc_core.model.checkpoint import Base, load_base
from havoc_core.model.config import HavocConfig
from havoc_core.model.scorer import TorchScorer
from havoc_core.model.structure import Structure
from havoc_core.progress import SILENT
from tests import pretended_card as pretended
from tests.adapt.interrupted import StopAfter, StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator


MATH, VISION = load_task("math"), load_task("vision")
SMALL = dataclasses.replace(
    training_settings(ExpertSettings(), MATH),
    trained_layers=1,
    num_steps=2,
    prompts_per_step=3,
    samples_per_prompt=2,
    max_new_tokens=4,
    num_train_rows=6,
    num_validation_rows=2,
    validate_every=2,
)
NAMES = ("math", "code", "reasoning")


@pytest.fixture(scope="module")
def basis(base: Base) -> Basis:
    return compute_basis(base.tensors(), base_hash=base.weight_hash)


@pytest.fixture
def card() -> Iterator[Any]:
    with pretended.PretendedCard() as card:
        yield card


def every_other(_: Task, pairs: list[tuple[Any, str]]) -> list[Reward]:
    """Judge completions so that every prompt has one that is right and one that is not."""
    return [RIGHT if place % 2 else wrong("it is an even one") for place, _ in enumerate(pairs)]


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """A step's line of the trace; what it does not have is -1."""
    return {name: -1.0 if value is None else value for name, value in entry.items()}


@pytest.mark.parametrize(("task", "method"), [(MATH, "reinforce"), (VISION, "reinforce"), (VISION, "next-token")])
def test_training_is_the_cpus_step_for_step(
    base: Base, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Task, method: Any
) -> None:
    """Rewards, losses and KL divergences of every step; the expert says where it was made and lies on the CPU."""
    if method == "reinforce":
        monkeypatch.setattr(Task, "judge", every_other)
    settings = dataclasses.replace(SMALL, method=method)
    ours = train_expert(base, basis, task, settings=settings, checkpoint_dir=tmp_path / "cpu")
    with pretended.PretendedCard() as card:
        there = load_base("nano", device="cuda")
        theirs = train_expert(there, basis, task, settings=settings, checkpoint_dir=tmp_path / "card")
        assert not any(map(card.holds, theirs.deltas.values()))
        assert card.holds(there.model.norm.weight)
    assert len(theirs.settings["trace"]) == 2
    for expected, found in zip(ours.settings["trace"], theirs.settings["trace"], strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3, abs=1e-5)
        assert found["loss"] is not None
    assert theirs.settings["made_on"]["name"] == pretended.NAME
    assert ours.settings["made_on"]["device"] == "cpu"


def test_expected_reward_is_the_cpus_step_for_step(base: Base, basis: Basis, tmp_path: Path) -> None:
    """The third method, on the task of choices that is always there: the classifier's."""
    tasks = [MATH, load_task("reasoning")]
    settings = dataclasses.replace(SMALL, method="expected-reward")
    ours = train_classifier(base, basis, tasks, settings=settings, checkpoint_dir=tmp_path / "cpu")
    with pretended.PretendedCard():
        there = load_base("nano", device="cuda")
        theirs = train_classifier(there, basis, tasks, settings=settings, checkpoint_dir=tmp_path / "card")
    for expected, found in zip(ours.settings["trace"], theirs.settings["trace"], strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3, abs=1e-5)
    assert theirs.settings["made_on"]["device"] == "cuda"


def test_a_training_goes_on_only_where_it_began(base: Base, basis: Basis, tmp_path: Path) -> None:
    """On another device it is refused with both names, and its state stays; where it began it is finished."""
    shared: dict[str, Any] = {
        "settings": dataclasses.replace(SMALL, method="next-token", trained_layers=1),
        "checkpoint_dir": tmp_path,
    }
    with pytest.raises(StoppedError):
        train_expert(base, basis, MATH, progress=StopAfter(1, "nats"), **shared)
    before = state_path(tmp_path, "math").read_bytes()
    with pretended.PretendedCard(), pytest.raises(HavocError) as caught:
        train_expert(load_base("nano", device="cuda"), basis, MATH, **shared)
    assert f"the training began on cpu, this is cuda ({pretended.NAME})" in str(caught.value)
    assert state_path(tmp_path, "math").read_bytes() == before
    assert train_expert(base, basis, MATH, **shared).settings["trace"][-1]["step"] == 2
    shared["checkpoint_dir"] = tmp_path / "card"
    with pretended.PretendedCard(), pytest.raises(StoppedError):
        there = load_base("nano", device="cuda")
        train_expert(there, basis, MATH, progress=StopAfter(1, "nats"), **shared)
    with pytest.raises(HavocError, match=r"training .*cuda \(Pretended GeForce\), .*cpu"):
        train_expert(base, basis, MATH, **shared)


TINY = PretrainSettings(
    num_steps=2, batch_size=4, rows_per_domain=8, num_tokenizer_rows=8, checkpoint_every=1, num_accuracy_rows=1
)


def test_a_base_is_made_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and gone on with, it ends with the loss of the CPU; the CPU may not go on with it."""
    shallow = dataclasses.replace(HavocConfig.nano(), num_layers=1)
    monkeypatch.setattr(HavocConfig, "preset", lambda _: shallow)
    monkeypatch.setattr("havoc_core.adapt.base_card.DOMAINS", ())  # an untrained base writes to the last token
    on_card = tmp_path / "card"
    with pretended.PretendedCard(), pytest.raises(StoppedError):
        pretrain("nano", on_card, settings=TINY, device="cuda", progress=StopAfter(1, "loss"))
    with pytest.raises(HavocError, match=r"run .*cuda \(Pretended GeForce\), .*cpu"):
        pretrain("nano", on_card, settings=TINY)
    with pretended.PretendedCard():
        pretrain("nano", on_card, settings=TINY, device="cuda")
    pretrain("nano", tmp_path / "cpu", settings=TINY)
    theirs, ours = (storage.read_json(folder / "pretraining.json") for folder in (on_card, tmp_path / "cpu"))
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=2e-3)
    assert (theirs["made_on"]["name"], ours["made_on"]["device"]) == (pretended.NAME, "cpu")
    assert f"minutes of training on\n{pretended.NAME} (cuda, float32) with torch" in (on_card / "README.md").read_text()
    assert "1 CPU thread(s) with torch" in (tmp_path / "cpu" / "README.md").read_text()


def test_a_base_of_texts_is_made_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses, and what a held-out token costs, are the CPU's."""
    shallow = HavocConfig.nano().replace(num_layers=1, vision=None)
    monkeypatch.setattr(HavocConfig, "preset", lambda _: shallow)
    settings = TextSettings(num_steps=2, batch_size=2, window_tokens=16)
    texts = {"a": "".join(f"{n} is a number.\n" for n in range(100))}
    ours = storage.read_json(pretrain_text("nano", texts, tmp_path / "cpu", settings=settings) / "pretraining.json")
    with pretended.PretendedCard():
        out = pretrain_text("nano", texts, tmp_path / "card", settings=settings, device="cuda")
    theirs = storage.read_json(out / "pretraining.json")
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-3)
    assert theirs["held_out"]["nats_per_token"] == pytest.approx(ours["held_out"]["nats_per_token"], abs=1e-3)
    assert theirs["made_on"]["name"] == pretended.NAME


def test_a_base_answers_there_as_here(base: Base) -> None:
    """Texts and likelihoods, a picture among the prompts."""
    prompts = [task.prompt(row) for task in (MATH, VISION) for row in sources.rows(task, "search", 2)]
    requests = [(prompt, ["yes", "no, it is not"]) for prompt in prompts[:2]]

    def answers(one: Base) -> tuple[list[str], list[float]]:
        scorer = TorchScorer(one.model, one.tokenizer)
        texts = scorer.generate_text(prompts, max_new_tokens=6, stop=["\n"])
        return texts, [found.log_likelihood for row in scorer.log_likelihoods(requests) for found in row]

    ours = answers(base)
    with pretended.PretendedCard():
        theirs = answers(load_base("nano", device="cuda"))
    assert theirs[0] == ours[0]
    assert theirs[1] == pytest.approx(ours[1], rel=1e-4)


def test_mixtures_are_chosen_there_as_here(base: Base, small_experts: Path) -> None:
    """Few-shot dispatch finds the same alpha, and a mixture is as far from the base."""
    examples = sources.rows(MATH, "train", 2)

    def found(one: Base) -> list[float]:
        mixtures, basis = open_mixtures(one, small_experts, SILENT)
        with mixtures:
            settings = CrossEntropySettings(population=3, generations=1)
            alpha = find_alpha(mixtures, MATH, examples, settings=settings, max_new_tokens=4).alpha
        rows = {"math": compared_rows(one, MATH, examples)}
        experts = load_experts(small_experts, NAMES, basis=basis)
        return [*alpha, *divergences(one, basis, experts, [(0.5, 0.5, 0.0)], rows)[0].values()]

    ours = found(base)
    with pretended.PretendedCard():
        theirs = found(load_base("nano", device="cuda"))
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert ours[-1] > 0


def test_the_cache_is_cleared_before_every_candidate(
    small_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    """As seed 003 asks: each candidate, and each look at the divergence, begins with the whole card.

    ONNX Runtime cannot be pretended a card: it is told to answer there, and then answers on the CPU.
    """
    told: list[str] = []

    class OnTheCpu(CandidateSessions):
        def __init__(self, *args: Any, provider: str, **options: Any) -> None:
            told.append(provider)
            super().__init__(*args, **options)

    monkeypatch.setattr("havoc_core.export.candidates.CandidateSessions", OnTheCpu)
    recipe = Recipe.model_validate(
        {"model": {"device": "cuda"}, "experts": {"tasks": list(NAMES), "max_new_tokens": 4}}
    )
    monkeypatch.setattr(jobs, "limit_threads", lambda _: None)
    place = jobs.Place(recipe, small_experts, small_experts)
    mixtures = jobs.MixedModels(place=place, num_threads=1, rule="delta")
    rows = jobs.RowRange(split="search", start=0, size=1)
    cleared = []
    for alpha in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)):
        asked = jobs.AnswerRequest(
            mixtures=mixtures, rows=rows, tasks=("math",), alpha=alpha, structure=Structure().to_fields()
        )
        jobs.answer(plain(asked), SILENT)
        cleared.append(card.num_cleared)
    jobs.diverge(plain(jobs.DivergeRequest(mixtures=mixtures, rows=rows, alphas=((1.0, 0.0, 0.0),))), SILENT)
    assert [*cleared, card.num_cleared] == [1, 2, 3]
    assert told == [CUDA_PROVIDER]
    jobs._contest.cache_clear()
