"""What is written on one side is read as the same type on the other, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.reward import Prompt
from havoc_core.bench.accuracy import ScoreRequest, TaskScores
from havoc_core.bench.judge.schema import ColdStart, DomainAccuracy, Workload
from havoc_core.bench.profiles import PROFILES
from havoc_core.bench.requests import ColdStartResult, MeasureRequest, PeakMemory, Work
from havoc_core.messages import plain, read

WORK = Work(batch_size=1, prompt_tokens=8, context_tokens=8, decode_tokens=4, passes=1, seed=3)
REQUEST = MeasureRequest(
    artifact=Path("/a/b"),
    provider="CPUExecutionProvider",
    num_threads=2,
    captures_steps=False,
    workload=WORK,
    profile=PROFILES["quick"],
    process=1,
)
COUNTS = DomainAccuracy(
    num_right=1, num_rows=2, split="gate", rows_sha256="0" * 64, source="rows", metrics={}, right_rows=None
)
MESSAGES = [
    REQUEST,
    ScoreRequest(
        artifact=Path("a"), provider="CPU", num_threads=1, scoring=Scoring(tasks=("math",), data_dir=Path("d"))
    ),
    ScoreRequest(artifact=Path("a"), provider="CPU", num_threads=1, scoring=Scoring()),
    TaskScores(tasks={"math": COUNTS}, right={"math": (True, False)}),
    Prompt("what is it", b"\x89PNG\xff"),
    PeakMemory(baseline_bytes=None, phase_peak_bytes={"load": 5, "steady": None}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_a_message_is_read_as_it_was_written(message: Any) -> None:
    """Through JSON, every field, nested types, paths and pydantic models included."""
    assert read(type(message), json.loads(json.dumps(plain(message), allow_nan=False))) == message


@dataclass(frozen=True)
class Turn:
    number: int
    share: float


@dataclass(frozen=True)
class Turns:
    title: str | None
    turns: tuple[Turn, ...]
    by: Literal["hand", "clock"] = "hand"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"title": "t", "by": "hand"}, "turns is missing or unknown"),
        ({"title": "t", "turns": [], "by": "hand", "more": 1}, "more is missing or unknown"),
        ({"title": 3, "turns": [], "by": "hand"}, "message.title is 3, expected str"),
        ({"title": None, "turns": {}, "by": "hand"}, "message.turns is {}"),
        (
            {"title": None, "turns": [{"number": True, "share": 0.5}], "by": "hand"},
            r"message.turns\[0\].number is True, expected int",
        ),
        ({"title": None, "turns": [{"number": 1, "share": "0.5"}], "by": "hand"}, r"message.turns\[0\].share is '0.5'"),
        ({"title": None, "turns": [], "by": "foot"}, "message.by is 'foot', expected .*hand"),
        ([], r"message is \[\], expected Turns"),
    ],
)
def test_another_form_is_refused_by_the_name_of_its_field(found: Any, words: str) -> None:
    """Two processes that do not mean the same end in one line, and in no wrong figure."""
    with pytest.raises(TypeError, match=words):
        read(Turns, found)


def test_a_whole_number_may_stand_for_a_share() -> None:
    """JSON has one kind of number, Python two."""
    assert read(Turn, {"number": 1, "share": 1}) == Turn(1, 1.0)


def test_what_the_child_is_told_and_tells_is_the_records() -> None:
    """The light types of the child name fields of the record's own, which need pydantic."""
    assert {field.name for field in fields(Work)} <= set(Workload.model_fields)
    assert {field.name for field in fields(ColdStartResult)} == set(ColdStart.model_fields) - {"startup_ns"}
