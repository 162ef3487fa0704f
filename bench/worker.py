"""The child that measures: `python -m havoc_core.bench.worker` does one job of `requests`.

It is a fresh process with its own session and loads as little as it can: what it costs is what the artifact costs.
Times are `perf_counter_ns`, whose clock all processes of a machine share. Inputs are drawn, and outputs checked,
outside the timed span; the garbage collector is off inside it. Keys and values stay in buffers that were allocated
once: no call is charged for allocating them.

    B batch, T prompt tokens, V vocab
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HavocError
from ..export.runtime.devices import kind_of_provider
from ..export.runtime.serving import serve, served
from ..export.runtime.session import DecoderSession
from ..storage import scratch_directory
from . import warmup
from .clocks import clock_readings, clock_spans
from .own_process import SurroundingsWatch, own_usage, peak_rss_bytes, reset_peak_rss, rss_bytes
from .page_cache import disk_read_bytes, put_out, state_of
from .requests import (
    ARENA,
    COLD_START,
    COST,
    LATENCY,
    MEMORY,
    ArenaResult,
    ColdStartResult,
    LatencyResult,
    Mark,
    PeakMemory,
)
from .witness import Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..export.runtime.past import Past
    from ..model.config import HavocConfig
    from .profiles import Series
    from .requests import MeasureRequest

    Tell = Callable[[Mark], None]

UNCOUNTED_S = 0.5


@dataclass
class Measured:
    """Calls of one kind as they are timed."""

    start_ns: list[int] = field(default_factory=list)
    duration_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)

    def add(self, start_ns: int, end_ns: int, cpu_ns: int | None = None) -> None:
        """Keep one call, with the CPU time of all threads during it where that tells something."""
        self.start_ns.append(start_ns)
        self.duration_ns.append(max(end_ns - start_ns, 1))
        if cpu_ns is not None:
            self.cpu_ns.append(cpu_ns)

    @property
    def busy_s(self) -> float:
        """Seconds spent inside the calls."""
        return sum(self.duration_ns) / 1e9


class Bench:
    """One open artifact, its inputs, and what was noticed about its outputs."""

    def __init__(self, request: MeasureRequest, tell: Tell, *, profile: Path | None = None) -> None:
        self.request = request
        self.tell = tell
        self.workload = request.workload
        self.zero_ns = time.perf_counter_ns()
        self.around = SurroundingsWatch(zero_ns=self.zero_ns)
        self.rng = np.random.default_rng([self.workload.seed, request.process])
        self.num_nonfinite_logits = 0
        self.outputs: set[bytes] = set()
        self.session = self._open(profile)
        self.past = self.session.empty_past(self.workload.batch_size, capacity=self._require_context())
        self.witness = Witness(self.session)
        self.plain_ids = plain_ids(self.session.config)

    def _open(self, profile: Path | None) -> DecoderSession:
        begin = time.perf_counter_ns()
        session = DecoderSession.open(
            self.request.artifact,
            provider=self.request.provider,
            provider_options={"enable_cuda_graph": "1"} if self.request.captures_steps else None,
            num_threads=self.request.num_threads,
            profile=profile,
            alpha=self.request.alpha,
        )
        self.load_ns = time.perf_counter_ns() - begin
        return session

    def _require_context(self) -> int:
        """Tokens the longest call of the workload needs; a `HavocError` where model or cache has fewer."""
        needed = max(self.workload.prompt_tokens, self.workload.context_tokens + self.workload.decode_tokens)
        has = self.session.config.max_seq_len
        if needed > has:
            raise HavocError(f"the workload needs {needed} tokens of context, this model has {has}")
        holds = self.session.options.cache_len
        if holds is not None and needed > holds:
            raise HavocError(
                f"the workload needs {needed} tokens, this artifact's static cache holds {holds}: "
                f"export with --cache-len {needed} or more"
            )
        return needed

    def prefill(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Past]:
        """Read prompts [B, T] into the buffers, over what the call before left there."""
        return self.session.extend(ids, None, self.past)

    def read(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Past]:
        """Read prompts as often as the workload has passes, every time from their first token to logits on the host."""
        for _ in range(self.workload.passes - 1):
            self.prefill(ids)
        return self.prefill(ids)

    def mark(self, name: str, *, num_tokens: int = 0) -> None:
        """Tell the parent that a phase begins now."""
        self.tell(Mark(name=name, t_ns=time.perf_counter_ns(), num_tokens=num_tokens))

    def prompt(self, num_tokens: int) -> NDArray[np.int64]:
        """Uniform random ids [B, T] of plain tokens, new for every call."""
        return self.rng.choice(self.plain_ids, size=(self.workload.batch_size, num_tokens))

    def check(self, logits: NDArray[np.float32]) -> None:
        """Notice NaN and infinity, and whether different inputs give different outputs."""
        self.num_nonfinite_logits += int(logits.size - np.isfinite(logits).sum())
        self.outputs.add(hashlib.blake2b(np.ascontiguousarray(logits).tobytes(), digest_size=8).digest())

    def cpu_ns(self) -> int | None:
        """CPU time of all threads so far; None where the model runs on another processor, which this does not count."""
        return time.process_time_ns() if kind_of_provider(self.request.provider).is_host else None

    def keep(self, into: Measured, begin: int, end: int, cpu_before: int | None) -> None:
        """Keep one call between two clock readings, and look around where the last look is old."""
        cpu_now = self.cpu_ns()
        used = None if cpu_now is None or cpu_before is None else cpu_now - cpu_before
        into.add(begin - self.zero_ns, end - self.zero_ns, used)
        self.around.look()

    def chosen(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """The likeliest token of each row [B, 1]; never the one that stands for a patch, as when text is written."""
        vision = self.session.config.vision
        if vision is not None:
            logits = logits.copy()
            logits[:, vision.image_token_id] = -np.inf
        token_ids_B1: NDArray[np.int64] = logits.argmax(axis=-1)[:, None]
        return token_ids_B1

    def time_prefill(self, into: Measured) -> None:
        """One prefill of a new prompt, of all passes, to its last-token logits on the host."""
        ids = self.prompt(self.workload.prompt_tokens)
        cpu_before = self.cpu_ns()
        begin = time.perf_counter_ns()
        logits, past = self.read(ids)
        end = time.perf_counter_ns()
        self.keep(into, begin, end, cpu_before)
        self.check(logits)
        self.witness.keep(ids, past)

    def time_first_token(self, into: Measured) -> None:
        """One request from its text (ids where the artifact has no tokenizer) to the text of its first token.

        In a batch every request is the same text.
        """
        tokenizer, num_tokens = self.session.tokenizer, self.workload.prompt_tokens
        ids = self.prompt(num_tokens)
        text = "" if tokenizer is None else tokenizer.decode(ids[0].tolist())
        cpu_before = self.cpu_ns()
        begin = time.perf_counter_ns()
        if tokenizer is not None:
            encoded = (tokenizer.encode(text) * num_tokens)[:num_tokens]
            ids = np.array([encoded or ids[0].tolist()] * len(ids), dtype=np.int64)
        logits, past = self.read(ids)
        token = int(logits[0].argmax())
        if tokenizer is not None:
            tokenizer.decode([token])
        end = time.perf_counter_ns()
        self.keep(into, begin, end, cpu_before)
        self.check(logits)
        self.witness.keep(ids, past)

    def time_episode(self, most_s: float = math.inf) -> dict[str, Any]:
        """Decode greedily after a new context: the first token comes with the prefill, others take timed steps.

        `most_s` ends it early, after that many seconds of decoding: for an episode that does not count.
        """
        ids = self.prompt(self.workload.context_tokens)
        begin = before = time.perf_counter_ns()
        logits, past = self.prefill(ids)
        token_ids = self.chosen(logits)
        after = time.perf_counter_ns()
        prefill_ns = max(after - before, 1)
        step_ns: list[int] = []
        read: list[NDArray[np.int64]] = []
        cpu_before = self.cpu_ns()
        for _ in range(self.workload.decode_tokens - 1):
            read.append(token_ids)
            before = time.perf_counter_ns()
            logits, past = self.session.decode(token_ids, None, past)
            token_ids = self.chosen(logits)
            step_ns.append(max(time.perf_counter_ns() - before, 1))
            self.around.look()
            if sum(step_ns) > most_s * 1e9:
                break
        cpu_now = self.cpu_ns()
        self.check(logits)
        self.witness.keep(ids, past)
        self.witness.keep_steps(ids, read, logits, past)
        return {
            "start_ns": begin - self.zero_ns,
            "prefill_ns": prefill_ns,
            "step_ns": step_ns,
            "num_tokens": 1 + len(step_ns),
            "cpu_ns": None if cpu_now is None or cpu_before is None else cpu_now - cpu_before,
        }

    def warm_up(self) -> dict[str, Any]:
        """Prefill until two windows agree as far as their own scatter lets them, within the plan's bounds.

        All calls are kept.
        """
        profile, calls = self.request.profile, Measured()
        self.time_prefill(calls)
        window = warmup.calls_per_window(calls.duration_ns[0], profile.warmup_window_s)
        medians: list[int] = []
        tolerance = warmup.LEAST_TOLERANCE
        while not warmup.is_steady(medians, tolerance) and (len(medians) < 2 or calls.busy_s < profile.warmup_max_s):  # noqa: PLR2004
            for _ in range(window):
                self.time_prefill(calls)
            medians = warmup.window_medians(calls.duration_ns[1:], window)
            tolerance = warmup.tolerance_of(calls.duration_ns[1:], window)
        word = warmup.classify(medians, tolerance)
        return {"classification": word, "calls": as_json(calls), "window_ns": medians, "tolerance": tolerance}


def plain_ids(config: HavocConfig) -> NDArray[np.int64]:
    """All token ids but the special ones and the one that stands for an image patch."""
    special = [config.pad_token_id, config.bos_token_id, *config.eos_token_ids]
    special.append(None if config.vision is None else config.vision.image_token_id)
    taken = np.array([token_id for token_id in special if token_id is not None], dtype=np.int64)
    return np.setdiff1d(np.arange(config.vocab_size, dtype=np.int64), taken)


def as_json(calls: Measured) -> dict[str, list[int]]:
    """The record's form of timed calls."""
    return {"start_ns": calls.start_ns, "duration_ns": calls.duration_ns, "cpu_ns": calls.cpu_ns}


