"""Trackers are told what the file holds, each thing once; one that fails is named and the work goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core.errors import HavocError
from havoc_core.track import tracker
from havoc_core.track.metrics_file import MetricsFile, points_of
from havoc_core.track.tracker import About, Tracking, require_trackers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AXIS = "svf/math/step"


class Heard:
    """A tracker that remembers, and fails when it is told to."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.points: list[tuple[str | None, int | None]] = []
        self.tables: list[str] = []
        self.references: list[str] = []
        self.num_finished = 0
        self.failing: Exception | None = None

    def open_run(self, about: About, run_id: str) -> Heard:
        self.opened.append(run_id)
        return self

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float]) -> None:
        if self.failing is not None:
            raise self.failing
        self.points.append((axis, step))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables.append(name)

    def reference(self, name: str, kind: str, path: Path) -> None:
        self.references.append(name)

    def finish(self) -> None:
        self.num_finished += 1


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """A tracker that is opened in place of wandb."""
    module = ModuleType("havoc_core.track.wandb_run")
    one = Heard()
    module.open_run = one.open_run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "havoc_core.track.wandb_run", module)
    monkeypatch.setattr(tracker, "_FOLLOW_EVERY_S", 0.0)
    return one


def tracking(folder: Path, told: list[str] | None = None) -> Tracking:
    about = About(folder=folder, config={}, job="run", group="g")
    return Tracking(about, ["wandb"], warn=pytest.fail if told is None else told.append)


def test_a_tracker_is_told_each_point_once(heard: Heard, tmp_path: Path) -> None:
    """What other processes wrote too; a run that goes on goes on under the same id."""
    with tracking(tmp_path) as one:
        one.log(AXIS, 1, {"svf/math/loss": 0.5})
        MetricsFile(tmp_path, warn=pytest.fail).log("svf/code/step", 1, {"svf/code/loss": 0.5})
    assert heard.points == [(AXIS, 1), ("svf/code/step", 1)]
    with tracking(tmp_path) as one:
        one.log(AXIS, 1, {"svf/math/loss": 0.5})
        one.log(AXIS, 2, {"svf/math/loss": 0.5})
    assert heard.points == [(AXIS, 1), ("svf/code/step", 1), (AXIS, 2)]
    assert len(set(heard.opened)) == 1
    assert heard.num_finished == 2


def test_where_nothing_is_new_no_run_is_opened(heard: Heard, tmp_path: Path) -> None:
    """The same command on a finished folder leaves no empty run behind."""
    for _ in range(2):
        with tracking(tmp_path) as one:
            one.log(None, None, {"final/accuracy": 0.5})
            one.table("adas/front", ["key"], [["a"]])
            one.reference("artifact", "model", tmp_path, "0" * 64)
    assert (len(heard.opened), heard.tables, heard.references) == (1, ["adas/front"], ["artifact"])
    with tracking(tmp_path) as one:
        one.table("adas/front", ["key"], [["b"]])
    assert heard.tables == ["adas/front"] * 2


def test_one_that_fails_is_one_line_and_is_told_the_rest_later(heard: Heard, tmp_path: Path) -> None:
    """The work goes on, the file holds everything, and the next run of the command hands over what was missed."""
    told: list[str] = []
    heard.failing = ValueError("the key\nis wrong\x1b[2J")
    with tracking(tmp_path, told) as one:
        for step in (1, 2):
            one.log(AXIS, step, {"svf/math/loss": 0.5})
        one.table("adas/front", ["key"], [["a"]])
    assert len(told) == 1
    assert told[0].startswith("wandb failed and gets no more metrics (the key is wrong")
    assert told[0].isprintable()
    assert [step for _, step, _ in points_of((tmp_path / "metrics.jsonl").read_bytes())] == [1, 2]
    heard.failing = None
    with tracking(tmp_path) as one:
        one.log(AXIS, 3, {"svf/math/loss": 0.5})
        one.table("adas/front", ["key"], [["a"]])
    assert heard.points == [(AXIS, 1), (AXIS, 2), (AXIS, 3)]
    assert heard.tables == ["adas/front"]


def test_where_its_place_cannot_be_kept_it_is_one_line(heard: Heard, tmp_path: Path) -> None:
    """A folder in the place of tracking.json, as a full disk does: the tracker is left alone and its run ended."""
    told: list[str] = []
    (tmp_path / "tracking.json" / "a").mkdir(parents=True)
    with tracking(tmp_path, told) as one:
        for step in (1, 2):
            one.log(AXIS, step, {"svf/math/loss": 0.5})
    assert len(told) == 1
    assert "tracking.json" in told[0]
    assert (heard.points, heard.num_finished) == ([(AXIS, 1)], 1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_was_taken_out_is_not_told_again(heard: Heard, tmp_path: Path) -> None:
    """An expert that is trained anew: the tracker hears the new steps, and no old one twice."""
    with tracking(tmp_path) as one:
        one.log("svf/code/step", 1, {"svf/code/loss": 0.5})
        one.log(AXIS, 1, {"svf/math/loss": 0.5})
        one.forget("svf/math/")
        one.log(AXIS, 1, {"svf/math/loss": 0.25})
    assert heard.points == [("svf/code/step", 1), (AXIS, 1), (AXIS, 1)]


@pytest.mark.parametrize("text", ["", "null", "[]", '{"wandb": 1}', '{"wandb": {"run_id": "x"}}', "{"])
def test_a_state_that_is_damaged_starts_anew(heard: Heard, tmp_path: Path, text: str) -> None:
    """Rather told twice than not at all."""
    with tracking(tmp_path) as one:
        one.log(AXIS, 1, {"svf/math/loss": 0.5})
    (tmp_path / "tracking.json").write_text(text)
    with tracking(tmp_path) as one:
        one.log(AXIS, 2, {"svf/math/loss": 0.5})
    assert heard.points == [(AXIS, 1), (AXIS, 1), (AXIS, 2)]
    assert json.loads((tmp_path / "tracking.json").read_text())["wandb"]["num_bytes"] > 0


def test_a_tracker_that_is_not_there_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it, or the names there are."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(HavocError, match=r'wandb .*pip install "havoc-core\[wandb\]"'):
        require_trackers(["wandb"])
    with pytest.raises(HavocError, match="'mlflow'; .*wandb, trackio"):
        require_trackers(["mlflow"])
