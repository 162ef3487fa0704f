"""What the harness itself found wrong with a measurement: named checks, each ok, a warning, invalid or unavailable.

Pure functions of samples and readings. The gate has rules of its own; these are what only the harness can know.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from .schema import Check
from .vram import CROSS_CHECK_BYTES, disagreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schema import CheckStatus, Device, Memory, ProcessSamples
    from .session import Attempt

FOREIGN_CPU_SHARE = 0.25
STEAL_SHARE = 0.10
DRIFT_SHARE = 0.10
SWAP_BYTES = 64_000_000
MAJOR_PAGE_FAULTS = 100
PARENT_CPU_SHARE = 0.01
FULL_SHARE = 0.95
HARMLESS = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting"})


def attempt_problems(attempt: Attempt) -> list[str]:
    """Why one process's timings should be repeated: throttling, foreign GPU work, a busy or stolen CPU."""
    problems = []
    reasons = {reason for point in attempt.telemetry for reason in point.throttle_reasons} - HARMLESS
    if reasons:
        problems.append(f"the device throttled ({', '.join(sorted(reasons))})")
    if any(point.num_foreign_processes for point in attempt.telemetry):
        problems.append("another process used the GPU")
    if (attempt.samples.foreign_cpu_share or 0.0) > FOREIGN_CPU_SHARE:
        problems.append(f"other processes used {attempt.samples.foreign_cpu_share:.0%} of the CPU")
    if (attempt.samples.steal_share or 0.0) > STEAL_SHARE:
        problems.append(f"the hypervisor took {attempt.samples.steal_share:.0%} of the CPU")
    if attempt.samples.warmup.classification == "no_steady_state":
        problems.append("no two windows of calls agreed, so it was never warm")
    return problems


def session_checks(
    attempts: Sequence[Attempt],
    *,
    memory: Memory,
    device: Device,
    is_contention_invalid: bool,
    retry_reasons: Sequence[str],
    swap_growth_bytes: int | None,
) -> tuple[Check, ...]:
    """All checks of one session, in the order they are shown."""
    processes = [attempt.samples for attempt in attempts]
    return (
        _contention(processes, "invalid" if is_contention_invalid else "warning"),
        _throttling(attempts),
        _steadiness(processes),
        _drift(processes),
        _numbers(processes),
        _swap(swap_growth_bytes),
        _paging(processes),
        _retries(retry_reasons),
        _parent(attempts),
        _telemetry(attempts),
        *_device_memory(memory, device),
    )


def _contention(processes: Sequence[ProcessSamples], when_exceeded: CheckStatus) -> Check:
    shares = [process.foreign_cpu_share for process in processes if process.foreign_cpu_share is not None]
    if not shares:
        return Check(id="cpu_contention", status="unavailable", detail="the system does not count foreign CPU time")
    worst = max(shares)
    return Check(
        id="cpu_contention",
        status=when_exceeded if worst > FOREIGN_CPU_SHARE else "ok",
        detail=f"other processes used up to {worst:.0%} of the CPU while latency was measured",
        value=worst,
        limit=FOREIGN_CPU_SHARE,
    )


def _throttling(attempts: Sequence[Attempt]) -> Check:
    reasons = sorted(
        {r for attempt in attempts for point in attempt.telemetry for r in point.throttle_reasons} - HARMLESS
    )
    if reasons:
        return Check(id="throttling", status="invalid", detail=f"the device slowed itself down: {', '.join(reasons)}")
    return Check(id="throttling", status="ok", detail="no throttling was reported")


def _steadiness(processes: Sequence[ProcessSamples]) -> Check:
    odd = [p for p in processes if p.warmup.classification in ("slowdown", "no_steady_state")]
    if not odd:
        return Check(id="warmup", status="ok", detail="every process reached a steady state before it was timed")
    words = ", ".join(f"{p.process} {p.warmup.classification.replace('_', ' ')}" for p in odd)
    return Check(id="warmup", status="warning", detail=f"processes that did not settle: {words}", value=float(len(odd)))


def _drift(processes: Sequence[ProcessSamples]) -> Check:
    """Compare the halves of each process's counted prefills: a device that heats up is slower in the second."""
    changes = [change for process in processes if (change := _half_change(process.prefill.duration_ns)) is not None]
    if not changes:
        return Check(id="drift", status="unavailable", detail="too few prefills to compare their halves")
    worst = max(changes)
    return Check(
        id="drift",
        status="warning" if worst > DRIFT_SHARE else "ok",
        detail=f"the second half of a process's prefills took at most {worst:+.1%} longer than the first",
        value=worst,
        limit=DRIFT_SHARE,
    )


