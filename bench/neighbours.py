"""Other programs on this machine, before and during a measurement: their share of the CPU, and their names.

It reads every process's CPU time from /proc, before and after a short time. Without /proc nothing is known, and there
is no wait. Names are those of the programs (15 letters), never their arguments.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..progress import SILENT
from .judge.disturbance import FOREIGN_CORES
from .own_process import busy_and_stolen_ns, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ..progress import Progress

PROC = Path("/proc")
LOOK_S = 1.0
LEAST_CORES = 0.02  # a process that used less is not named
MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A program that ran beside the measurement, and its CPU time in cores."""

    name: str
    cores: float

    def __str__(self) -> str:
        """Text for people: `cc1plus (98 % of a core)`."""
        return f"{self.name} ({self.cores:.0%} of a core)"


@dataclass(frozen=True, slots=True)
class Load:
    """CPU time of other programs in cores, the number of CPUs, and the busiest programs."""

    cores: float
    num_cpus: int
    neighbours: tuple[Neighbour, ...] = ()

    @property
    def is_quiet(self) -> bool:
        """Whether a measurement beside it would not be disturbed."""
        return self.cores <= FOREIGN_CORES

    def __str__(self) -> str:
        """Text for people: the sum and the names."""
        names = ", ".join(map(str, self.neighbours)) or "processes too short-lived to be named"
        return f"other processes use {self.cores:.2f} of {self.num_cpus} CPUs: {names}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Name and CPU time of every process so far, and the time of all together, at one moment.

    Processes are identified by id and start time in ticks, because a name may change, as that of a kernel worker does.
    `busy_s` is the time of the CPUs that this process may use, without its own time; it also includes processes too
    short-lived to be listed twice. None if the system does not count it.
    """

    time_s: float
    processes: Mapping[tuple[int, int], tuple[str, float]]
    busy_s: float | None = None

    def since(self, before: Snapshot, *, own_pids: Collection[int] = ()) -> Load:
        """Return the CPU time of processes not in `own_pids` between two snapshots."""
        elapsed_s = max(self.time_s - before.time_s, 1e-9)
        used: dict[str, float] = {}
        for process, (name, cpu_s) in self.processes.items():
            if process[0] not in own_pids:
                _, earlier_s = before.processes.get(process, (name, 0.0))
                used[name] = used.get(name, 0.0) + max(cpu_s - earlier_s, 0.0)
        cores = {name: seconds / elapsed_s for name, seconds in used.items()}
        busiest = sorted((item for item in cores.items() if item[1] >= LEAST_CORES), key=lambda item: -item[1])
        total = sum(cores.values())
        if self.busy_s is not None and before.busy_s is not None:
            total = max(self.busy_s - before.busy_s, 0.0) / elapsed_s
        num_cpus = len(usable_cpus()) or os.cpu_count() or 1
        return Load(min(total, num_cpus), num_cpus, tuple(Neighbour(*item) for item in busiest[:MOST_NAMES]))


def snapshot(proc: Path = PROC) -> Snapshot:
    """Read the CPU time of every process now."""
    found = {}
    for folder in _process_folders(proc):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            text = (folder / "stat").read_text(errors="replace")
            name, _, rest = text.partition("(")[2].rpartition(")")
            fields = rest.split()
            cpu_s = (int(fields[11]) + int(fields[12])) / _ticks_per_s()
            found[int(folder.name), int(fields[19])] = (_printable(name), cpu_s)
    ticks = busy_and_stolen_ns(usable_cpus()) if proc == PROC else None
    busy_s = None if ticks is None else (ticks[0] - time.process_time_ns()) / 1e9
    return Snapshot(time.monotonic(), found, busy_s)


def _process_folders(proc: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [folder for folder in proc.iterdir() if folder.name.isdigit()]
    return []


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _ticks_per_s() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def look(look_s: float = LOOK_S) -> Load:
    """Watch the machine for a moment, without this process."""
    before = snapshot()
    time.sleep(look_s)
    return snapshot().since(before, own_pids={os.getpid()})


def wait_until_quiet(
    wait_s: float,
    *,
    progress: Progress = SILENT,
    watch: Callable[[], Load] = look,
    now: Callable[[], float] = time.monotonic,
) -> Load:
    """Watch the machine until it is quiet, for at most `wait_s` seconds; return the last reading.

    With 0 it reads once and does not wait.
    """
    load = watch()
    if load.is_quiet or wait_s <= 0:
        return load
    deadline = now() + wait_s
    with progress.stage("wait for a quiet machine", None) as stage:
        while now() < deadline:
            stage.advance(0, note=str(load))
            load = watch()
            if load.is_quiet:
                break
    return load
