"""Check that a measurement measured what it says.

Each function is one rule of `rules.py`: it returns None if the rule holds, else a sentence with the figures. A quantity
that the device does not offer (such as clocks of a CPU) breaks no rule; a quantity that contradicts itself does.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from ...export.runtime.devices import DEVICE_KINDS
from . import disturbance, physics
from .case import Case, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .record import ProcessSamples, Record
    from .schema import MemorySeries

LOADED_BESIDE = ("LD_PRELOAD", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
"""Environment variables that load foreign code into a process that measures; it can change the clock."""
MOST_WORK_ERROR = 0.25
"""Quantized products of few and of many rows differ by hundredths; values that were never computed differ by 1."""
_MOST_SHAPE_NODES = 8
_LONG_CONTEXT, _MOST_SHORT_STEP = 128, 1.5
_CLOCK_SHARE, _CLOCK_SLACK_NS = 0.01, 100_000_000
"""Time servers change the speed of a clock by at most 0.05 %; the coarsest clock ticks in hundredths of a second."""
HARMLESS_THROTTLE_REASONS = frozenset({"none", "gpu_idle", "applications_clocks_setting", "display_clock_setting"})
CROSS_CHECK_BYTES = 64_000_000
CROSS_CHECK_SHARE = 0.05
CLOCK_DROP_SHARE = 0.10
MIN_DISTINCT_OUTPUTS = 2
STEAL_SHARE = 0.10
FOREIGN_SHARE = 0.25
MOST_DISTURBED_SHARE = 0.5
MOST_STOPPED_SHARE = 0.01
LEAST_CORES = 0.5
"""The least CPU time of a process that computes a model, in cores."""


@rule("V01", "The record was made for a release.")
def purpose_is_release(case: Case) -> str | None:
    """Refuse a measurement whose purpose was to rank candidates of a search."""
    if case.record.purpose != "screen":
        return None
    return "a screening record ranks candidates and cannot decide a release: measure with purpose confirm or release"


@rule("V02", "The work is the one that the limits are for.")
def workload_is_the_targets(case: Case) -> str | None:
    """Require exactly the work that the limits are for."""
    wanted, found = case.target.workload, case.record.workload
    different = [
        f"{field} {getattr(found, field)} instead of {value}"
        for field, value in wanted.model_dump().items()
        if getattr(found, field) != value
    ]
    num_threads = case.target.protocol.num_threads
    if num_threads is not None and case.record.protocol.num_threads != num_threads:
        different.append(f"num_threads {case.record.protocol.num_threads} instead of {num_threads}")
    return f"another workload was measured: {', '.join(different)}" if different else None


@rule("V03", "The harness found no fault during the measurement.")
def recorded_checks_hold(case: Case) -> str | None:
    """Refuse a measurement that the harness itself found invalid."""
    broken = [f"{check.id}: {check.detail}" for check in case.record.checks if check.status == "invalid"]
    return (
        f"invalid when measured: {broken[0]}{f' (and {len(broken) - 1} more)' if broken[1:] else ''}"
        if broken
        else None
    )


@rule("V04", "Every process is in the record exactly once.")
def every_process_is_there(case: Case) -> str | None:
    """Count the processes, so that no bad process is dropped and none counts twice."""
    indices = [process.process for process in case.record.samples]
    promised = case.record.protocol.num_processes
    if len(set(indices)) != len(indices):
        return "two sets of samples have the same process number"
    if indices and len(indices) != promised:
        return f"{promised} processes were planned, but {len(indices)} are in the record"
    return None


@rule("V05", "Every node ran on the provider.")
def every_node_ran_on_the_provider(case: Case) -> str | None:
    """Require proof that no node fell back to another provider."""
    provider = case.record.protocol.provider
    if case.record.subject.engine is not None:
        return _ran_on_the_cpu(case.record)
    if provider != DEVICE_KINDS[case.record.device.kind].provider:
        return f"{provider} does not run on a {case.record.device.kind} device"
    for process in case.record.samples:
        elsewhere = {name: count for name, count in process.nodes_by_provider.items() if name != provider and count}
        if elsewhere:
            name, count = next(iter(elsewhere.items()))
            return f"process {process.process}: {count} nodes ran on {name}, not on {provider}"
        if process.num_shape_nodes > _MOST_SHAPE_NODES:
            return (
                f"process {process.process}: {process.num_shape_nodes} nodes that compute shapes ran on the CPU, but "
                f"no graph of HAVOC has more than {_MOST_SHAPE_NODES}"
            )
        if not process.nodes_by_provider.get(provider):
            return f"process {process.process}: which provider ran the nodes was not proved"
    return None


def _ran_on_the_cpu(record: Record) -> str | None:
    """Another engine does not show its nodes: its process's CPU time must show that the model was computed there."""
    cores = disturbance.cpu_share(record.samples)
    if not DEVICE_KINDS[record.device.kind].is_host:
        return f"another engine's model was measured on a {record.device.kind} device, where what ran it is not known"
    if cores is None or cores < LEAST_CORES:
        used = "an unknown number of cores" if cores is None else f"{cores:.2f} cores"
        return f"the engine's process used {used}, at least {LEAST_CORES:g} are needed: another process ran the model"
    return None


