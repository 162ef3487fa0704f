"""When is a process warm: windows of calls whose medians agree, and the name of the way it got there.

The words are those of Barrett et al., Virtual Machine Warmup Blows Hot and Cold (OOPSLA 2017).
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLERANCE = 0.02
MIN_CALLS, MAX_CALLS = 3, 200

Classification = Literal["flat", "warmup", "slowdown", "no_steady_state"]


def calls_per_window(call_ns: int, window_s: float) -> int:
    """As many calls as fill a window, so that its median does not jump with every interruption; within 3 and 200."""
    return min(max(MIN_CALLS, math.ceil(window_s * 1e9 / call_ns)), MAX_CALLS)


def window_medians(durations_ns: Sequence[int], window: int) -> list[int]:
    """Median of each whole window of calls, in order."""
    starts = range(0, len(durations_ns) - window + 1, window)
    return [int(statistics.median(durations_ns[start : start + window])) for start in starts]


def is_steady(medians_ns: Sequence[int], tolerance: float = TOLERANCE) -> bool:
    """Whether the last two windows agree within the tolerance."""
    return len(medians_ns) > 1 and _agree(medians_ns[-2], medians_ns[-1], tolerance)


def classify(medians_ns: Sequence[int], tolerance: float = TOLERANCE) -> Classification:
    """Name the way from the first window to the steady level: unchanged, from slower, from faster, or not arrived."""
    if not is_steady(medians_ns, tolerance):
        return "no_steady_state"
    first, level = medians_ns[0], medians_ns[-1]
    if _agree(first, level, 2 * tolerance):
        return "flat"
    return "warmup" if first > level else "slowdown"


def _agree(first: int, second: int, tolerance: float) -> bool:
    return abs(first - second) <= tolerance * max(first, second)
