"""The child that measures an artifact: `python -m havoc_core.bench.worker` does one job of `requests`.

It is a fresh process with its own session, and loads as little as possible, so that its costs are those of the
artifact. `timing.py` decides what is timed and when. Times are `perf_counter_ns`, whose clock all processes of a
machine share. Inputs are drawn, and outputs checked, outside the timed span; the garbage collector is off inside it.
Keys and values stay in buffers that are allocated once, so no call includes allocation.

    B batch, T prompt tokens, V vocab
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HavocError
from ..export.runtime.devices import kind_of_provider
from ..export.runtime.serving import serve, served
from ..export.runtime.session import DecoderSession
from ..storage import scratch_directory
from . import timing
from .requests import (
    ARENA,
    COLD_START,
    COST,
    LATENCY,
    LOGITS,
    MEMORY,
    ArenaResult,
    ColdStartResult,
    LatencyResult,
    LogitsResult,
    PeakMemory,
)
from .timing import Measured, TimedModel
from .witness import Witness

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ..export.runtime.past import Past
    from ..model.config import HavocConfig
    from .requests import LogitsRequest, MeasureRequest
    from .timing import Tell


class Bench(TimedModel):
    """One open artifact, its inputs, and the checks of its outputs."""

    def __init__(self, request: MeasureRequest, tell: Tell, *, profile: Path | None = None) -> None:
        super().__init__(request, tell)
        self.num_nonfinite_logits = 0
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
        """The number of tokens of the workload's longest call; a `HavocError` if model or cache has fewer."""
        needed = max(self.workload.prompt_tokens, self.workload.context_tokens + self.workload.decode_tokens)
        has = self.session.config.max_seq_len
        if needed > has:
            raise HavocError(f"the workload needs {needed} tokens of context, but this model has {has}")
        holds = self.session.options.cache_len
        if holds is not None and needed > holds:
            raise HavocError(
                f"the workload needs {needed} tokens, but this artifact's static cache has {holds}: "
                f"export with --cache-len {needed} or more"
            )
        return needed

    def prefill(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Past]:
        """Read prompts [B, T] into the buffers; this overwrites the previous call's content."""
        return self.session.extend(ids, None, self.past)

    def read(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Past]:
        """Read the prompts once per pass of the workload, each time from their first token to logits on the host."""
        for _ in range(self.workload.passes - 1):
            self.prefill(ids)
        return self.prefill(ids)

    def prompt(self, num_tokens: int) -> NDArray[np.int64]:
        """Uniform random ids [B, T] of plain tokens, new for every call."""
        return self.rng.choice(self.plain_ids, size=(self.workload.batch_size, num_tokens))

    def check(self, logits: NDArray[np.float32]) -> None:
        """Count NaN and infinity, and check whether different inputs give different outputs."""
        self.num_nonfinite_logits += int(logits.size - np.isfinite(logits).sum())
        self.outputs.add(hashlib.blake2b(np.ascontiguousarray(logits).tobytes(), digest_size=8).digest())

    def cpu_ns(self) -> int | None:
        """CPU time of all threads so far; None if the model runs on another processor, which this does not count."""
        return time.process_time_ns() if kind_of_provider(self.request.provider).is_host else None

    def chosen(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """The likeliest token of each row [B, 1]; never that of an image patch, as in text generation."""
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
        """One request from its text (ids if the artifact has no tokenizer) to the text of its first token.

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

    def time_episode(self, *, counts: bool = True) -> dict[str, Any]:
        """Decode greedily after a new context: the first token comes with the prefill, others take timed steps."""
        num_context = self.workload.context_tokens
        ids = self.prompt(num_context if counts else min(num_context, timing.UNCOUNTED_CONTEXT_TOKENS))
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
            if not counts and sum(step_ns) > timing.UNCOUNTED_S * 1e9:
                break
        cpu_now = self.cpu_ns()
        self.check(logits)
        if counts:
            self.witness.keep(ids, past)
            self.witness.keep_steps(ids, read, logits, past)
        return {
            "start_ns": begin - self.zero_ns,
            "prefill_ns": prefill_ns,
            "step_ns": step_ns,
            "num_tokens": 1 + len(step_ns),
            "cpu_ns": None if cpu_now is None or cpu_before is None else cpu_now - cpu_before,
        }

    def proofs(self) -> dict[str, Any]:
        """Where each node ran, the number of non-finite logits, and the proof that timed calls did the work."""
        placement = self.session.placement()
        return {
            "nodes_by_provider": {name: len(nodes) for name, nodes in placement.by_provider.items()},
            "num_shape_nodes": len(placement.shapes),
            "num_nonfinite_logits": self.num_nonfinite_logits,
            "work_done": self.witness.testify(self.past),
        }

    @property
    def provider_options(self) -> dict[str, str]:
        """Options of the session's execution provider."""
        return self.session.provider_options


def plain_ids(config: HavocConfig) -> NDArray[np.int64]:
    """All token ids except the special ones and that of an image patch."""
    special = [config.pad_token_id, config.bos_token_id, *config.eos_token_ids]
    special.append(None if config.vision is None else config.vision.image_token_id)
    taken = np.array([token_id for token_id in special if token_id is not None], dtype=np.int64)
    return np.setdiff1d(np.arange(config.vocab_size, dtype=np.int64), taken)


def measure_latency(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """Load, first call, warm-up, prefill, first token, decode: the samples of one process."""
    return timing.measure_latency(Bench, request, tell)


def measure_cost(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """The samples of a short latency run, and the peak resident set of the same process."""
    return timing.measure_cost(Bench, request, tell)


def measure_memory(request: MeasureRequest, tell: Tell) -> PeakMemory:
    """Load, first run, steady state, each with its peak."""
    return timing.measure_memory(Bench, request, tell)


def measure_cold_start(request: MeasureRequest, tell: Tell) -> ColdStartResult:
    """Load and call the artifact once, out of the page cache."""
    files = [file for file in request.artifact.iterdir() if file.is_file()]
    weights = [file for file in files if ".onnx" in file.name]
    return timing.measure_cold_start(Bench, request, tell, files=files, weights=weights)


def measure_arena(request: MeasureRequest, tell: Tell) -> ArenaResult:
    """The highest memory of the runtime's allocator for the provider during one read and write, by its own profile."""
    with scratch_directory("havoc-profile-") as folder:
        bench = Bench(request, tell, profile=folder / "arena")
        bench.time_prefill(Measured())
        bench.time_episode()
        events = json.loads(bench.session.end_profiling().read_bytes())
    held = (event["args"] for event in events if event.get("args", {}).get("provider") == request.provider)
    return ArenaResult(arena_bytes=max((int(node.get("mem_arena_held", 0)) for node in held), default=0) or None)


def tell_logits(request: LogitsRequest, _tell: Tell) -> LogitsResult:
    """Read each piece and keep the logits of the next token."""
    session = DecoderSession.open(request.artifact, provider=request.provider, num_threads=request.num_threads)
    found = np.stack([session.prefill(np.array([piece]))[0][0, : request.num_ids] for piece in request.pieces])
    np.save(request.out, found.astype(np.float32))
    return LogitsResult(num_told=len(found))


JOBS = (
    served(LATENCY, measure_latency),
    served(COST, measure_cost),
    served(MEMORY, measure_memory),
    served(COLD_START, measure_cold_start),
    served(ARENA, measure_arena),
    served(LOGITS, tell_logits),
)

if __name__ == "__main__":
    sys.exit(serve(JOBS))
