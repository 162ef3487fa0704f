"""Accuracy: scored on the exported files, in a child, on named rows, and only ever joined to the right record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.sources import data_hash, rows, rows_hash
from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.accuracy import AccuracyRun, add_accuracy, run_accuracy
from havoc_core.bench.judge.record import DomainAccuracy, Record
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime.session import DecoderSession


@pytest.fixture(scope="module")
def run(tiny_artifact: Path) -> AccuracyRun:
    return run_accuracy(tiny_artifact, Scoring(num_rows=6, max_new_tokens=4), num_threads=1)


def test_every_domain_is_scored(run: AccuracyRun) -> None:
    """A model that reads text and images is scored in all four domains; a random one is right nowhere."""
    assert list(run.tasks) == ["math", "code", "reasoning", "vision"]
    assert all(found.num_rows == 6 and found.split == "gate" for found in run.tasks.values())
    assert all(len(run.right[task]) == 6 for task in run.tasks)
    assert run.tasks["math"].num_right == sum(run.right["math"]) == 0


def test_rows_are_named_by_content(run: AccuracyRun) -> None:
    """The record names the very rows of the gate split, so another machine can score them again."""
    assert run.tasks["math"].rows_sha256 == rows_hash(rows("math", "gate", 6))
    assert run.tasks["math"].source == "built-in math"
    assert run.tasks["math"].task_sha256 == load_task("math").sha256
    assert run.tasks["math"].data_sha256 is None  # no file was read


def test_a_journal_keeps_one_letter_a_row(run: AccuracyRun) -> None:
    """What a run's journal holds of an artifact's answers stays readable by every version."""
    document = run.to_json()
    assert document.keys() == {"files", "manifest_sha256", "tasks", "right", "num_cut", "alpha"}
    assert document["right"]["math"] == "000000"
    assert AccuracyRun.from_json(json.loads(json.dumps(document))) == run


CHOICE = """
name = "parity"
kind = "choice"
metric = "acc_norm"
[data]
path = "parity"
problem = ["question"]
[data.splits]
train = "train"
gate = "test"
[prompt]
template = "{{ question }}"
[choice]
choices = "choices"
label = "label"
"""


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    """A task of one's own, 12 rows beside its file."""
    folder = tmp_path / "own" / "parity"
    folder.mkdir(parents=True)
    for part, start in (("train", 100), ("test", 0)):
        found = [
            {"question": f"Is {number} even or odd?", "choices": ["even", "odd", "red"], "label": number % 2}
            for number in range(start, start + 12)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    file = tmp_path / "own" / "parity.toml"
    file.write_text(CHOICE)
    return file


def test_a_task_of_ones_own_is_scored_by_likelihood(tiny_artifact: Path, own_task: Path, tiny_record) -> None:
    """Every metric, the solved rows, the file and the data stand in the record; it is written and read back."""
    run = run_accuracy(tiny_artifact, Scoring(tasks=(str(own_task),), num_rows=12, few_shot=2), num_threads=1)
    found = run.tasks["parity"]
    task = load_task(own_task, few_shot=2)
    assert (found.metric, found.few_shot, found.chat, found.num_rows) == ("acc_norm", 2, False, 12)
    assert (found.task_sha256, found.source) == (task.sha256, task.dataset)
    assert found.data_sha256 == data_hash(task, "gate")
    assert list(found.metrics) == ["acc", "acc_norm"]
    assert found.metrics["acc_norm"].num_right == found.num_right == sum(run.right["parity"])
    asked = [(task.prompt(row), task.choices(row)) for row in rows(task, "gate", 12)]
    assert asked[0][0].text.count("Is ") == 3
    likely = DecoderSession.open(tiny_artifact, num_threads=1).log_likelihoods(asked)
    best = [max(range(3), key=lambda place, row=row: row[place].log_likelihood) for row in likely]
    assert found.metrics["acc"].num_right == sum(place == number % 2 for number, place in enumerate(best))
    again = Record.model_validate_json(json.dumps(add_accuracy(tiny_record, run).document()))
    assert again.accuracy["parity"].is_right() == run.right["parity"]
    assert again.accuracy["parity"].model_copy(update={"right_rows": None}) == found
    assert again.is_intact()


def test_counts_by_metric_must_agree() -> None:
    """A record whose num_right is not that of its metric is refused; one without metrics is an older one."""
    old = {"num_right": 3, "num_rows": 5, "split": "gate", "rows_sha256": "0" * 64, "source": "built-in math"}
    assert DomainAccuracy.model_validate(old).metrics == {}
    new = old | {"metric": "acc", "metrics": {"acc": {"num_right": 3, "num_rows": 5}}}
    assert DomainAccuracy.model_validate(new).metric == "acc"
    for changes in (
        {"num_right": 2},
        {"metric": "acc_norm"},
        {"metrics": {"acc": {"num_right": 3, "num_rows": 6}}},
        {"metrics": {"acc": {"num_right": 6, "num_rows": 5}}},
    ):
        with pytest.raises(ValidationError):
            DomainAccuracy.model_validate(new | changes)


def test_scoring_repeats(run: AccuracyRun, tiny_artifact: Path) -> None:
    """The same artifact, rows and settings give the same answers."""
    again = run_accuracy(tiny_artifact, Scoring(tasks=("math",), num_rows=6, max_new_tokens=4), num_threads=1)
    assert again.tasks["math"] == run.tasks["math"]
    assert again.right["math"] == run.right["math"]


def test_accuracy_joins_only_its_artifact(run: AccuracyRun, tiny_record) -> None:
    """Accuracy of other bytes than the record's is refused (exit 5); of the same it is sealed in."""
    record = add_accuracy(tiny_record, run)
    assert record.is_intact()
    assert isinstance(record.accuracy["code"], DomainAccuracy)
    for changes in ({"files": {**run.files, "model.onnx": "0" * 64}}, {"manifest_sha256": "0" * 64}):
        with pytest.raises(IdentityError, match="another artifact"):
            add_accuracy(tiny_record, replace(run, **changes))


def test_impossible_requests_are_one_line(tiny_artifact: Path) -> None:
    """Unknown domains and splits and no rows are HavocErrors; the child's words reach the parent."""
    with pytest.raises(HavocError, match="unknown task 'music'"):
        run_accuracy(tiny_artifact, Scoring(tasks=("music",), num_rows=2), num_threads=1)
    with pytest.raises(HavocError, match="unknown split 'all'"):
        run_accuracy(tiny_artifact, Scoring(tasks=("math",), num_rows=2, split="all"), num_threads=1)
    with pytest.raises(HavocError, match="at least 1"):
        run_accuracy(tiny_artifact, Scoring(num_rows=0))
