"""Clocks that reach this process in different ways, so that a manipulated clock differs from the others.

    perf_counter     times the calls: clock_gettime of the C library, which a preloaded library may replace
    monotonic_raw    the same kernel by a direct system call; no time server changes this clock
    uptime           /proc/uptime from the kernel, in hundredths of a second

The owner of the machine can manipulate all of them; a `sitecustomize` or an LD_PRELOAD can manipulate the first.
Sources: clock_gettime(2), proc_uptime(5).
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_CLOCK_GETTIME = {"x86_64": 228, "aarch64": 113}
_CLOCK_MONOTONIC_RAW = 4
_UPTIME = Path("/proc/uptime")


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def clock_readings() -> dict[str, int]:
    """Every clock of this system, each in nanoseconds since its own start."""
    readings = {"perf_counter": time.perf_counter_ns()}
    if (raw := _monotonic_raw_ns()) is not None:
        readings["monotonic_raw"] = raw
    try:
        readings["uptime"] = round(float(_UPTIME.read_text().split()[0]) * 1e9)
    except (OSError, ValueError, IndexError):
        return readings
    return readings


def clock_spans(before: Mapping[str, int]) -> dict[str, int]:
    """The time since `before` by each clock, in nanoseconds."""
    return {name: max(now - before[name], 1) for name, now in clock_readings().items() if name in before}


def _monotonic_raw_ns() -> int | None:
    number = _CLOCK_GETTIME.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        return None
    found = _Timespec()
    failed = ctypes.CDLL(None).syscall(number, _CLOCK_MONOTONIC_RAW, ctypes.byref(found))
    return None if failed else found.seconds * 1_000_000_000 + found.nanoseconds
