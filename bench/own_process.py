"""What a process can tell about itself: resident memory, page faults, and how much of the CPU others took meanwhile.

Linux gives all of it through /proc. Elsewhere a value that the platform does not offer is None.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")


def rss_bytes() -> int | None:
    """Resident set now, shared file pages included."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int | None:
    """Highest resident set since the start or the last `reset_peak_rss`, without a sampling gap."""
    peak = _status_bytes("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` start anew; False where the kernel does not allow it, so that peaks only grow."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status_bytes(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def own_usage() -> dict[str, int]:
    """Counters of this process so far: forced context switches and page faults that went to the disk."""
    if sys.platform == "win32":
        return {}
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"involuntary_switches": usage.ru_nivcsw, "major_page_faults": usage.ru_majflt}


class CpuShare:
    """From its making on: the share of the machine's CPU that other processes, and the hypervisor, took."""

    def __init__(self) -> None:
        self._begin = (_system_ticks(), time.process_time())

    def since(self) -> dict[str, float]:
        """`foreign_cpu_share` and `steal_share` in [0, 1]; empty where the system does not count."""
        begin, end = self._begin[0], _system_ticks()
        if begin is None or end is None or end[0] <= begin[0]:
            return {}
        total, busy, steal = (after - before for before, after in zip(begin, end, strict=True))
        own = (time.process_time() - self._begin[1]) * os.sysconf("SC_CLK_TCK")
        foreign = min(max(busy - own, 0.0), total)
        return {"foreign_cpu_share": foreign / total, "steal_share": min(steal / total, 1.0)}


def _system_ticks() -> tuple[float, float, float] | None:
    """All, busy and stolen ticks of all CPUs since boot."""
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, idle, iowait, irq, softirq, steal = map(
            float, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + softirq
        return busy + idle + iowait + steal, busy, steal
    return None
