"""Clocks that reach this process by different ways, so that one that was bent differs from the others.

    perf_counter     what calls are timed with: clock_gettime of the C library, which a preloaded library may replace
    monotonic_raw    the same kernel asked by the bare system call, its clock not steered by any time server
    uptime           what the kernel writes into /proc/uptime, in hundredths of a second

Whoever owns the machine can bend all of them; a `sitecustomize` or an LD_PRELOAD that bends time bends the first.
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
    """How far each clock went on since `before`, in nanoseconds."""
    return {name: max(now - before[name], 1) for name, now in clock_readings().items() if name in before}


def _monotonic_raw_ns() -> int | None:
    number = _CLOCK_GETTIME.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        return None
    found = _Timespec()
    failed = ctypes.CDLL(None).syscall(number, _CLOCK_MONOTONIC_RAW, ctypes.byref(found))
    return None if failed else found.seconds * 1_000_000_000 + found.nanoseconds
