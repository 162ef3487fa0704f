"""Decide when a process is warm: the medians of two windows of calls agree; and name how it got there.

The words are those of Barrett et al., Virtual Machine Warmup Blows Hot and Cold (OOPSLA 2017).
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_TOLERANCE, MOST_TOLERANCE = 0.02, 0.10
LONE_CALL_TOLERANCE = 0.05  # a window of one call shows no scatter
LONG_CALL_NS = 500_000_000
SURE_SIGMAS = 3.0
MIN_CALLS, MAX_CALLS = 3, 200

Classification = Literal["flat", "warmup", "slowdown", "no_steady_state"]


def calls_per_window(call_ns: int, window_s: float) -> int:
    """The number of calls in a window, so that one interruption does not change its median; between 3 and 200.

    If a call takes half a second or more, one call is a window: it averages over thousands of operations.
    """
    least = MIN_CALLS if call_ns < LONG_CALL_NS else 1
    return min(max(least, math.ceil(window_s * 1e9 / call_ns)), MAX_CALLS)


def window_medians(durations_ns: Sequence[int], window: int) -> list[int]:
    """Median of each whole window of calls, in order."""
    return [int(statistics.median(calls)) for calls in _windows(durations_ns, window)]


def _windows(durations_ns: Sequence[int], window: int) -> list[Sequence[int]]:
    starts = range(0, len(durations_ns) - window + 1, window)
    return [durations_ns[start : start + window] for start in starts]


def tolerance_of(durations_ns: Sequence[int], window: int) -> float:
    """The allowed difference between the medians of the last two windows, as a share, from the scatter of their calls.

    Three standard errors of the difference of two medians. The scatter comes from the mean absolute deviation, which a
    single interruption changes little; a normal sample's median has 1.2533 times the error of its mean. At least 2 %,
    and at most 10 %: calls with more scatter have no steady level.
    """
    if window == 1:
        return LONE_CALL_TOLERANCE
    last = _windows(durations_ns, window)[-2:]
    if len(last) < 2:  # noqa: PLR2004 - two windows are compared
        return LEAST_TOLERANCE
    level = max(statistics.median(calls) for calls in last)
    deviations = [abs(call - statistics.median(calls)) for calls in last for call in calls]
    sigma = math.sqrt(math.pi / 2) * statistics.fmean(deviations) * window / (window - 1)
    error = 1.2533 * sigma * math.sqrt(2 / window)
    return min(max(SURE_SIGMAS * error / level, LEAST_TOLERANCE), MOST_TOLERANCE)


def is_steady(medians_ns: Sequence[int], tolerance: float) -> bool:
    """Whether the last two windows agree within the tolerance."""
    return len(medians_ns) > 1 and _agree(medians_ns[-2], medians_ns[-1], tolerance)


def classify(medians_ns: Sequence[int], tolerance: float) -> Classification:
    """Name the way from the first window to the steady level: unchanged, from slower, from faster, or not reached."""
    if not is_steady(medians_ns, tolerance):
        return "no_steady_state"
    first, level = medians_ns[0], medians_ns[-1]
    if _agree(first, level, 2 * tolerance):
        return "flat"
    return "warmup" if first > level else "slowdown"


def _agree(first: int, second: int, tolerance: float) -> bool:
    return abs(first - second) <= tolerance * max(first, second)
