"""How a process times its model: the first call, warm-up, prefills, first tokens, decoding, memory, a cold start.

The model is a `TimedModel`: an artifact (`worker.py`) or another engine's model (`engine_worker.py`). Clocks, plan and
samples of both come from this file, so their records mean the same.
"""

from __future__ import annotations

import abc
import gc
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import warmup
from .clocks import clock_readings, clock_spans
from .own_process import SurroundingsWatch, own_usage, peak_rss_bytes, reset_peak_rss, rss_bytes
from .page_cache import disk_read_bytes, put_out, state_of
from .requests import ColdStartResult, LatencyResult, Mark, PeakMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from .profiles import Series
    from .requests import MeasureRequest

    Tell = Callable[[Mark], None]
    Open = Callable[[MeasureRequest, Tell], "TimedModel"]

UNCOUNTED_S = 0.5
UNCOUNTED_CONTEXT_TOKENS = 32


@dataclass
class Measured:
    """Timed calls of one kind."""

    start_ns: list[int] = field(default_factory=list)
    duration_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)

    def add(self, start_ns: int, end_ns: int, cpu_ns: int | None = None) -> None:
        """Keep one call, with the CPU time of all threads during it if the model runs on the CPU."""
        self.start_ns.append(start_ns)
        self.duration_ns.append(max(end_ns - start_ns, 1))
        if cpu_ns is not None:
            self.cpu_ns.append(cpu_ns)

    @property
    def busy_s(self) -> float:
        """Seconds spent inside the calls."""
        return sum(self.duration_ns) / 1e9


class TimedModel(abc.ABC):
    """One open model with its inputs; `outputs` identifies its different outputs."""

    load_ns: int

    def __init__(self, request: MeasureRequest, tell: Tell) -> None:
        self.request = request
        self.tell = tell
        self.workload = request.workload
        self.zero_ns = time.perf_counter_ns()
        self.around = SurroundingsWatch(zero_ns=self.zero_ns)
        self.rng = np.random.default_rng([self.workload.seed, request.process])
        self.outputs: set[bytes] = set()

    @abc.abstractmethod
    def time_prefill(self, into: Measured) -> None:
        """Read a new prompt and keep the time."""

    @abc.abstractmethod
    def time_first_token(self, into: Measured) -> None:
        """Answer a new request with its first token and keep the time."""

    @abc.abstractmethod
    def time_episode(self, *, counts: bool = True) -> dict[str, Any]:
        """Decode after a new context: the fields of `schema.Episode`.

        An uncounted episode runs the shapes of decoding for the first time. It is short: at most
        `UNCOUNTED_CONTEXT_TOKENS` of context, and about `UNCOUNTED_S` of steps if it can be stopped.
        """

    @abc.abstractmethod
    def cpu_ns(self) -> int | None:
        """CPU time of all threads so far; None if the model runs on another processor, which this does not count."""

    @abc.abstractmethod
    def proofs(self) -> dict[str, Any]:
        """The fields of `schema.ProcessSamples` that say what ran and whether it did the work."""

    @property
    @abc.abstractmethod
    def provider_options(self) -> dict[str, str]:
        """Options of the session's execution provider."""

    def mark(self, name: str, *, num_tokens: int = 0) -> None:
        """Tell the parent that a phase begins now."""
        self.tell(Mark(name=name, t_ns=time.perf_counter_ns(), num_tokens=num_tokens))

    def keep(self, into: Measured, begin: int, end: int, cpu_before: int | None) -> None:
        """Keep one call between two clock readings, and read the machine's counters if the last reading is old."""
        cpu_now = self.cpu_ns()
        used = None if cpu_now is None or cpu_before is None else cpu_now - cpu_before
        into.add(begin - self.zero_ns, end - self.zero_ns, used)
        self.around.look()

    def warm_up(self) -> dict[str, Any]:
        """Prefill until two windows agree within their own scatter, within the plan's bounds.

        All calls are kept.
        """
        profile, calls = self.request.profile, Measured()
        self.time_prefill(calls)
        window = warmup.calls_per_window(calls.duration_ns[0], profile.warmup_window_s)
        medians: list[int] = []
        tolerance = warmup.LEAST_TOLERANCE
        while not warmup.is_steady(medians, tolerance) and (len(medians) < 2 or calls.busy_s < profile.warmup_max_s):  # noqa: PLR2004
            while len(calls.duration_ns) < (len(medians) + 1) * window:
                self.time_prefill(calls)
            medians = warmup.window_medians(calls.duration_ns, window)
            tolerance = warmup.tolerance_of(calls.duration_ns, window)
        word = warmup.classify(medians, tolerance)
        return {"classification": word, "calls": as_json(calls), "window_ns": medians, "tolerance": tolerance}


def as_json(calls: Measured) -> dict[str, list[int]]:
    """The record's form of timed calls."""
    return {"start_ns": calls.start_ns, "duration_ns": calls.duration_ns, "cpu_ns": calls.cpu_ns}


