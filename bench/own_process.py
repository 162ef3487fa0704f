"""Figures of this process: resident memory, page faults, and the share of the CPU that others took meanwhile.

Linux gives all of them in /proc. On other systems a value that is not offered is None.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cgroups import throttling

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

LOOK_INTERVAL_NS = 200_000_000  # twenty ticks of the coarsest clock: shorter intervals would be mostly rounding error
_STATUS = Path("/proc/self/status")


def rss_bytes() -> int | None:
    """Resident set now, with shared file pages."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int | None:
    """Highest resident set since the start or the last `reset_peak_rss`, without a sampling gap."""
    peak = _status_bytes("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def peak_rss_of(pid: int) -> int | None:
    """The same for another running process; None if the platform does not report it."""
    return _status_bytes("VmHWM", Path(f"/proc/{pid}/status"))


def reset_peak_rss() -> bool:
    """Reset `peak_rss_bytes`; False if the kernel does not allow it, so that peaks only grow."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status_bytes(key: str, file: Path = _STATUS) -> int | None:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
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


class SurroundingsWatch:
    """Reads counters of the machine between calls and keeps them as columns.

    `busy_ns` is the CPU time of all processes and `stolen_ns` that taken by the hypervisor, both on the CPUs that this
    process may use; `own_ns` is this process's own CPU time. `waited_ns` is the time that a thread was ready to run and
    did not (`/proc/self/task/*/schedstat`), for the thread that waited longest between two readings: a computation on
    many threads waits for the slowest. A column that the system does not count stays empty.
    """

    def __init__(self, *, zero_ns: int) -> None:
        self._zero_ns, self._next_ns = zero_ns, 0
        self._cpus = usable_cpus()
        self._waits, self._waited_ns = _thread_waits(), 0
        self._begin = self._counters()
        self._limits = throttling()
        self._columns: dict[str, list[int]] = {"t_ns": [], **{name: [] for name in self._begin}}
        self.look(force=True)

    def look(self, *, force: bool = False) -> None:
        """Take one reading, unless the last one is less than `LOOK_INTERVAL_NS` old."""
        now = time.perf_counter_ns()
        if now < self._next_ns and not force:
            return
        self._next_ns = now + LOOK_INTERVAL_NS
        counters = self._counters()
        self._columns["t_ns"].append(max(now - self._zero_ns, 0))
        for name, before in self._begin.items():
            self._columns[name].append(max(counters.get(name, before) - before, 0))

    def as_json(self) -> dict[str, Any]:
        """Return the columns in the form of the record, with a last reading; throttling is counted once in total."""
        self.look(force=True)
        now = throttling()
        since = None if now is None or self._limits is None else now.since(self._limits)
        return {
            "num_cpus": len(self._cpus) or os.cpu_count() or 1,
            **self._columns,
            **({} if since is None else asdict(since)),
        }

    def shares(self, begin: int = 0) -> dict[str, float]:
        """`foreign_cpu_share` and `steal_share` in [0, 1] from reading number `begin` on; empty if not counted."""
        moved = {name: column[-1] - column[begin] for name, column in self._columns.items()}
        capacity_ns = moved["t_ns"] * (len(self._cpus) or 1)
        if "busy_ns" not in moved or capacity_ns <= 0:
            return {}
        foreign_ns = max(moved["busy_ns"] - moved["own_ns"], 0)
        return {
            "foreign_cpu_share": min(foreign_ns / capacity_ns, 1.0),
            "steal_share": min(moved["stolen_ns"] / capacity_ns, 1.0),
        }

    def __len__(self) -> int:
        """Readings so far."""
        return len(self._columns["t_ns"])

    def _counters(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if (ticks := busy_and_stolen_ns(self._cpus)) is not None:
            found["busy_ns"], found["stolen_ns"] = ticks
            found["own_ns"] = time.process_time_ns()
        if self._waits is not None:
            now = _thread_waits() or {}
            moved = (wait - self._waits.get(thread, 0) for thread, wait in now.items())
            self._waited_ns += max(moved, default=0)
            self._waits = now
            found["waited_ns"] = self._waited_ns
        return found


def usable_cpus() -> frozenset[int]:
    """Numbers of the CPUs that this process may run on; empty if the platform does not report them."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def busy_and_stolen_ns(cpus: AbstractSet[int]) -> tuple[int, int] | None:
    """Used CPU time, and time taken by the hypervisor, on the given CPUs since boot; None off Linux."""
    with contextlib.suppress(OSError, ValueError):
        busy = stolen = 0
        tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        for line in Path("/proc/stat").read_text().splitlines():
            name, *numbers = line.split()
            if not name.startswith("cpu"):
                break
            if name != "cpu" and int(name[3:]) not in cpus:
                continue
            if name == "cpu" and len(cpus) < (os.cpu_count() or 1):
                continue  # the kernel's total has one rounding error, a sum of CPUs has one for each
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, numbers[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
            if name == "cpu":
                break
        return busy * tick_ns, stolen * tick_ns
    return None


def _thread_waits() -> dict[str, int] | None:
    """Time in ns that each thread of this process was ready but not running; None if the kernel does not count it."""
    waits = {}
    try:
        for task in os.scandir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                waits[task.name] = int(Path(task.path, "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return waits or None
