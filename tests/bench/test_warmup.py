"""Warm-up: four ways to a steady state, told apart."""

from __future__ import annotations

import pytest

from havoc_core.bench.warmup import calls_per_window, classify, is_steady, window_medians


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
    assert classify(medians) == word


def test_steadiness_is_two_percent() -> None:
    """Two windows 2 % apart agree, 3 % apart do not."""
    assert is_steady([1000, 1020])
    assert is_steady([1000, 980])
    assert not is_steady([1000, 1031])


def test_windows_last_long_enough() -> None:
    """A window holds as many calls as fill its time, but never fewer than 3 or more than 200."""
    assert [calls_per_window(call_ns, 0.1) for call_ns in (10_000_000, 2_000_000_000, 1_000)] == [10, 3, 200]


def test_windows_are_whole_and_robust() -> None:
    """A trailing part is left out, and one outlier does not move a window."""
    assert window_medians([10, 11, 900, 20, 21, 22, 5], 3) == [11, 21]
