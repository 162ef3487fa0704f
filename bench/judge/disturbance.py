"""Which timed calls were disturbed: by other work on the CPU, by the hypervisor, or because the process did not run.

Computed when a record is read, from the record's counters (`Surroundings`) and from the CPU time of each call. CPU time
adds what the clock cannot show: a long call that used the CPU the whole time is slow; a long call that used little CPU
was not running.

A disturbed call says nothing about the model: other programs may have made it slow or, if their work raised the clock,
fast. So the limits count it as slow when they try to prove a pass, and as fast when they try to prove a miss. A call
that was only off the CPU for a while, without another program seen, can only be slower because of it: for a pass it
counts with its full time.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .schema import Calls, ProcessSamples, Surroundings

# Cores' worth of other work within one stretch between two readings. Not a share: where a model computes on every
# core, one neighbour on one of them holds up all threads, whatever their number.
FOREIGN_CORES = 0.2
TICKS_NS = 20_000_000  # and at least two ticks of the clock that counts it
FOREIGN_SHARE = 0.10  # of the CPUs, where a record has only the share of a whole process
STOLEN_SHARE = 0.05
WAITED_SHARE = 0.05  # of the stretch, by the thread that waited longest
RAN_SHARE = 0.85  # of the CPU time that a call of its length usually uses
USUAL_QUANTILE = 0.75
FEWEST_CALLS = 5  # with fewer, no usual share is known
WHOLE_PROCESS = ((0, 2**63),)

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed call or step: how long it took, whether it was disturbed, and whether that can only have slowed it."""

    duration_ns: int
    is_disturbed: bool
    is_only_slowed: bool = False

    @property
    def bounds_itself(self) -> bool:
        """Whether an undisturbed call takes no longer than this one did."""
        return self.is_only_slowed or not self.is_disturbed


def disturbed_spans(process: ProcessSamples) -> tuple[Span, ...]:
    """Stretches of a process's time, in ns on the clock of its calls, in which other work took the CPU.

    A record without counters has only the shares of the whole process: then it counts as disturbed as a whole, or not.
    """
    around = process.surroundings
    if around is not None and (around.busy_ns or around.waited_ns):
        return tuple(_spans(around))
    is_busy = (process.foreign_cpu_share or 0.0) > FOREIGN_SHARE or (process.steal_share or 0.0) > STOLEN_SHARE
    return WHOLE_PROCESS if is_busy else ()


def _spans(around: Surroundings) -> Iterator[Span]:
    for place, (begin_ns, end_ns) in enumerate(pairwise(around.t_ns), start=1):
        if end_ns > begin_ns and _is_disturbed(around, place, end_ns - begin_ns):
            yield begin_ns, end_ns


def _is_disturbed(around: Surroundings, place: int, length_ns: int) -> bool:
    """Whether the stretch before reading number `place` was disturbed, by the share of each counter."""

    def moved(column: Sequence[int]) -> int:
        return column[place] - column[place - 1] if column else 0

    foreign_ns = moved(around.busy_ns) - moved(around.own_ns)
    return (
        foreign_ns > max(FOREIGN_CORES * length_ns, TICKS_NS)
        or moved(around.stolen_ns) > max(STOLEN_SHARE * length_ns * around.num_cpus, TICKS_NS)
        or moved(around.waited_ns) > WAITED_SHARE * length_ns
    )


def calls_of(process: ProcessSamples, calls: Calls) -> list[Timed]:
    """Timed calls of one kind, each with whether it was disturbed."""
    spans, was_off = disturbed_spans(process), off_cpu(calls)
    timed = []
    for start_ns, duration_ns, is_off in zip(calls.start_ns, calls.duration_ns, was_off, strict=True):
        is_beside_others = _overlaps(spans, start_ns, start_ns + duration_ns)
        timed.append(Timed(duration_ns, is_off or is_beside_others, is_only_slowed=is_off and not is_beside_others))
    return timed


def off_cpu(calls: Calls) -> list[bool]:
    """Whether each call used clearly less CPU time than usual: it did not run for a while.

    The usual share is the third quartile of CPU time over wall time, which most undisturbed calls reach. All False if
    CPU time was not counted.
    """
    if len(calls.cpu_ns) < FEWEST_CALLS:
        return [False] * len(calls.duration_ns)
    shares = [cpu / wall for cpu, wall in zip(calls.cpu_ns, calls.duration_ns, strict=True)]
    usual = statistics.quantiles(shares, n=4, method="inclusive")[2]
    return [share < RAN_SHARE * usual for share in shares]


def runs_of(process: ProcessSamples) -> list[list[Timed]]:
    """Steps of each decode run, each with whether it was disturbed."""
    spans, runs = disturbed_spans(process), []
    for episode in process.decode:
        timed, begin_ns = [], episode.start_ns + episode.prefill_ns
        for step_ns in episode.step_ns:
            timed.append(Timed(step_ns, _overlaps(spans, begin_ns, begin_ns + step_ns)))
            begin_ns += step_ns
        runs.append(timed)
    return runs


def is_load_disturbed(process: ProcessSamples) -> bool:
    """Whether other work took the CPU while the process loaded the artifact, which is its first task."""
    return _overlaps(disturbed_spans(process), 0, process.load_ns)


def _overlaps(spans: Sequence[Span], begin_ns: int, end_ns: int) -> bool:
    """Whether any of the ordered spans has time in common with the one from `begin_ns` to `end_ns`."""
    place = bisect_right(spans, begin_ns, key=lambda span: span[1])
    return place < len(spans) and spans[place][0] < end_ns


def disturbed_share(processes: Sequence[ProcessSamples]) -> float | None:
    """Share of the timed time in which calls were disturbed; None if nothing was timed."""
    timed = [
        item
        for process in processes
        for part in (
            calls_of(process, process.prefill),
            calls_of(process, process.ttft),
            *runs_of(process),
        )
        for item in part
    ]
    total_ns = sum(item.duration_ns for item in timed)
    return sum(item.duration_ns for item in timed if item.is_disturbed) / total_ns if total_ns else None


def cpu_share(processes: Sequence[ProcessSamples]) -> float | None:
    """CPU time of all prefills over their wall time: the number of busy cores; None if it was not counted."""
    pairs = [
        (cpu_ns, wall_ns)
        for process in processes
        for cpu_ns, wall_ns in zip(process.prefill.cpu_ns, process.prefill.duration_ns, strict=False)
    ]
    wall_ns = sum(wall for _, wall in pairs)
    return sum(cpu for cpu, _ in pairs) / wall_ns if wall_ns else None
