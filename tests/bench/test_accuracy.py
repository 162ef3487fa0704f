"""Accuracy: scored on the exported files, in a child, on named rows, and only ever joined to the right record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from havoc_core.adapt.tasks.sources import rows, rows_hash
from havoc_core.bench.accuracy import AccuracyRun, add_accuracy, run_accuracy
from havoc_core.bench.record import DomainAccuracy
from havoc_core.errors import HavocError, IdentityError


@pytest.fixture(scope="module")
def run(tiny_artifact: Path) -> AccuracyRun:
    return run_accuracy(tiny_artifact, num_rows=6, max_new_tokens=4, num_threads=1)


def test_every_domain_is_scored(run: AccuracyRun) -> None:
    """A model that reads text and images is scored in all four domains; a random one is right nowhere."""
    assert list(run.domains) == ["math", "code", "reasoning", "vision"]
    assert all(found.num_rows == 6 and found.split == "gate" for found in run.domains.values())
    assert all(len(run.right[domain]) == 6 for domain in run.domains)
    assert run.domains["math"].num_right == sum(run.right["math"]) == 0


def test_rows_are_named_by_content(run: AccuracyRun) -> None:
    """The record names the very rows of the gate split, so another machine can score them again."""
    assert run.domains["math"].rows_sha256 == rows_hash(rows("math", "gate", 6))
    assert run.domains["math"].source == "built-in math"


def test_scoring_repeats(run: AccuracyRun, tiny_artifact: Path) -> None:
    """The same artifact, rows and settings give the same answers."""
    again = run_accuracy(tiny_artifact, domains=["math"], num_rows=6, max_new_tokens=4, num_threads=1)
    assert again.domains["math"] == run.domains["math"]
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
    with pytest.raises(HavocError, match="unknown domain 'music'"):
        run_accuracy(tiny_artifact, domains=["music"], num_rows=2, num_threads=1)
    with pytest.raises(HavocError, match="unknown split 'all'"):
        run_accuracy(tiny_artifact, domains=["math"], num_rows=2, split="all", num_threads=1)
    with pytest.raises(HavocError, match="at least 1"):
        run_accuracy(tiny_artifact, num_rows=0)
