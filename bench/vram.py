"""Device memory of a process: several methods, the most certain first; the best two are compared.

    1 nvml_accounting       the driver's own per-process maximum: no sampling gap
    2 nvml_process          per-process figures, sampled; if Windows does not give them to NVML, Windows' counters:
      windows_process
    3 nvml_device_delta     the whole card minus its idle baseline, sampled, only if no other process is on it
    4 ort_arena             memory of the runtime's allocator, without kernels and context, so it may fail a limit but
                            never pass one (`memory.py` uses it only if the other methods give nothing)

A reading of none, 0 or less than the weights counts as unavailable. All functions are pure: readings in, a series out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .instruments import thinned
from .judge.schema import MemorySeries
from .judge.validity import CROSS_CHECK_BYTES, CROSS_CHECK_SHARE

if TYPE_CHECKING:
    from collections.abc import Sequence

ARENA = "ort_arena"


@dataclass(frozen=True, kw_only=True)
class VramReading:
    """One reading of the card: its whole memory, that of our process, and the number of others (None: unknown).

    Our process may be listed without a figure; before, after, and in some containers it is not listed. Windows reports
    its memory on the card and in system memory separately.
    """

    device_used_bytes: int | None
    own_used_bytes: int | None
    num_others: int | None
    is_own_listed: bool = False
    windows_used_bytes: int | None = None
    windows_shared_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class VramFinding:
    """The series of the best method with a number, or the reason why there is none; `caveat` says what it rests on."""

    series: MemorySeries | None
    reason: str | None = None
    caveat: str | None = None


def settle(
    readings: Sequence[tuple[int, VramReading]],
    *,
    process: int,
    zero_ns: int,
    interval_ms: float,
    max_gap_ms: float | None,
    baseline_bytes: int | None,
    settled_bytes: int | None,
    accounted_bytes: int | None,
    weight_bytes: int,
    phase_start_ns: dict[str, int],
) -> VramFinding:
    """Choose the best method that gave readings, and compare it with the next best.

    `baseline_bytes` is the memory in use on the whole card before our process started, `settled_bytes` after it ended.
    If they differ by more than two methods may, another process started or ended, even if the list did not show it.
    """
    own = [(t, r.own_used_bytes) for t, r in readings if r.own_used_bytes]
    foreign = _strangers(readings, baseline_bytes, settled_bytes)
    device = [
        (t, max(r.device_used_bytes - baseline_bytes, 0))
        for t, r in readings
        if r.device_used_bytes and baseline_bytes is not None
    ]
    windows = [(t, r.windows_used_bytes) for t, r in readings if r.windows_used_bytes]
    sampled = {"nvml_process": own, "windows_process": windows, "nvml_device_delta": [] if foreign else device}
    methods = {name: (max(value for _, value in series), series) for name, series in sampled.items() if series}
    if accounted_bytes:
        best = next((series for _, series in methods.values()), [])
        methods = {"nvml_accounting": (accounted_bytes, best), **methods}
    too_small = [name for name, (peak, _) in methods.items() if peak < weight_bytes]
    usable = {name: found for name, found in methods.items() if name not in too_small}
    if not usable:
        return VramFinding(series=None, reason=_why_none(too_small, foreign=foreign, weight_bytes=weight_bytes))
    (name, (peak, series)), *others = usable.items()
    other = others[0] if others else None
    thin = thinned(series)
    finding = MemorySeries(
        process=process,
        method=name,
        interval_ms=interval_ms,
        max_gap_ms=max_gap_ms,
        baseline_bytes=baseline_bytes or 0,
        peak_bytes=peak,
        phase_start_ns={phase: max(t - zero_ns, 0) for phase, t in phase_start_ns.items()},  # type: ignore[misc]
        time_ns=tuple(max(t - zero_ns, 0) for t, _ in thin),
        reading_bytes=tuple(value for _, value in thin),
        cross_check_method=other[0] if other else None,
        cross_check_bytes=other[1][0] if other else None,
        spilled_bytes=max(
            (r.windows_shared_bytes for _, r in readings if r.windows_shared_bytes is not None), default=None
        ),
    )
    return VramFinding(series=finding, caveat=_caveat(name, readings))


def _strangers(
    readings: Sequence[tuple[int, VramReading]], baseline_bytes: int | None, settled_bytes: int | None
) -> str | None:
    """Why the card may have other processes, as a sentence; None if it has none."""
    if any(reading.num_others for _, reading in readings):
        return "other processes are on the card"
    if any(reading.num_others is None for _, reading in readings):
        return "the driver does not list the processes on the card, so other processes may be there"
    if baseline_bytes is None or settled_bytes is None:
        return None
    if abs(settled_bytes - baseline_bytes) <= CROSS_CHECK_BYTES:
        return None
    return f"the card had {baseline_bytes} bytes before and {settled_bytes} after: other processes started or ended"


def _caveat(method: str, readings: Sequence[tuple[int, VramReading]]) -> str | None:
    if method != "nvml_device_delta":
        return None
    if any(reading.is_own_listed for _, reading in readings):
        return "the driver does not give the figures of single processes (as on Windows and WSL)"
    return "the driver lists no process (as in some containers); the card's idle memory was the same before and after"


def disagreement(series: MemorySeries) -> str | None:
    """The difference between two methods, as a sentence, if it is more than 64 MB and 5 %; None if they agree."""
    if series.cross_check_bytes is None:
        return None
    apart = abs(series.peak_bytes - series.cross_check_bytes)
    if apart <= max(CROSS_CHECK_BYTES, CROSS_CHECK_SHARE * series.peak_bytes):
        return None
    return f"{series.method} says {series.peak_bytes} bytes, {series.cross_check_method} {series.cross_check_bytes}"


def _why_none(too_small: Sequence[str], *, foreign: str | None, weight_bytes: int) -> str:
    if too_small:
        return f"{', '.join(too_small)} gave less than the {weight_bytes} bytes of weights"
    if foreign:
        return f"the driver gives no figure of this process, and {foreign}"
    return "NVML gives no memory figure for this process"


def arena_series(arena_bytes: int | None, *, process: int, weight_bytes: int) -> MemorySeries | None:
    """The allocator's peak as a lower bound; None if it is unknown or less than the weights."""
    if not arena_bytes or arena_bytes < weight_bytes:
        return None
    return MemorySeries(process=process, method=ARENA, baseline_bytes=0, peak_bytes=arena_bytes)
