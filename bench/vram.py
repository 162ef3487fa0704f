"""How much device memory a process took: ways to know, the most certain first, two of them held against each other.

    1 nvml_accounting       the driver's own per-process maximum: no sampling gap
    2 nvml_process          per-process figures, sampled
    3 nvml_device_delta     the whole card minus its idle baseline, sampled, only while nobody else is on it
    4 (allocator statistics may fail a limit but never pass one, so they are no method here)

None, 0, or less than the weights is unavailable, never a number. Everything here is pure: readings in, a series out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .instruments import thinned
from .schema import MemorySeries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CROSS_CHECK_BYTES = 64_000_000
CROSS_CHECK_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class VramReading:
    """One look at the card: the whole of it, our process on it, and how many others there are (None: not told)."""

    device_used_bytes: int | None
    own_used_bytes: int | None
    num_others: int | None


@dataclass(frozen=True, kw_only=True)
class VramFinding:
    """The series of the best method that gave a number, or the reason why none did."""

    series: MemorySeries | None
    reason: str | None = None


def settle(
    readings: Sequence[tuple[int, VramReading]],
    *,
    process: int,
    zero_ns: int,
    interval_ms: float,
    max_gap_ms: float | None,
    baseline_bytes: int | None,
    accounted_bytes: int | None,
    weight_bytes: int,
    phase_start_ns: dict[str, int],
) -> VramFinding:
    """Choose the best method that answered, and hold it against the next best."""
    own = [(t, r.own_used_bytes) for t, r in readings if r.own_used_bytes]
    foreign = any(r.num_others != 0 for _, r in readings)
    device = [
        (t, max(r.device_used_bytes - baseline_bytes, 0))
        for t, r in readings
        if r.device_used_bytes and baseline_bytes is not None
    ]
    methods: dict[str, tuple[int, list[tuple[int, int]]]] = {}
    if accounted_bytes:
        methods["nvml_accounting"] = (accounted_bytes, own or ([] if foreign else device))
    if own:
        methods["nvml_process"] = (max(value for _, value in own), own)
    if device and not foreign:
        methods["nvml_device_delta"] = (max(value for _, value in device), device)
    too_small = [name for name, (peak, _) in methods.items() if peak < weight_bytes]
    usable = {name: found for name, found in methods.items() if name not in too_small}
    if not usable:
        return VramFinding(
            series=None, reason=_why_none(methods, too_small, foreign=foreign, weight_bytes=weight_bytes)
        )
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
    )
    return VramFinding(series=finding)


def disagreement(series: MemorySeries) -> str | None:
    """How far apart two methods are, as a sentence, when it is more than 64 MB and 5 %; None when they agree."""
    if series.cross_check_bytes is None:
        return None
    apart = abs(series.peak_bytes - series.cross_check_bytes)
    if apart <= max(CROSS_CHECK_BYTES, CROSS_CHECK_SHARE * series.peak_bytes):
        return None
    return f"{series.method} says {series.peak_bytes} bytes, {series.cross_check_method} {series.cross_check_bytes}"


def _why_none(methods: Mapping[str, object], too_small: list[str], *, foreign: bool, weight_bytes: int) -> str:
    if too_small:
        return f"{', '.join(too_small)} gave less than the {weight_bytes} bytes of weights"
    if foreign and not methods:
        return "the driver gives no per-process figure, and other processes are (or may be) on the card"
    return "NVML gives no memory figure for this process"