@rule("V06", "Every token was generated and timed.")
def every_token_was_generated(case: Case) -> str | None:
    """Compare generated tokens and timed steps with the request."""
    wanted = case.record.workload.decode_tokens
    for process in case.record.samples:
        for episode in process.decode:
            if episode.num_tokens != wanted or len(episode.step_ns) != wanted - 1:
                return (
                    f"process {process.process}: {episode.num_tokens} tokens in {len(episode.step_ns)} steps instead "
                    f"of {wanted} in {wanted - 1}"
                )
    return None


@rule("V07", "Every logit is finite.")
def logits_are_finite(case: Case) -> str | None:
    """Refuse a fast model that computes NaN."""
    counts = [process.num_nonfinite_logits for process in case.record.samples]
    if None in counts and case.record.subject.engine is None:
        return "the logits that are not finite were not counted"
    bad = sum(count or 0 for count in counts)
    return f"{bad} NaN or infinite logits: the speed of a broken model means nothing" if bad else None


@rule("V08", "Different inputs gave different outputs.")
def outputs_vary(case: Case) -> str | None:
    """Refuse equal outputs for different inputs, such as answers from a cache."""
    for process in case.record.samples:
        if len(process.prefill.duration_ns) > 1 and process.num_distinct_outputs < MIN_DISTINCT_OUTPUTS:
            return f"process {process.process}: every input gave the same output, like an answer from a cache"
    return None


@rule("V09", "The device did not throttle.")
def nothing_throttled(case: Case) -> str | None:
    """Refuse a window in which the device throttled."""
    reasons = {reason for point in case.record.telemetry for reason in point.throttle_reasons}
    slow = sorted(reasons - HARMLESS_THROTTLE_REASONS)
    return (
        f"the device throttled ({', '.join(slow)}): cool it, fix the power supply and measure again" if slow else None
    )


