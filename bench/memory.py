"""The memory pass: one fresh process that loads, runs once and then steadily, while its memory is watched from outside.

Resident memory is the kernel's own high-water mark of each phase (`vm_hwm`: no sampling gap), or a sampled maximum if
the kernel keeps none. Device memory is measured by the methods of `vram.py`. The card is also read before the process
starts and after it ends, so memory of other processes is not counted as its own and does not hide it.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from ..export.runtime.devices import DEVICE_KINDS
from .gpu_processes import sort_out
from .instruments import Sampler, process_rss_bytes, thinned
from .judge.schema import Memory, MemorySeries
from .judge.validity import CROSS_CHECK_BYTES
from .requests import ARENA, MEMORY
from .vram import VramReading, arena_series, settle
from .windows_memory import ProcessCounters, open_counters

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from .nvml import Card
    from .requests import Mark, PeakMemory
    from .watched_run import Session

RSS_INTERVAL_MS = 10.0
VRAM_INTERVAL_MS = 5.0
_BASELINE_WAIT_S = 0.2
_SETTLE_S = 1.0  # a driver may take a moment to free the memory of a dead process
PHASES = ("load", "first_run", "decode", "steady")


class MemoryWatch:
    """Samples one child's memory inside a `with` block; `on_start` and `listen` receive the child's id and messages."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before = _looks(session.card, 2)
        self._after: list[tuple[int, VramReading]] = []
        self._rss = Sampler(self._read_rss, interval_ms=RSS_INTERVAL_MS)
        self._vram = Sampler(self._read_vram, interval_ms=VRAM_INTERVAL_MS)
        self._stack = ExitStack()
        self._windows: ProcessCounters | None = None
        self._pid: int | None = None
        self._listed_pid: int | None = None
        self._phases: dict[str, int] = {}

    def on_start(self, pid: int) -> None:
        """Watch this process from now on."""
        self._pid = pid

    def listen(self, mark: Mark) -> None:
        """Keep the times at which the child's phases began."""
        if mark.name in PHASES:
            self._phases[mark.name] = mark.t_ns

    def __enter__(self) -> Self:
        self._stack.enter_context(self._rss)
        if self._session.card is not None:
            self._windows = self._stack.enter_context(open_counters())
            self._stack.enter_context(self._vram)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self._after = _settled(self._session.card, self._before)

    def _read_rss(self) -> int | None:
        return None if self._pid is None else process_rss_bytes(self._pid)

    def _read_vram(self) -> VramReading | None:
        card, pid = self._session.card, self._pid
        if card is None or pid is None:
            return None
        reading, listed_pid = _look(card, pid, self._session.idle_pids)
        self._listed_pid = listed_pid or self._listed_pid
        usage = None if self._windows is None else self._windows.usage_bytes(pid)
        if usage is None:
            return reading
        return replace(reading, windows_used_bytes=usage[0], windows_shared_bytes=usage[1])

    def memory(self, process: int, result: PeakMemory, *, weight_bytes: int) -> Memory:
        """The readings, together with the kernel's own peaks that the child reported in `result`."""
        seen = self._resident(process, result)
        card = self._session.card
        if card is None:
            return seen.model_copy(update={"vram_reason": _no_card_reason(self._session)})
        finding = settle(
            [*self._before, *self._vram.readings, *self._after],
            process=process,
            zero_ns=self._session.zero_ns,
            interval_ms=VRAM_INTERVAL_MS,
            max_gap_ms=self._vram.max_gap_ms,
            baseline_bytes=_least_bytes(self._before),
            settled_bytes=_least_bytes(self._after),
            accounted_bytes=self._accounted_bytes(card),
            weight_bytes=weight_bytes,
            phase_start_ns=self._phases,
        )
        series = () if finding.series is None else (finding.series,)
        return seen.model_copy(update={"vram": series, "vram_reason": finding.reason, "vram_caveat": finding.caveat})

    def _accounted_bytes(self, card: Card) -> int | None:
        """The driver's own maximum, by the driver's number of our process."""
        pid = self._listed_pid or self._pid
        return card.accounted_peak_bytes(pid) if pid and card.is_accounting() else None

    def _resident(self, process: int, result: PeakMemory) -> Memory:
        by_kernel = {phase: peak for phase, peak in result.phase_peak_bytes.items() if peak}
        by_samples = max((value for _, value in self._rss.readings), default=0)
        peak = max(by_kernel.values(), default=result.peak_bytes or 0)
        if not (peak or by_samples):
            return Memory(rss_reason="this platform does not report a process's resident memory")
        zero_ns, thin = self._session.zero_ns, thinned(self._rss.readings)
        series = MemorySeries(
            process=process,
            method="vm_hwm" if peak else "rss_sampled",
            interval_ms=RSS_INTERVAL_MS,
            max_gap_ms=self._rss.max_gap_ms,
            baseline_bytes=result.baseline_bytes or 0,
            peak_bytes=peak or by_samples,
            phase_peak_bytes=by_kernel,  # type: ignore[arg-type]
            phase_start_ns={name: max(t - zero_ns, 0) for name, t in self._phases.items()},  # type: ignore[misc]
            time_ns=tuple(max(t - zero_ns, 0) for t, _ in thin),
            reading_bytes=tuple(value for _, value in thin),
        )
        return Memory(rss=(series,))


