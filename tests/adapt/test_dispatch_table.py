"""The comparison of ways of dispatch: every system on the same rows, nothing chosen on them, every count adds up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from havoc_core.adapt import dispatch_table as module
from havoc_core.adapt.alpha_search import CrossEntropySettings
from havoc_core.adapt.answer_book import AnswerBook, mixed_stream
from havoc_core.adapt.dispatch import Chooser, open_mixtures
from havoc_core.adapt.dispatch_table import DispatchSettings, compare_dispatch
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.evaluation import score
from havoc_core.adapt.tasks.sources import rows
from havoc_core.adapt.tasks.task import load_tasks
from havoc_core.bounds import TWO_SIDED, share_ends
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import Base
from havoc_core.model.scorer import TorchScorer
from havoc_core.progress import SILENT

TASKS = load_tasks(("math", "reasoning"))
NUM = 6
SETTINGS = DispatchSettings(
    ways=("prompt", "few-shot"),
    num_rows=NUM,
    max_new_tokens=16,
    num_examples=2,
    search=CrossEntropySettings(population=5, generations=1),
)


@pytest.fixture(autouse=True)
def _few_rows_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SELECTION_ROWS", 2)


def compared(base: Base, folder: Path, settings: DispatchSettings = SETTINGS, tasks: Any = TASKS) -> dict[str, Any]:
    mixtures, basis = open_mixtures(base, folder, SILENT)
    with mixtures:
        return compare_dispatch(mixtures, basis, folder, tasks, settings)


@pytest.fixture(scope="module")
def document(base: Base, small_experts: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SELECTION_ROWS", 2)
        return compared(base, small_experts)


def test_every_count_adds_up(document: dict[str, Any]) -> None:
    """Tasks sum to the stream, verdicts to the counts, rows of the confusion to their task's rows; intervals exact."""
    assert set(document["systems"]) == {
        "base", "best single expert", "fixed mixture", "prompt", "few-shot", "oracle"
    }  # fmt: skip
    for name, shares in document["systems"].items():
        assert shares["mixed"]["num_rows"] == 2 * NUM == len(document["right"][name])
        assert shares["mixed"]["num_right"] == shares["math"]["num_right"] + shares["reasoning"]["num_right"]
        assert shares["mixed"]["num_right"] == document["right"][name].count("1")
        for counts in shares.values():
            expected = share_ends(counts["num_right"], counts["num_rows"], confidence=TWO_SIDED)
            assert (counts["low"], counts["high"]) == expected
    confusion = document["first_pass"]["prompt"]["confusion"]
    assert [sum(row.values()) for row in confusion.values()] == [NUM, NUM]
    own = sum(row[task] for task, row in confusion.items())
    assert document["first_pass"]["prompt"]["own_expert"]["num_right"] == own


def test_the_document_is_json(document: dict[str, Any]) -> None:
    """Without NaN, and back again the same."""
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_cost_of_the_first_pass_is_told(document: dict[str, Any]) -> None:
    """Time of a row in each pass, and the share of both that the first takes."""
    assert document["change_of_scales_ms"] > 0
    facts = document["first_pass"]["prompt"]
    first, second = facts["first_pass_ms_per_row"], facts["second_pass_ms_per_row"]
    assert first > 0
    assert second > 0
    assert facts["first_pass_share"] == pytest.approx(first / (first + second))


def test_systems_answer_as_the_models_they_name(document: dict[str, Any], base: Base, small_experts: Path) -> None:
    """The base's verdicts are those of plain scoring; the oracle's those of each task's own expert."""
    order = document["order"]
    mixtures, _ = open_mixtures(base, small_experts, SILENT)
    with mixtures:
        for task in TASKS:
            some = rows(task, "gate", NUM)
            places = [place for place, name in enumerate(order) if name == task.name]
            own = mixtures.only(mixtures.names.index(task.name))
            for system, alpha in (("base", mixtures.only(None)), ("oracle", own)):
                scores = score(mixtures.scorer(alpha), task, some, max_new_tokens=16)
                verdicts = [document["right"][system][place] == "1" for place in places]
                assert sum(verdicts) == sum(scores.right)
    plain = score(TorchScorer(base.model, base.tokenizer), TASKS[0], rows(TASKS[0], "gate", NUM), max_new_tokens=16)
    assert sum(plain.right) == document["systems"]["base"]["math"]["num_right"]


def test_pairs_are_of_the_same_rows(document: dict[str, Any]) -> None:
    """The margin is the difference of the shares, and the rows that one side alone answers make it."""
    assert {(pair["ours"], pair["theirs"]) for pair in document["pairs"]} == {
        (ours, theirs)
        for ours in ("prompt", "few-shot", "oracle")
        for theirs in ("base", "best single expert", "fixed mixture")
    }
    for pair in document["pairs"]:
        ours, theirs = (document["right"][pair[side]] for side in ("ours", "theirs"))
        assert pair["num_only_ours"] == sum(a > b for a, b in zip(ours, theirs, strict=True))
        assert pair["num_only_theirs"] == sum(a < b for a, b in zip(ours, theirs, strict=True))
        difference = pair["num_only_ours"] - pair["num_only_theirs"]
        assert pair["margin"] == pytest.approx(difference / (2 * NUM))
        assert pair["low"] <= pair["margin"] <= pair["high"]