@rule("V10", "The clocks were steady.")
def clocks_are_steady(case: Case) -> str | None:
    """Refuse core clocks, of a card or a CPU, that fell during the work."""
    clocks = [clock for point in case.record.telemetry if (clock := point.sm_clock_mhz or point.cpu_clock_mhz)]
    if not clocks:
        return None
    typical = statistics.median(clocks)
    tenth = sorted(clocks)[len(clocks) // 10]
    if tenth >= (1 - CLOCK_DROP_SHARE) * typical:
        return None
    return f"the core clock fell from {typical:g} to {tenth:g} MHz during the measurement"


@rule("V11", "No other process used the device.")
def no_foreign_process(case: Case) -> str | None:
    """Refuse a device that another process used during the measurement."""
    seen = max((point.num_foreign_processes or 0 for point in case.record.telemetry), default=0)
    return f"{seen} foreign processes used the device during the measurement" if seen else None


@rule("V12", "The hypervisor did not take the CPU away.")
def cpu_was_not_stolen(case: Case) -> str | None:
    """Refuse a process whose virtual CPU the hypervisor gave to another machine."""
    worst = max((process.steal_share or 0.0 for process in case.record.samples), default=0.0)
    if worst <= STEAL_SHARE:
        return None
    return f"the hypervisor took {worst:.0%} of the CPU time away (at most {STEAL_SHARE:.0%})"


@rule("V25", "The CPU did no other work.")
def cpu_was_not_busy(case: Case) -> str | None:
    """Refuse a measurement beside other work: too much of it in one process, or for more than half of the time."""
    processes = case.record.samples
    worst = max((process.foreign_cpu_share or 0.0 for process in processes), default=0.0)
    if worst > FOREIGN_SHARE:
        return f"other processes used {worst:.0%} of the CPU (at most {FOREIGN_SHARE:.0%}): free the machine"
    disturbed = max((disturbance.disturbed_share([process]) or 0.0 for process in processes), default=0.0)
    if disturbed <= MOST_DISTURBED_SHARE:
        return None
    return (
        f"a process was disturbed in {disturbed:.0%} of its time (at most {MOST_DISTURBED_SHARE:.0%}), "
        "by other work on the CPU or because it was not running: free the machine"
    )


@rule("V26", "No CPU quota was used up.")
def quota_was_not_used_up(case: Case) -> str | None:
    """Refuse a process that its control group stopped, because the CPU time it is allowed was used up."""
    around = [process.surroundings for process in case.record.samples if process.surroundings is not None]
    counted = [(item.num_throttled_periods or 0, item.num_periods) for item in around if item.num_periods]
    if not counted:
        return None
    stopped, periods = max(counted, key=lambda pair: pair[0] / pair[1])
    if stopped <= MOST_STOPPED_SHARE * periods:
        return None
    quota = case.record.host.cpu_quota_cores
    limit = "" if quota is None else f" of {quota:g} cores"
    return f"the CPU quota{limit} was used up in {stopped} of {periods} periods: raise it, or use fewer threads"


@rule("V13", "No parallel tests ran beside the measurement.")
def not_under_xdist(case: Case) -> str | None:
    """Refuse timings taken beside parallel test workers."""
    worker = case.record.protocol.environment.get("PYTEST_XDIST_WORKER")
    return f"measured inside pytest-xdist worker {worker}, beside other tests" if worker else None


@rule("V30", "No foreign code was loaded into the processes.")
def nothing_was_loaded_beside(case: Case) -> str | None:
    """Refuse a measurement whose environment loaded foreign code into its processes."""
    found = [name for name in LOADED_BESIDE if case.record.protocol.environment.get(name)]
    if not found:
        return None
    return f"measured with {' and '.join(found)} set, which can load code that changes clocks: unset it, measure again"


@rule("V31", "Independent clocks agree.")
def clocks_agree(case: Case) -> str | None:
    """Compare the duration of the counted part by every clock of a process: a manipulated clock differs."""
    for process in case.record.samples:
        spans = process.clock_span_ns
        if spans and max(spans.values()) - min(spans.values()) > _CLOCK_SHARE * max(spans.values()) + _CLOCK_SLACK_NS:
            told = ", ".join(f"{name} {span_ns / 1e9:.3f} s" for name, span_ns in spans.items())
            return f"process {process.process}: its clocks disagree ({told}): one of them was manipulated"
    return None


@rule("V32", "Timed calls did the work.")
def timed_calls_did_the_work(case: Case) -> str | None:
    """Refuse a model that does less work when it is timed."""
    for process in case.record.samples:
        work = process.work_done
        if work is None:
            continue
        where = f"process {process.process}"
        if work.largest_error > MOST_WORK_ERROR:
            return (
                f"{where}: timed calls left other keys and values than the same tokens read untimed (error "
                f"{work.largest_error:.3g}, at most {MOST_WORK_ERROR:g}): the model skips work when it is timed"
            )
        if work.step_error is not None and work.step_error > MOST_WORK_ERROR:
            return (
                f"{where}: single steps left other logits, keys or values than one call that reads the same tokens "
                f"(error {work.step_error:.3g}, at most {MOST_WORK_ERROR:g}): the model skips work when it is timed"
            )
        steps = [ns for run in process.decode for ns in run.step_ns]
        if case.record.workload.context_tokens < _LONG_CONTEXT or not (steps and work.short_step_ns):
            continue
        short_ns, long_ns = min(work.short_step_ns), statistics.median(steps)
        if short_ns > _MOST_SHORT_STEP * long_ns:
            return (
                f"{where}: a step after a few tokens takes at least {short_ns / 1e6:.3g} ms, a step after many "
                f"{long_ns / 1e6:.3g} ms: the model skips work when it is timed"
            )
    return None


@rule("V14", "The peak memory holds the weights.")
def memory_holds_the_weights(case: Case) -> str | None:
    """Refuse a peak smaller than the loaded weights: a failed reading, or GB stored as bytes."""
    weight_bytes = case.record.subject.weight_bytes
    for kind, series in _memory_series(case.record):
        least = weight_bytes if kind == "VRAM" else int(weight_bytes * physics.SURE_SHARE)
        if series.peak_bytes < least:
            peak = f"peak {kind} of {series.peak_bytes} bytes"
            return f"process {series.process}: {peak} is less than the {weight_bytes} bytes of weights"
    return None


@rule("V15", "Two memory methods agree.")
def memory_methods_agree(case: Case) -> str | None:
    """Compare two ways of measuring the same peak."""
    for kind, series in _memory_series(case.record):
        if series.cross_check_bytes is None:
            continue
        apart = abs(series.peak_bytes - series.cross_check_bytes)
        if apart > max(CROSS_CHECK_BYTES, CROSS_CHECK_SHARE * series.peak_bytes):
            return (
                f"peak {kind} is {series.peak_bytes} bytes by {series.method} "
                f"but {series.cross_check_bytes} by {series.cross_check_method}"
            )
    return None


@rule("V16", "Times are in one unit on one clock.")
def clock_is_one(case: Case) -> str | None:
    """Require that calls do not overlap; they would if durations had another unit than start times.

    Prefills come first, then first tokens, then decode runs: no call begins before the previous one ended.
    """
    for process in case.record.samples:
        end_ns = 0
        for name, start_ns, duration_ns in _timeline(process):
            if start_ns < end_ns:
                return f"process {process.process}: {name} overlaps the previous call, so times are not in one unit"
            end_ns = start_ns + duration_ns
    return None


def _timeline(process: ProcessSamples) -> Iterator[tuple[str, int, int]]:
    for name, calls in (("a prefill", process.prefill), ("a first token", process.ttft)):
        for start_ns, duration_ns in zip(calls.start_ns, calls.duration_ns, strict=True):
            yield name, start_ns, duration_ns
    for run in process.decode:
        yield "a decode run", run.start_ns, run.prefill_ns + sum(run.step_ns)


@rule("V17", "No call was faster than the device can be.")
def not_faster_than_physics(case: Case) -> str | None:
    """Refuse times below the device's roofline: they come from another card, other work or a wrong clock."""
    processes = case.record.samples
    prefills = [ns for process in processes for calls in (process.prefill, process.ttft) for ns in calls.duration_ns]
    steps = [ns for process in processes for episode in process.decode for ns in episode.step_ns]
    for what, fastest_ns, floor_s in (
        ("a prefill", min(prefills, default=math.inf), physics.prefill_floor_s(case)),
        ("a token", statistics.median(steps or [math.inf]), physics.step_floor_s(case)),
        ("a load", min((process.load_ns for process in processes), default=math.inf), physics.LEAST_LOAD_S),
    ):
        if fastest_ns < floor_s * 1e9:
            return f"{what} took {fastest_ns / 1e6:.4g} ms, but the device needs at least {floor_s * 1e3:.4g} ms"
    return None


def _memory_series(record: Record) -> Iterator[tuple[str, MemorySeries]]:
    yield from (("VRAM", series) for series in record.memory.vram)
    yield from (("RSS", series) for series in record.memory.rss)
