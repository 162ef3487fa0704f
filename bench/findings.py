"""Checks of a measurement by the harness itself: each has a name and is ok, a warning, invalid or unavailable.

All are pure functions of samples and readings. The gate has its own rules; only the harness can make these checks.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from ..export.runtime.devices import DEVICE_KINDS
from .judge.disturbance import cpu_share, disturbed_share, off_cpu
from .judge.schema import Check
from .judge.validity import CROSS_CHECK_BYTES, FOREIGN_SHARE, MOST_DISTURBED_SHARE, MOST_STOPPED_SHARE, STEAL_SHARE
from .neighbours import MOST_NAMES, Neighbour
from .vram import disagreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .judge.schema import CheckStatus, Device, Memory, ProcessSamples
    from .watched_run import Attempt

DRIFT_SHARE = 0.10
SWAP_BYTES = 64_000_000
MAJOR_PAGE_FAULTS = 100
PARENT_CPU_SHARE = 0.01
FULL_SHARE = 0.95
REPEAT_SHARE = 0.10  # of a process's time: if more is disturbed, it is measured again, as often as the profile allows
HARMLESS = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting"})


def attempt_problems(attempt: Attempt) -> list[str]:
    """Why a process should be measured again: throttling, foreign GPU work, a busy CPU, steal time or a CPU quota."""
    problems = []
    samples = attempt.samples
    reasons = {reason for point in attempt.telemetry for reason in point.throttle_reasons} - HARMLESS
    if reasons:
        problems.append(f"the device throttled ({', '.join(sorted(reasons))})")
    if any(point.num_foreign_processes for point in attempt.telemetry):
        problems.append("another process used the GPU")
    if stopped := _stopped_share(samples):
        problems.append(f"the CPU quota was used up in {stopped:.0%} of its periods")
    disturbed = disturbed_share([samples]) or 0.0
    if (samples.foreign_cpu_share or 0.0) > FOREIGN_SHARE:
        problems.append(f"other processes used {samples.foreign_cpu_share:.0%} of the CPU{_names([attempt])}")
    elif (samples.steal_share or 0.0) > STEAL_SHARE:
        problems.append(f"the hypervisor took {samples.steal_share:.0%} of the CPU")
    elif disturbed > REPEAT_SHARE:
        problems.append(f"it was disturbed in {disturbed:.0%} of its time{_names([attempt])}")
    if samples.warmup.classification == "no_steady_state":
        problems.append("no two windows of calls agreed, so it did not reach a steady state")
    return problems


def _names(attempts: Sequence[Attempt]) -> str:
    """Name the busiest other programs, by their highest share of a core, for the end of a sentence."""
    cores: dict[str, float] = {}
    for neighbour in (neighbour for attempt in attempts for neighbour in attempt.neighbours):
        cores[neighbour.name] = max(cores.get(neighbour.name, 0.0), neighbour.cores)
    busiest = sorted(cores.items(), key=lambda item: -item[1])[:MOST_NAMES]
    return f": {', '.join(str(Neighbour(*item)) for item in busiest)}" if busiest else ""


def _stopped_share(samples: ProcessSamples) -> float:
    """Share of the control group's periods in which the process was stopped; 0.0 if the share is harmless."""
    around = samples.surroundings
    if around is None or not around.num_periods:
        return 0.0
    share = (around.num_throttled_periods or 0) / around.num_periods
    return share if share > MOST_STOPPED_SHARE else 0.0


