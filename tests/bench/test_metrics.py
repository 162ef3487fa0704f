"""The table of metrics: an entry added from outside is judged, compared, shown and remembered like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from havoc_core.bench.judge.compare import compare
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.metrics import METRICS, Metric, Trend, measured, metric_of
from havoc_core.bench.judge.record import Record
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report import page
from havoc_core.bench.report.folder import junit
from havoc_core.bench.report.history import entry
from havoc_core.bench.report.run import Run
from tests.bench import sample_records as samples

TARGET = """
[board]
title = "a board"
[board.device]
kind = "cpu"
is_this_machine = true
[[board.limits]]
metric = "reply_ms"
below = {below}
unit = "ms"
"""


def slowest(record: Record) -> float | None:
    return max((ms for process in record.samples for ms in process.ttft_ms), default=None)


@pytest.fixture
def reply(monkeypatch: pytest.MonkeyPatch) -> Metric:
    """A metric that HAVOC does not have: one entry, as docs/extending.md shows it."""
    metric = Metric(
        name="reply_ms",
        title="reply",
        kind="latency",
        unit="ms",
        scales={"ms": 1.0},
        lowest=1e-3,
        highest=1e6,
        statistic="slowest",
        read=slowest,
        calls=lambda process: process.ttft,
        trend=Trend(read=slowest, statistic="slowest"),
    )
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


@pytest.mark.parametrize(("below", "verdict"), [(0.01, "fail"), (1000.0, "pass")])
def test_a_metric_from_outside_is_judged_and_shown(reply: Metric, tmp_path: Path, below: float, verdict: str) -> None:
    """Gate, page, JUnit: with its own title, unit, bound and verdict."""
    path = tmp_path / "own.toml"
    path.write_text(TARGET.format(below=below))
    record, target = samples.record("cpu"), load_target(str(path))
    judgement = judge([record], target, this_cpu=samples.THIS_CPU)
    (line,) = judgement.lines
    assert (line.metric, line.title, line.unit, line.verdict) == ("reply_ms", "reply", "ms", verdict)
    assert judgement.verdict == verdict
    assert "reply_ms" not in {figure.metric for figure in judgement.unlimited}
    run = Run(record=record, judged=((target, judgement),))
    assert "reply" in page.html(run)
    assert 'name="reply_ms"' in junit(run).decode()


def test_a_metric_from_outside_is_compared_and_remembered(reply: Metric) -> None:
    """Beside those that a target limits: in the comparison, among the figures, in the history."""
    record = samples.record("cpu")
    (row,) = [row for row in compare(record, samples.second()) if row.metric == "reply_ms"]
    assert (row.title, row.unit) == ("reply", "ms")
    assert row.ratio is not None
    assert measured(record)["reply_ms"] == slowest(record)
    assert metric_of("reply_ms").label == "reply_ms, slowest"
    assert entry("run", record, [])["metrics"]["reply_ms"] == slowest(record)
    judgement = judge([record], load_target("host"), this_cpu=samples.THIS_CPU)
    assert "reply_ms" in {figure.metric for figure in judgement.unlimited}


def test_a_name_that_is_no_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """Every name of the table is offered."""
    with pytest.raises(ValueError, match="unknown metric 'reply_ms'") as caught:
        metric_of("reply_ms")
    assert [name for name in METRICS if name not in str(caught.value)] == []


def test_a_record_holds_what_the_table_reads(tiny_record: Record) -> None:
    """A measured record has a figure for every metric that its device offers, and JSON takes them."""
    found = measured(tiny_record)
    assert {name for name, value in found.items() if value is None} <= {"peak_vram_bytes", "energy_j_per_tok"}
    assert json.loads(json.dumps(found)) == found