def rounds(
    series: Series, spent_s: Callable[[], float], *, now: Callable[[], float] = time.perf_counter
) -> Iterator[int]:
    """Count rounds until both minima are reached, or the longest time has passed with the least number of rounds."""
    begin, count = now(), 0
    while count < series.min_calls or spent_s() < series.min_busy_s:
        if count >= series.least and now() - begin > series.max_s:
            return
        yield count
        count += 1


def busy_s(episodes: list[dict[str, Any]]) -> float:
    """Seconds spent inside decode episodes."""
    return float(sum(episode["prefill_ns"] + sum(episode["step_ns"]) for episode in episodes) / 1e9)


def measure_latency(open_model: Open, request: MeasureRequest, tell: Tell) -> LatencyResult:
    """Load, first call, warm-up, prefill, first token, decode: the samples of one process."""
    tell(Mark(name="load", t_ns=time.perf_counter_ns()))
    bench = open_model(request, tell)
    profile = request.profile
    bench.mark("first_run")
    cold = Measured()
    bench.time_prefill(cold)
    bench.mark("warmup")
    warm = bench.warm_up()
    prefill, ttft = Measured(), Measured()
    decode: list[dict[str, Any]] = []
    usage = own_usage()
    gc.collect()
    gc.disable()
    bench.around.look(force=True)
    first_look = len(bench.around) - 1
    clocks = clock_readings()
    bench.mark("prefill")
    for _ in rounds(profile.prefill, lambda: prefill.busy_s):
        bench.time_prefill(prefill)
    bench.mark("ttft")
    for _ in rounds(profile.ttft, lambda: ttft.busy_s):
        bench.time_first_token(ttft)
    bench.time_episode(counts=False)
    bench.mark("decode")
    decode.extend(bench.time_episode() for _ in rounds(profile.decode, lambda: busy_s(decode)))
    bench.around.look(force=True)
    spans = clock_spans(clocks)
    bench.mark("end", num_tokens=sum(episode["num_tokens"] for episode in decode))
    gc.enable()
    samples = {
        "process": request.process,
        "load_ns": bench.load_ns,
        "cold_ns": cold.duration_ns[0],
        "warmup": warm,
        "prefill": as_json(prefill),
        "ttft": as_json(ttft),
        "decode": decode,
        "num_distinct_outputs": len(bench.outputs),
        "busy_ns": sum(prefill.duration_ns) + sum(ttft.duration_ns) + round(busy_s(decode) * 1e9),
        **bench.around.shares(first_look),
        "surroundings": bench.around.as_json(),
        "clock_span_ns": spans,
        **bench.proofs(),
        **{key: value - usage[key] for key, value in own_usage().items()},
    }
    return LatencyResult(samples=samples, provider_options=bench.provider_options)


def measure_cold_start(
    open_model: Open, request: MeasureRequest, tell: Tell, *, files: Sequence[Path], weights: Sequence[Path]
) -> ColdStartResult:
    """Drop `files` from the page cache, load the model and call it once; the bytes read from the disk are counted.

    `weights` are the files that a load reads completely.
    """
    num_file_bytes = sum(file.stat().st_size for file in weights)
    put_out(files)
    before = disk_read_bytes()
    tell(Mark(name="load", t_ns=time.perf_counter_ns()))
    bench, first = open_model(request, tell), Measured()
    bench.time_prefill(first)
    after = disk_read_bytes()
    read_bytes = None if before is None or after is None else after - before
    return ColdStartResult(
        page_cache=state_of(read_bytes, num_file_bytes),
        read_bytes=read_bytes,
        load_ns=bench.load_ns,
        first_call_ns=first.duration_ns[0],
    )


def measure_memory(open_model: Open, request: MeasureRequest, tell: Tell) -> PeakMemory:
    """Load, first run, steady state, each with the kernel's highest resident set; the parent samples too.

    The beginning of decoding within the first run is marked.
    """
    peaks: dict[str, int | None] = {}

    def begin(phase: str) -> None:
        reset_peak_rss()
        tell(Mark(name=phase, t_ns=time.perf_counter_ns()))

    baseline = rss_bytes()
    begin("load")
    bench = open_model(request, tell)
    peaks["load"] = peak_rss_bytes()
    begin("first_run")
    bench.time_prefill(Measured())
    bench.mark("decode")
    bench.time_episode()
    peaks["first_run"] = peak_rss_bytes()
    begin("steady")
    calls = Measured()
    for _ in rounds(request.profile.memory, lambda: calls.busy_s):
        bench.time_prefill(calls)
        bench.time_episode()
    peaks["steady"] = peak_rss_bytes()
    return PeakMemory(baseline_bytes=baseline, phase_peak_bytes=peaks)


def measure_cost(open_model: Open, request: MeasureRequest, tell: Tell) -> LatencyResult:
    """The samples of a short latency run, and the peak resident set of the same process: enough for a ranking."""
    baseline = rss_bytes()
    measured = measure_latency(open_model, request, tell)
    return replace(measured, memory=PeakMemory(baseline_bytes=baseline, peak_bytes=peak_rss_bytes()))