def session_checks(
    attempts: Sequence[Attempt],
    *,
    memory: Memory,
    device: Device,
    retry_reasons: Sequence[str],
    swap_growth_bytes: int | None,
) -> tuple[Check, ...]:
    """All checks of one session, in the order in which they are shown."""
    processes = [attempt.samples for attempt in attempts]
    return (
        _contention(attempts),
        _stolen(processes),
        _quota(processes),
        _disturbance(attempts),
        _cpu_witness(processes),
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


def _contention(attempts: Sequence[Attempt]) -> Check:
    shares = [a.samples.foreign_cpu_share for a in attempts if a.samples.foreign_cpu_share is not None]
    if not shares:
        return Check(id="cpu_contention", status="unavailable", detail="the system does not count foreign CPU time")
    worst = max(shares)
    is_exceeded = worst > FOREIGN_SHARE
    detail = f"other processes used up to {worst:.0%} of the CPU while latency was measured"
    detail += _names(attempts) if is_exceeded else ""
    status: CheckStatus = "invalid" if is_exceeded else "ok"
    return Check(id="cpu_contention", status=status, detail=detail[:500], value=worst, limit=FOREIGN_SHARE)


def _stolen(processes: Sequence[ProcessSamples]) -> Check:
    shares = [process.steal_share for process in processes if process.steal_share is not None]
    if not shares:
        return Check(id="cpu_steal", status="unavailable", detail="the system does not count CPU steal time")
    worst = max(shares)
    status: CheckStatus = "invalid" if worst > STEAL_SHARE else "ok"
    detail = f"the hypervisor took up to {worst:.0%} of the CPU"
    return Check(id="cpu_steal", status=status, detail=detail, value=worst, limit=STEAL_SHARE)


def _quota(processes: Sequence[ProcessSamples]) -> Check:
    """Check whether the control group of a container or service stopped a process because of its CPU quota."""
    around = [process.surroundings for process in processes if process.surroundings is not None]
    if not any(item.num_periods is not None for item in around):
        return Check(id="cpu_quota", status="unavailable", detail="no control group counts CPU time here")
    worst = max(_stopped_share(process) for process in processes)
    stopped = sum(item.num_throttled_periods or 0 for item in around)
    periods = sum(item.num_periods or 0 for item in around)
    status: CheckStatus = "invalid" if worst else "ok"
    detail = f"the CPU quota was used up in {stopped} of {periods} periods"
    return Check(id="cpu_quota", status=status, detail=detail, value=worst, limit=MOST_STOPPED_SHARE)


def _disturbance(attempts: Sequence[Attempt]) -> Check:
    """The share of the timed time in which other work took the CPU; such calls say nothing about the model."""
    shares = [share for attempt in attempts if (share := disturbed_share([attempt.samples])) is not None]
    worst = max(shares, default=0.0)
    statuses: dict[bool, CheckStatus] = {True: "invalid", False: "warning" if worst > 0 else "ok"}
    detail = f"a process was disturbed in at most {worst:.0%} of its timed calls" if worst else "no call was disturbed"
    return Check(
        id="disturbance",
        status=statuses[worst > MOST_DISTURBED_SHARE],
        detail=(detail + (_names(attempts) if worst else ""))[:500],
        value=worst,
        limit=MOST_DISTURBED_SHARE,
    )


def _cpu_witness(processes: Sequence[ProcessSamples]) -> Check:
    """Compare CPU time with wall time: the clock alone cannot distinguish a slow call from one that was not running."""
    cores = cpu_share(processes)
    if cores is None:
        return Check(id="cpu_time", status="unavailable", detail="the model does not run on the CPU")
    off = [is_off for process in processes for is_off in off_cpu(process.prefill)]
    detail = f"prefills computed on {cores:.2f} cores; {sum(off)} of {len(off)} were off the CPU for a while"
    return Check(id="cpu_time", status="ok", detail=detail, value=cores)


def _throttling(attempts: Sequence[Attempt]) -> Check:
    reasons = sorted(
        {r for attempt in attempts for point in attempt.telemetry for r in point.throttle_reasons} - HARMLESS
    )
    if reasons:
        return Check(id="throttling", status="invalid", detail=f"the device throttled: {', '.join(reasons)}")
    return Check(id="throttling", status="ok", detail="the device did not report throttling")


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
    if middle < 4:  # noqa: PLR2004 - too few for a median
        return None
    return statistics.median(durations_ns[middle:]) / statistics.median(durations_ns[:middle]) - 1.0


def _numbers(processes: Sequence[ProcessSamples]) -> Check:
    counts = [process.num_nonfinite_logits for process in processes]
    if None in counts:
        return Check(id="finite_logits", status="unavailable", detail="the engine does not show its logits")
    bad = sum(count or 0 for count in counts)
    status: CheckStatus = "invalid" if bad else "ok"
    return Check(
        id="finite_logits", status=status, detail=f"{bad} logits were NaN or infinite", value=float(bad), limit=0.0
    )


def _swap(growth_bytes: int | None) -> Check:
    if growth_bytes is None:
        return Check(id="swap", status="unavailable", detail="the system does not report how much is swapped out")
    status: CheckStatus = "invalid" if growth_bytes > SWAP_BYTES else "ok"
    detail = f"{max(growth_bytes, 0)} bytes were swapped out during the measurement"
    return Check(id="swap", status=status, detail=detail, value=float(growth_bytes), limit=float(SWAP_BYTES))


def _paging(processes: Sequence[ProcessSamples]) -> Check:
    """Look for pages that were read from the disk: then memory was short, even if nothing was swapped out."""
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
        detail=f"the harness itself used {worst:.2%} of one core while its child processes measured",
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
    """A card's memory: whether it is known, and whether it may have spilled into system memory (WDDM, WSL)."""
    if DEVICE_KINDS[device.kind].is_host:
        return []
    if not memory.vram:
        return [Check(id="vram", status="unavailable", detail=memory.vram_reason or "not measured")]
    peak = max(series.peak_bytes for series in memory.vram)
    total = next((w.memory_total_bytes for w in (device.gpu.nvml, device.gpu.cuda) if w), None) if device.gpu else None
    if total and peak > FULL_SHARE * total:
        detail = f"the card was full ({peak} of {total} bytes): a driver may have moved data to system memory"
        return [Check(id="vram", status="invalid", detail=detail, value=float(peak), limit=FULL_SHARE * total)]
    if (spilled := max(series.spilled_bytes or 0 for series in memory.vram)) > CROSS_CHECK_BYTES:
        detail = f"{spilled} bytes of the card's memory were in system memory: the driver moved what did not fit"
        return [Check(id="vram", status="invalid", detail=detail, value=float(spilled), limit=float(CROSS_CHECK_BYTES))]
    if apart := [words for series in memory.vram if (words := disagreement(series))]:
        return [Check(id="vram", status="invalid", detail=f"two methods disagree: {apart[0]}", value=float(peak))]
    detail = f"peak {peak} bytes by {memory.vram[0].method}"
    if memory.vram_caveat:
        return [Check(id="vram", status="warning", detail=f"{detail}: {memory.vram_caveat}"[:500], value=float(peak))]
    return [Check(id="vram", status="ok", detail=detail, value=float(peak))]
