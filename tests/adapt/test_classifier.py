"""The classifier learns from train rows to name the task of a prompt it has not met, and is no expert that answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from havoc_core.adapt import classifier as module
from havoc_core.adapt.basis import Basis, base_basis
from havoc_core.adapt.branches import encode_branches
from havoc_core.adapt.classifier import (
    classifier_path,
    classifier_task,
    labelled_rows,
    load_classifier,
    train_classifier,
)
from havoc_core.adapt.dispatch import Chooser, open_mixtures
from havoc_core.adapt.expert import Expert, expert_path, experts_in, load_experts, save_expert, write_expert
from havoc_core.adapt.first_pass import FirstPass, asked
from havoc_core.adapt.objectives import TrainingSettings
from havoc_core.adapt.tasks.sources import rows, search_reader
from havoc_core.adapt.tasks.task import Prompt, load_tasks
from havoc_core.bounds import TWO_SIDED, share_ends
from havoc_core.cli import main
from havoc_core.config import ExpertSettings
from havoc_core.errors import HavocError
from havoc_core.jobs import training_settings
from havoc_core.model.checkpoint import Base
from havoc_core.model.likelihood import Continuation, encode_requests
from havoc_core.progress import SILENT

TASKS = load_tasks(("math", "code", "reasoning"))
NAMES = [task.name for task in TASKS]


@pytest.fixture(scope="module")
def basis(base: Base, small_experts: Path) -> Basis:
    return base_basis(base, small_experts, SILENT)


def small(num_steps: int) -> TrainingSettings:
    experts = ExpertSettings(learning_rate=0.02, num_train_rows=60, num_validation_rows=12)
    return dataclasses.replace(
        training_settings(experts, classifier_task()), num_steps=num_steps, prompts_per_step=12, validate_every=6
    )


@pytest.fixture(scope="module")
def trained(base: Base, basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Expert:
    folder = tmp_path_factory.mktemp("classifier")
    return train_classifier(base, basis, TASKS, settings=small(12), checkpoint_dir=folder)


def test_it_names_prompts_it_has_not_met(base: Base, trained: Expert, small_experts: Path, tmp_path: Path) -> None:
    """On gate rows, after 12 steps, surely better than one of three by chance, where the base is not."""
    write_expert(trained, classifier_path(tmp_path))
    mixtures, basis = open_mixtures(base, small_experts, SILENT)
    with mixtures:
        classifier, first_pass = load_classifier(tmp_path, basis=basis)

        def low_end(chooser: Chooser) -> float:
            places = [chooser.places([task.prompt(row) for row in rows(task, "gate", 20)]) for task in TASKS]
            num_right = sum(place == label for label, some in enumerate(places) for place in some)
            return share_ends(num_right, 60, confidence=TWO_SIDED)[0]

        assert low_end(Chooser(mixtures, first_pass, classifier)) > 0.5
        assert low_end(Chooser(mixtures, first_pass)) < 1 / 3


def test_gradients_come_from_train_rows_alone(base: Base, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trained prompt is that of a train row, its task the right choice; the step is picked on search rows."""
    seen: list[list[dict]] = []

    def keep(*words: object, **_: object) -> Expert:
        seen.extend([words[3], words[4]])  # type: ignore[list-item]
        return Expert(domain="classifier", deltas={}, base_hash="", basis_hash="")

    monkeypatch.setattr(module, "train_on_rows", keep)
    train_classifier(base, basis, TASKS, settings=small(1), checkpoint_dir=Path())

    def texts(split: str, num_rows: int) -> set[tuple[str, int]]:
        return {
            (asked(task.prompt(row).text, NAMES), label)
            for label, task in enumerate(TASKS)
            for row in rows(task, split, num_rows)
        }

    train, validation = ({(row["text"], row["label"]) for row in some} for some in seen)
    assert train == texts("train", 20)
    assert validation == texts("search", 4)
    for other in ("search", "gate"):
        assert not {text for text, _ in train} & {text for text, _ in texts(other, 400)}
    with pytest.raises(HavocError, match="not the gate split"):
        labelled_rows(TASKS, "gate", 3, search_reader())


def test_the_same_settings_train_the_same_classifier(base: Base, basis: Basis, tmp_path: Path) -> None:
    """Bit for bit, names and instruction included."""
    first, again = (
        train_classifier(base, basis, TASKS[:2], settings=small(2), checkpoint_dir=tmp_path / name) for name in "ab"
    )
    assert all(torch.equal(first.deltas[name], again.deltas[name]) for name in first.deltas)
    assert first.settings == again.settings
    assert first.settings["names"] == ["math", "code"]