def _half_change(durations_ns: Sequence[int]) -> float | None:
    middle = len(durations_ns) // 2
    if middle < 4:  # noqa: PLR2004 - a median of fewer says nothing
        return None
    return statistics.median(durations_ns[middle:]) / statistics.median(durations_ns[:middle]) - 1.0


def _numbers(processes: Sequence[ProcessSamples]) -> Check:
    bad = sum(process.num_nonfinite_logits for process in processes)
    status: CheckStatus = "invalid" if bad else "ok"
    return Check(
        id="finite_logits", status=status, detail=f"{bad} logits were NaN or infinite", value=float(bad), limit=0.0
    )


def _swap(growth_bytes: int | None) -> Check:
    if growth_bytes is None:
        return Check(id="swap", status="unavailable", detail="the system does not tell how much is swapped out")
    status: CheckStatus = "invalid" if growth_bytes > SWAP_BYTES else "ok"
    detail = f"{max(growth_bytes, 0)} bytes were swapped out meanwhile"
    return Check(id="swap", status=status, detail=detail, value=float(growth_bytes), limit=float(SWAP_BYTES))


def _paging(processes: Sequence[ProcessSamples]) -> Check:
    """Look for pages that had to come from the disk: memory was short, though nothing may have been swapped out."""
    faults = [process.major_page_faults for process in processes if process.major_page_faults is not None]
    if not faults:
        return Check(id="paging", status="unavailable", detail="the system does not count page faults")
    worst = max(faults)
    return Check(
        id="paging",
        status="warning" if worst > MAJOR_PAGE_FAULTS else "ok",
        detail=f"a timed process waited for at most {worst} pages from the disk",
        value=float(worst),
        limit=float(MAJOR_PAGE_FAULTS),
    )


def _retries(reasons: Sequence[str]) -> Check:
    detail = f"{len(reasons)} processes were repeated" + (f": {reasons[0]}" if reasons else "")
    return Check(id="retries", status="warning" if reasons else "ok", detail=detail[:500], value=float(len(reasons)))


def _parent(attempts: Sequence[Attempt]) -> Check:
    worst = max((attempt.parent_cpu_share for attempt in attempts), default=0.0)
    return Check(
        id="parent_asleep",
        status="warning" if worst > PARENT_CPU_SHARE else "ok",
        detail=f"the harness itself used {worst:.2%} of one core while its children measured",
        value=worst,
        limit=PARENT_CPU_SHARE,
    )


def _telemetry(attempts: Sequence[Attempt]) -> Check:
    if any(attempt.telemetry for attempt in attempts):
        return Check(id="telemetry", status="ok", detail="the device's clocks were read while it worked")
    return Check(
        id="telemetry", status="unavailable", detail="the device offers no clock, temperature or power reading"
    )


def _device_memory(memory: Memory, device: Device) -> list[Check]:
    """A card's memory: whether it is known, and whether it may have spilled into the system's (WDDM, WSL)."""
    if device.kind == "cpu":
        return []
    if not memory.vram:
        return [Check(id="vram", status="unavailable", detail=memory.vram_reason or "not measured")]
    peak = max(series.peak_bytes for series in memory.vram)
    total = next((w.memory_total_bytes for w in (device.gpu.nvml, device.gpu.cuda) if w), None) if device.gpu else None
    if total and peak > FULL_SHARE * total:
        detail = f"the card was full ({peak} of {total} bytes): a driver may have moved data to system memory"
        return [Check(id="vram", status="invalid", detail=detail, value=float(peak), limit=FULL_SHARE * total)]
    if (spilled := max(series.spilled_bytes or 0 for series in memory.vram)) > CROSS_CHECK_BYTES:
        detail = f"{spilled} bytes of the card's lay in system memory: the driver moved what did not fit"
        return [Check(id="vram", status="invalid", detail=detail, value=float(spilled), limit=float(CROSS_CHECK_BYTES))]
    if apart := [words for series in memory.vram if (words := disagreement(series))]:
        return [Check(id="vram", status="invalid", detail=f"two methods disagree: {apart[0]}", value=float(peak))]
    detail = f"peak {peak} bytes by {memory.vram[0].method}"
    if memory.vram_caveat:
        return [Check(id="vram", status="warning", detail=f"{detail}: {memory.vram_caveat}"[:500], value=float(peak))]
    return [Check(id="vram", status="ok", detail=detail, value=float(peak))]
