"""Ways of doing one thing, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_times_s(
    *ways: Callable[[], object], num_rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The shortest time of each way; they take turns, so a busy machine slows all alike.

    The first round is dropped, where there are several.
    """
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(num_rounds + (num_rounds > 1)):
        for way, own in zip(ways, times, strict=True):
            start_s = clock()
            way()
            own.append(clock() - start_s)
    return [min(own[num_rounds > 1 :]) for own in times]