def test_no_folder_takes_it_for_an_expert(trained: Expert, basis: Basis, small_experts: Path, tmp_path: Path) -> None:
    """It is not listed among the experts, and under an expert's name it is refused."""
    write_expert(trained, classifier_path(tmp_path))
    assert experts_in(tmp_path) == []
    with pytest.raises(HavocError, match="chooses between experts"):
        save_expert(trained, tmp_path)
    classifier_path(tmp_path).rename(expert_path(tmp_path, "math"))
    with pytest.raises(HavocError, match="was trained for 'classifier'"):
        load_experts(tmp_path, ["math"])
    expert_path(tmp_path, "math").rename(tmp_path / "z_vectors_classifier.safetensors")
    with pytest.raises(HavocError, match="chooses between experts"):
        load_experts(tmp_path, experts_in(tmp_path))
    with pytest.raises(HavocError, match="havoc train BASE --classifier"):
        load_classifier(tmp_path, basis=basis)
    classifier_path(tmp_path).write_bytes(expert_path(small_experts, "math").read_bytes())
    with pytest.raises(HavocError, match="an expert of 'math', not a classifier"):
        load_classifier(tmp_path, basis=basis)


def test_another_instruction_is_refused(trained: Expert, basis: Basis, tmp_path: Path) -> None:
    """Scales that were trained behind other words would name experts by chance."""
    other = dataclasses.replace(trained, settings={**trained.settings, "instruction": "\nWhich? {names}"})
    write_expert(other, classifier_path(tmp_path))
    with pytest.raises(HavocError, match="another instruction"):
        load_classifier(tmp_path, basis=basis)


def test_chat_templates_are_not_mixed_up(trained: Expert, basis: Basis, tmp_path: Path) -> None:
    """What was trained on plain text is refused behind a template, and the other way round."""
    for settings, now, words in (({}, True, "without the chat template"), ({"chat": True}, False, "with the chat")):
        write_expert(dataclasses.replace(trained, settings={**trained.settings, **settings}), classifier_path(tmp_path))
        with pytest.raises(HavocError, match=f"was trained {words}"):
            load_classifier(tmp_path, basis=basis, is_chat=now)


@pytest.mark.parametrize("is_chat", [False, True])
def test_training_reads_a_name_as_the_first_pass_scores_it(base: Base, is_chat: bool) -> None:
    """The same tokens of prompt and name: a gradient taken behind other tokens would teach another question."""
    tokenizer = dataclasses.replace(base.tokenizer, chat=Framing()) if is_chat else base.tokenizer
    question = TASKS[0].prompt(rows("math", "train", 1)[0])
    row = {"text": asked(question.text, NAMES), "names": NAMES, "label": 0}
    task = classifier_task(is_chat=is_chat)
    trained = encode_branches(base.model, tokenizer, task.prompt(row), task.choices(row))
    prompts: list[tuple[Prompt, list[str]]] = []

    class Noting:
        def log_likelihoods(self, requests: list) -> list:
            prompts.extend(requests)
            return [[Continuation(0.0, 1, is_greedy=False) for _ in names] for _, names in requests]

    FirstPass(tuple(NAMES)).choose(Noting(), [question])  # type: ignore[arg-type]
    (scored,) = encode_requests(tokenizer, prompts, max_tokens=1024)
    assert tuple(trained.prompt_ids) == scored.prompt_ids
    assert [tuple(ids) for ids in trained.branches] == [tuple(ids) for ids in scored.continuations]


class Framing:
    """A chat template in three words."""

    def render(self, text: str) -> str:
        return f"user: {text}\nassistant: "


def test_the_verb_writes_it(small_experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`havoc train --classifier`: a file of its own name, kept when asked again; one task is nothing to choose from."""
    (tmp_path / "basis.safetensors").write_bytes((small_experts / "basis.safetensors").read_bytes())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[experts]\nprompts_per_step = 4\nnum_train_rows = 8\nnum_validation_rows = 4\n")
    words = ["train", "nano", "--out", str(tmp_path), "--steps", "1", "--recipe", str(recipe), "--quiet"]
    assert main([*words, "--classifier", "math,code"]) == 0
    assert str(classifier_path(tmp_path)) in capsys.readouterr().out
    assert experts_in(tmp_path) == []
    assert main([*words, "--classifier", "math,code"]) == 2
    assert "is a finished expert" in capsys.readouterr().err
    assert main([*words, "--classifier", "math", "--force"]) == 2
    assert "at least 2 experts; found math" in capsys.readouterr().err
    assert main([*words, "--classifier", "math,code", "--task", "math"]) == 2
    assert "not allowed with" in capsys.readouterr().err
