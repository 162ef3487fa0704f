"""Quantities as people read them."""

from __future__ import annotations

import pytest

from havoc_core.bench.judge.figures import DASH, count, show, show_interval
from havoc_core.bench.judge.metrics import METRICS, measured, metric_of
from havoc_core.bench.judge.record import Record
from havoc_core.bounds import rate_bounds


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "ms", DASH),
        (17.52, "ms", "17.5 ms"),
        (1171.0, "ms", "1.17 s"),
        (0.3054, "ms", "305 µs"),
        (2e9, "bytes", "2 GB"),
        (148_600_000, "bytes", "149 MB"),
        (0, "bytes", "0 B"),
        (0.912, "share", "91.2 %"),
        (626.3, "tok/s", "626 tok/s"),
        (30_645.0, "tok/s", "30,645 tok/s"),
        (0.15, "s", "150 ms"),
    ],
)
def test_a_value_has_three_digits_and_a_unit(value: float | None, unit: str, text: str) -> None:
    """Scaled to the unit a person would say; what was not measured is a dash, never 0."""
    assert show(value, unit) == text


def test_intervals() -> None:
    """Both ends, one, or none; equal ends are one figure."""
    assert show_interval(0.896, 0.926, "share") == f"89.6 {DASH} 92.6 %"
    assert show_interval(None, 3.0, "ms") == "≤ 3 ms"
    assert show_interval(3.0, None, "ms") == "≥ 3 ms"
    assert show_interval(3.0, 3.0, "ms") == "3 ms"
    assert show_interval(None, None, "ms") == DASH


def test_decode_is_the_gates_rate(tiny_record: Record) -> None:
    """One estimator for one quantity: the figure a person reads is the one that a limit judges."""
    runs = [
        [(float(len(run.step_ns)), sum(run.step_ns) / 1e9) for run in process.decode if run.step_ns]
        for process in tiny_record.samples
    ]
    expected = rate_bounds(runs, confidence=0.95).value
    assert measured(tiny_record)["decode_tok_per_s"] == pytest.approx(expected)
    assert metric_of("prefill_ms").label == "prefill_ms, median"
    assert set(METRICS) - {"kl_mean", "top1_share"} <= set(measured(tiny_record))


def test_counts() -> None:
    """One of a thing, many of it, thousands apart."""
    assert [count(1, "process"), count(2, "process"), count(1200, "sample")] == [
        "1 process",
        "2 processes",
        "1,200 samples",
    ]