def memory_process(session: Session, process: int, *, weight_bytes: int) -> Memory:
    """Run one process of the memory pass and return its readings.

    If the driver gives no figure of a card's memory, one more process reads the runtime's allocator.
    """
    with MemoryWatch(session) as watch:
        result = session.run(MEMORY, process, on_start=watch.on_start, listen=watch.listen)
    memory = watch.memory(process, result, weight_bytes=weight_bytes)
    if DEVICE_KINDS[session.device.kind].is_host or memory.vram:
        return memory
    return _with_arena(session, memory, process, weight_bytes=weight_bytes)


def _with_arena(session: Session, memory: Memory, process: int, *, weight_bytes: int) -> Memory:
    """Add the lower bound from the runtime's own allocator; its caveat says why there is no better figure."""
    result = session.run(ARENA, process)
    series = arena_series(result.arena_bytes, process=process, weight_bytes=weight_bytes)
    if series is None:
        return memory
    caveat = f"only the runtime's allocator is known, which cannot prove a pass: {memory.vram_reason}"
    return memory.model_copy(update={"vram": (series,), "vram_reason": None, "vram_caveat": caveat[:500]})


def joined(memories: list[Memory]) -> Memory:
    """Several memory passes as one; a reason stays only if no pass gave a number."""
    rss = tuple(series for memory in memories for series in memory.rss)
    vram = tuple(series for memory in memories for series in memory.vram)
    return Memory(
        rss=rss,
        vram=vram if all(memory.vram for memory in memories) else (),
        rss_reason=None if rss else next((memory.rss_reason for memory in memories if memory.rss_reason), None),
        vram_reason=next((memory.vram_reason for memory in memories if memory.vram_reason), None),
        vram_caveat=next((memory.vram_caveat for memory in memories if memory.vram_caveat), None),
    )


def _look(card: Card, pid: int | None, idle_pids: Collection[int]) -> tuple[VramReading, int | None]:
    """The card's memory now, and its number of our process; `pid` None if there is no process."""
    used_bytes, processes = card.memory_used_bytes(), card.processes()
    if processes is None:
        return VramReading(device_used_bytes=used_bytes, own_used_bytes=None, num_others=None), None
    if pid is None:
        return VramReading(device_used_bytes=used_bytes, own_used_bytes=None, num_others=len(processes)), None
    found = sort_out(processes, own_pid=pid, idle_pids=idle_pids)
    reading = VramReading(
        device_used_bytes=used_bytes,
        own_used_bytes=found.own.used_bytes if found.own else None,
        num_others=found.num_foreign + found.num_drawing,
        is_own_listed=found.own is not None,
    )
    return reading, found.own.pid if found.own else None


def _looks(card: Card | None, count: int) -> list[tuple[int, VramReading]]:
    """A few looks at a card without our process, a moment apart."""
    looks: list[tuple[int, VramReading]] = []
    while card is not None and len(looks) < count:
        if looks:
            time.sleep(_BASELINE_WAIT_S)
        looks.append((time.perf_counter_ns(), _look(card, None, ())[0]))
    return looks


def _settled(card: Card | None, before: Collection[tuple[int, VramReading]]) -> list[tuple[int, VramReading]]:
    """The first look with the card as before our process, or the last look after a while."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        looks = _looks(card, 1)
        drift_bytes = abs((_least_bytes(looks) or 0) - (_least_bytes(before) or 0))
        is_as_before = drift_bytes <= CROSS_CHECK_BYTES and _most_others(looks) <= _most_others(before)
        if is_as_before or time.monotonic() > deadline:
            return looks
        time.sleep(_BASELINE_WAIT_S)


def _most_others(looks: Collection[tuple[int, VramReading]]) -> int:
    return max((reading.num_others or 0 for _, reading in looks), default=0)


def _least_bytes(looks: Collection[tuple[int, VramReading]]) -> int | None:
    """Memory of the whole card, the lowest of some looks."""
    return min(
        (reading.device_used_bytes for _, reading in looks if reading.device_used_bytes is not None), default=None
    )


def _no_card_reason(session: Session) -> str:
    if DEVICE_KINDS[session.device.kind].is_host:
        return "measured on the CPU, which has no separate memory: see RSS"
    return "NVML does not list the card, so its memory cannot be read"