def rounds(
    series: Series, spent_s: Callable[[], float], *, now: Callable[[], float] = time.perf_counter
) -> Iterator[int]:
    """Count rounds until both minima are reached, or the longest time has passed and the least number is there."""
    begin, count = now(), 0
    while count < series.min_calls or spent_s() < series.min_busy_s:
        if count >= series.least and now() - begin > series.max_s:
            return
        yield count
        count += 1


def busy_s(episodes: list[dict[str, Any]]) -> float:
    """Seconds spent inside decode episodes."""
    return float(sum(episode["prefill_ns"] + sum(episode["step_ns"]) for episode in episodes) / 1e9)


def measure_latency(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """Load, first call, warm-up, prefill, first token, decode: the samples of one process."""
    tell(Mark(name="load", t_ns=time.perf_counter_ns()))
    bench = Bench(request, tell)
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
    bench.time_episode(UNCOUNTED_S)  # shapes of decoding are met for the first time here
    bench.mark("decode")
    decode.extend(bench.time_episode() for _ in rounds(profile.decode, lambda: busy_s(decode)))
    bench.around.look(force=True)
    spans = clock_spans(clocks)
    bench.mark("end", num_tokens=sum(episode["num_tokens"] for episode in decode))
    gc.enable()
    placement = bench.session.placement()
    samples = {
        "process": request.process,
        "load_ns": bench.load_ns,
        "cold_ns": cold.duration_ns[0],
        "warmup": warm,
        "prefill": as_json(prefill),
        "ttft": as_json(ttft),
        "decode": decode,
        "nodes_by_provider": {name: len(nodes) for name, nodes in placement.by_provider.items()},
        "num_shape_nodes": len(placement.shapes),
        "num_nonfinite_logits": bench.num_nonfinite_logits,
        "num_distinct_outputs": len(bench.outputs),
        "busy_ns": sum(prefill.duration_ns) + sum(ttft.duration_ns) + round(busy_s(decode) * 1e9),
        **bench.around.shares(first_look),
        "surroundings": bench.around.as_json(),
        "clock_span_ns": spans,
        "work_done": bench.witness.testify(bench.past),
        **{key: value - usage[key] for key, value in own_usage().items()},
    }
    return LatencyResult(samples=samples, provider_options=bench.session.provider_options)


def measure_cold_start(request: MeasureRequest, tell: Tell) -> ColdStartResult:
    """Put the artifact out of the page cache, load it and call it once; what was read from the disk is counted."""
    files = [file for file in request.artifact.iterdir() if file.is_file()]
    num_file_bytes = sum(file.stat().st_size for file in files if ".onnx" in file.name)
    put_out(files)
    before = disk_read_bytes()
    tell(Mark(name="load", t_ns=time.perf_counter_ns()))
    bench, first = Bench(request, tell), Measured()
    bench.time_prefill(first)
    after = disk_read_bytes()
    read_bytes = None if before is None or after is None else after - before
    return ColdStartResult(
        page_cache=state_of(read_bytes, num_file_bytes),
        read_bytes=read_bytes,
        load_ns=bench.load_ns,
        first_call_ns=first.duration_ns[0],
    )


def measure_memory(request: MeasureRequest, tell: Tell) -> PeakMemory:
    """Load, first run, steady state, each with the highest resident set the kernel saw; the parent samples too.

    Within the first run it is marked where decoding begins.
    """
    peaks: dict[str, int | None] = {}

    def begin(phase: str) -> None:
        reset_peak_rss()
        tell(Mark(name=phase, t_ns=time.perf_counter_ns()))

    baseline = rss_bytes()
    begin("load")
    bench = Bench(request, tell)
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


def measure_arena(request: MeasureRequest, tell: Tell) -> ArenaResult:
    """The most the runtime's allocator held for the provider while it read and wrote once, by its own profile."""
    with scratch_directory("havoc-profile-") as folder:
        bench = Bench(request, tell, profile=folder / "arena")
        bench.time_prefill(Measured())
        bench.time_episode()
        events = json.loads(bench.session.end_profiling().read_bytes())
    held = (event["args"] for event in events if event.get("args", {}).get("provider") == request.provider)
    return ArenaResult(arena_bytes=max((int(node.get("mem_arena_held", 0)) for node in held), default=0) or None)


def measure_cost(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """The samples of a short latency run, and the peak resident set of the same process: enough to rank by."""
    baseline = rss_bytes()
    measured = measure_latency(request, tell)
    return replace(measured, memory=PeakMemory(baseline_bytes=baseline, peak_bytes=peak_rss_bytes()))


JOBS = (
    served(LATENCY, measure_latency),
    served(COST, measure_cost),
    served(MEMORY, measure_memory),
    served(COLD_START, measure_cold_start),
    served(ARENA, measure_arena),
)

if __name__ == "__main__":
    sys.exit(serve(JOBS))
