"""Figures of a working process by step: time, memory, and involuntary context switches."""

from __future__ import annotations

import sys
import time
from pathlib import Path

if sys.platform != "win32":
    import resource


class ProcessFigures:
    """Figures of this process since the previous step; `since_last` is called once per step."""

    def __init__(self) -> None:
        """Begin to count."""
        self._before = _now()

    def since_last(self) -> dict[str, float | None]:
        """Wall and CPU time in seconds, involuntary switches, and resident bytes now; None if unknown."""
        before, now = self._before, _now()
        self._before = now
        changes = {name: value - before[name] for name, value in now.items()}
        return {**changes, "rss_bytes": _rss_bytes()}


def _now() -> dict[str, float]:
    times = {"step_s": time.perf_counter(), "cpu_s": time.process_time()}
    if sys.platform == "win32":
        return times
    return {**times, "involuntary_switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw}


def _rss_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError, NameError):
        return None
