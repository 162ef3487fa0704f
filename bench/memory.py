"""The memory pass: one fresh process that loads, runs once and then steadily, while its memory is watched from outside.

Resident memory is the kernel's own high-water mark of each phase (`vm_hwm`: no sampling gap), or a sampled maximum
where the kernel keeps none. Device memory goes through the ladder of `vram.py`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from .child import run_worker
from .gpu_processes import sort_out
from .instruments import Sampler, process_rss_bytes, thinned
from .schema import Memory, MemorySeries
from .vram import VramReading, settle

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from .nvml import Card
    from .session import Session

RSS_INTERVAL_MS = 10.0
VRAM_INTERVAL_MS = 5.0
_BASELINE_WAIT_S = 0.2
PHASES = ("load", "first_run", "steady")


class MemoryWatch:
    """Samples one child's memory from entering to leaving; `on_start` and `listen` tell it of the child."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._baseline_bytes = _idle_device_bytes(session.card)
        self._rss = Sampler(self._read_rss, interval_ms=RSS_INTERVAL_MS)
        self._vram = Sampler(self._read_vram, interval_ms=VRAM_INTERVAL_MS)
        self._pid: int | None = None
        self._phases: dict[str, int] = {}

    def on_start(self, pid: int) -> None:
        """Watch this process from now on."""
        self._pid = pid

    def listen(self, event: dict[str, Any]) -> None:
        """Keep the times at which the child's phases began."""
        if event["event"] == "mark" and event["name"] in PHASES:
            self._phases[event["name"]] = event["t_ns"]

    def __enter__(self) -> Self:
        self._rss.__enter__()
        if self._session.card is not None:
            self._vram.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session.card is not None:
            self._vram.__exit__(kind, error, trace)
        self._rss.__exit__(kind, error, trace)

    def _read_rss(self) -> int | None:
        return None if self._pid is None else process_rss_bytes(self._pid)

    def _read_vram(self) -> VramReading | None:
        card, pid = self._session.card, self._pid
        return None if card is None or pid is None else _look(card, pid, self._session.idle_pids)

    def memory(self, process: int, result: dict[str, Any], *, weight_bytes: int) -> Memory:
        """What was seen, together with the kernel's own peaks that the child reported in `result`."""
        seen = self._resident(process, result)
        card = self._session.card
        if card is None:
            return seen.model_copy(update={"vram_reason": _no_card_reason(self._session)})
        finding = settle(
            self._vram.readings,
            process=process,
            zero_ns=self._session.zero_ns,
            interval_ms=VRAM_INTERVAL_MS,
            max_gap_ms=self._vram.max_gap_ms,
            baseline_bytes=self._baseline_bytes,
            accounted_bytes=card.accounted_peak_bytes(self._pid) if self._pid and card.is_accounting() else None,
            weight_bytes=weight_bytes,
            phase_start_ns=self._phases,
        )
        series = () if finding.series is None else (finding.series,)
        return seen.model_copy(update={"vram": series, "vram_reason": finding.reason})

    def _resident(self, process: int, result: dict[str, Any]) -> Memory:
        by_kernel = {phase: peak for phase, peak in result.get("phase_peak_bytes", {}).items() if peak}
        by_samples = max((value for _, value in self._rss.readings), default=0)
        peak = max(by_kernel.values(), default=result.get("peak_bytes") or 0)
        if not (peak or by_samples):
            return Memory(rss_reason="this platform does not tell a process's resident memory")
        zero_ns, thin = self._session.zero_ns, thinned(self._rss.readings)
        series = MemorySeries(
            process=process,
            method="vm_hwm" if peak else "rss_sampled",
            interval_ms=RSS_INTERVAL_MS,
            max_gap_ms=self._rss.max_gap_ms,
            baseline_bytes=result.get("baseline_bytes") or 0,
            peak_bytes=peak or by_samples,
            phase_peak_bytes=by_kernel,
            phase_start_ns={name: max(t - zero_ns, 0) for name, t in self._phases.items()},  # type: ignore[misc]
            time_ns=tuple(max(t - zero_ns, 0) for t, _ in thin),
            reading_bytes=tuple(value for _, value in thin),
        )
        return Memory(rss=(series,))


def memory_process(session: Session, process: int, *, weight_bytes: int) -> Memory:
    """Run one process of the memory pass and return what was seen of it."""
    with MemoryWatch(session) as watch:
        result = run_worker(
            session.request("memory", process),
            timeout_s=session.profile.timeout_s,
            on_start=watch.on_start,
            listen=watch.listen,
        )
    return watch.memory(process, result, weight_bytes=weight_bytes)


def joined(memories: list[Memory]) -> Memory:
    """Several memory passes as one; a reason stays only when no pass gave a number."""
    rss = tuple(series for memory in memories for series in memory.rss)
    vram = tuple(series for memory in memories for series in memory.vram)
    return Memory(
        rss=rss,
        vram=vram if all(memory.vram for memory in memories) else (),
        rss_reason=None if rss else next((memory.rss_reason for memory in memories if memory.rss_reason), None),
        vram_reason=next((memory.vram_reason for memory in memories if memory.vram_reason), None),
    )


def _look(card: Card, pid: int, idle_pids: Collection[int]) -> VramReading:
    used_bytes, processes = card.memory_used_bytes(), card.processes()
    if processes is None:
        return VramReading(device_used_bytes=used_bytes, own_used_bytes=None, num_others=None)
    found = sort_out(processes, own_pid=pid, idle_pids=idle_pids)
    return VramReading(
        device_used_bytes=used_bytes,
        own_used_bytes=found.own.used_bytes if found.own else None,
        num_others=found.num_foreign + found.num_drawing,
    )


def _idle_device_bytes(card: Card | None) -> int | None:
    """What the card holds before our process is there: the lower of two looks, a moment apart."""
    if card is None:
        return None
    first = card.memory_used_bytes()
    time.sleep(_BASELINE_WAIT_S)
    second = card.memory_used_bytes()
    return None if first is None or second is None else min(first, second)


def _no_card_reason(session: Session) -> str:
    if session.device.kind == "cpu":
        return "measured on the CPU, which has no memory of its own: see RSS"
    return "NVML does not show the card, so its memory cannot be watched"