def test_the_same_seed_is_the_same_comparison(document: dict[str, Any], base: Base, small_experts: Path) -> None:
    """Everything but the times."""
    again = compared(base, small_experts)

    def timeless(found: dict[str, Any]) -> dict[str, Any]:
        few_shot = {task: {**facts, "search_s": None} for task, facts in found["few_shot"].items()}
        confusion = {way: facts["confusion"] for way, facts in found["first_pass"].items()}
        return {**found, "few_shot": few_shot, "first_pass": confusion, "change_of_scales_ms": None}

    assert timeless(again) == timeless(document)


def test_nothing_is_chosen_on_the_rows_that_are_scored(
    base: Base, small_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate's rows are read once, to be scored; where search rows are scored, train rows choose."""
    asked: list[str] = []
    read = sources.rows

    def noted(task: Any, split: str, *words: Any, **more: Any) -> list[dict]:
        asked.append(split)
        return read(task, split, *words, **more)

    monkeypatch.setattr("havoc_core.adapt.tasks.sources.rows", noted)
    one = dataclasses.replace(SETTINGS, ways=("few-shot",), num_rows=2)
    found = compared(base, small_experts, one, TASKS[:1])
    assert (found["selection"]["split"], sorted(asked)) == ("search", ["gate", "search", "train"])
    asked.clear()
    found = compared(base, small_experts, dataclasses.replace(one, split="search"), TASKS[:1])
    assert (found["selection"]["split"], sorted(asked)) == ("train", ["search", "train", "train"])


def test_a_stream_holds_every_row_once_in_a_seeded_order() -> None:
    """Rows of all tasks, mixed: the same order for the same seed, and that of another for another."""
    streams = [mixed_stream(TASKS, "gate", 10, seed=seed) for seed in (0, 0, 1)]
    assert streams[0] == streams[1]
    assert streams[0].labels != streams[2].labels
    labels = streams[0].labels
    assert labels not in (tuple(sorted(labels)), tuple(sorted(labels, reverse=True)))
    for place, task in enumerate(TASKS):
        ours = [streams[0].rows[index] for index in streams[0].of(place)]
        expected = rows(task, "gate", 10)
        assert len(ours) == 10
        assert all(row in expected for row in ours)


def test_a_row_is_asked_of_a_mixture_once(base: Base, small_experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that agree about a row share its answer; each answer keeps its place in the stream."""
    asked: list[int] = []
    real = score

    def counted(scorer: Any, task: Any, some: Any, **more: Any) -> Any:
        asked.append(len(some))
        return real(scorer, task, some, **more)

    monkeypatch.setattr("havoc_core.adapt.answer_book.score", counted)
    stream = mixed_stream(TASKS, "gate", 3)
    mixtures, _ = open_mixtures(base, small_experts, SILENT)
    with mixtures, SILENT.stage("answers", None) as stage:
        book = AnswerBook(mixtures, stream, max_new_tokens=4, stage=stage)
        own = [mixtures.only(label) for label in stream.labels]
        first = book.answers(own)
        assert sum(asked) == 6
        assert book.answers(own) == first
        assert sum(asked) == 6
        book.answers([mixtures.only(0)] * 6)
        assert sum(asked) == 9


def test_tasks_without_an_own_expert_have_no_oracle(base: Base, small_experts: Path) -> None:
    """Who would be right always is not known there; every other system is."""
    tasks = load_tasks(("math", "vision"))
    found = compared(base, small_experts, dataclasses.replace(SETTINGS, ways=("prompt",), num_rows=2), tasks)
    assert set(found["systems"]) == {"base", "best single expert", "fixed mixture", "prompt"}
    assert set(found["first_pass"]["prompt"]["confusion"]["vision"]) == {"math", "code", "reasoning"}


def test_a_first_pass_that_never_errs_is_the_oracle(
    base: Base, small_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same mixtures, so the same verdicts row by row."""

    def knows(self: Chooser, prompts: Any) -> list[int]:
        return [self.mixtures.names.index("reasoning" if "\nA. " in prompt.text else "math") for prompt in prompts]

    monkeypatch.setattr(Chooser, "places", knows)
    found = compared(base, small_experts, dataclasses.replace(SETTINGS, ways=("prompt",)))
    assert found["right"]["prompt"] == found["right"]["oracle"]
    assert found["first_pass"]["prompt"]["own_expert"]["num_right"] == 2 * NUM


def test_what_cannot_be_compared_is_refused(base: Base, small_experts: Path, tmp_path: Path) -> None:
    """Before anything is answered, in one line."""
    with pytest.raises(HavocError, match="--alpha: .*poetry; .*math, code, reasoning"):
        compared(base, small_experts, dataclasses.replace(SETTINGS, fixed={"math": 1.0, "poetry": 0.5}))
    with pytest.raises(HavocError, match="one task, but 2 are scored"):
        compared(base, small_experts, dataclasses.replace(SETTINGS, examples_file=tmp_path / "x.jsonl"))
    with pytest.raises(HavocError, match="havoc train BASE --classifier"):
        compared(base, small_experts, dataclasses.replace(SETTINGS, ways=("classifier",)))


def test_examples_that_are_scored_are_refused(base: Base, small_experts: Path, tmp_path: Path) -> None:
    """A file may hold search rows, but not those that are scored."""
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(TASKS[0], "search", 2)))
    settings = dataclasses.replace(SETTINGS, ways=("few-shot",), examples_file=file, num_rows=1)
    with pytest.raises(HavocError, match=r"1 of 2 examples are rows of math"):
        compared(base, small_experts, dataclasses.replace(settings, split="search"), TASKS[:1])
    assert compared(base, small_experts, settings, TASKS[:1])["few_shot"]["math"]["num_examples"] == 2
