"""Warm-up: four ways to a steady state, told apart."""

from __future__ import annotations

import random

import pytest

from havoc_core.bench.warmup import calls_per_window, classify, is_steady, tolerance_of, window_medians


@pytest.mark.parametrize(
    ("medians", "word"),
    [
        ([100, 101], "flat"),
        ([103, 101, 100, 100], "flat"),
        ([180, 130, 101, 100], "warmup"),
        ([100, 110, 121, 122], "slowdown"),
        ([100, 95, 121, 122], "slowdown"),
        ([100, 96, 103, 104], "flat"),
        ([100, 105, 106], "slowdown"),
        ([100, 120, 100, 120], "no_steady_state"),
        ([100], "no_steady_state"),
        ([], "no_steady_state"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_classes(medians: list[int], word: str) -> None:
    """The first window against the steady level names the class; two disagreeing last windows are no steady state."""
    assert classify(medians, 0.02) == word


def test_windows_agree_within_the_tolerance() -> None:
    """Two windows 2 % apart agree at 2 %, 3 % apart do not, and do at 4 %."""
    assert is_steady([1000, 1020], 0.02)
    assert is_steady([1000, 980], 0.02)
    assert not is_steady([1000, 1031], 0.02)
    assert is_steady([1000, 1031], 0.04)


@pytest.mark.parametrize("scatter", [0.001, 0.02, 0.05])
def test_a_level_process_settles_at_whatever_noise_it_has(scatter: float) -> None:
    """Of processes without any drift, at least 95 of 100 settle at the first two windows, however their calls scatter.

    At a fixed 2 % those that scatter by 5 % would settle in a third of all cases.
    """
    generator, settled, trials = random.Random(1), 0, 200
    for _ in range(trials):
        calls = [round(1e7 * generator.gauss(1, scatter)) for _ in range(20)]
        settled += is_steady(window_medians(calls, 10), tolerance_of(calls, 10))
    assert settled >= 0.95 * trials


def test_a_drift_beyond_the_noise_is_no_steady_state() -> None:
    """Windows apart by ten times their scatter do not agree, and no scatter excuses more than 10 %."""
    calm = [10_000_000 + 10_000 * (place % 3) for place in range(10)]
    slower = [round(1.05 * call) for call in calm]
    assert not is_steady(window_medians(calm + slower, 10), tolerance_of(calm + slower, 10))
    wild = [10_000_000, 30_000_000] * 10
    assert tolerance_of(wild, 10) == 0.10


def test_windows_last_long_enough() -> None:
    """A window holds as many calls as fill its time, within 3 and 200; of calls of half a second, one."""
    durations_ns = (10_000_000, 499_000_000, 500_000_000, 2_000_000_000, 1_000)
    assert [calls_per_window(call_ns, 0.1) for call_ns in durations_ns] == [10, 3, 1, 1, 200]
    assert tolerance_of([500, 501], 1) == 0.05


def test_windows_are_whole_and_robust() -> None:
    """A trailing part is left out, and one outlier does not move a window."""
    assert window_medians([10, 11, 900, 20, 21, 22, 5], 3) == [11, 21]
