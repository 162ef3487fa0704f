"""The child that measures another engine's model: `havoc_core.bench.engine_worker` does one job of `requests`.

It may run in the engine's own environment, so besides the engine it needs only NumPy. An engine only gives tokens: a
prefill ends with the first token. It is unknown whether every logit was finite, and which kernels ran.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HavocError, MeasurementError
from ..export.runtime.serving import serve, served
from . import timing
from .engines.engine import load_engine
from .judge.engine_files import files_of, is_weights
from .requests import (
    COLD_START,
    COST,
    ENGINE_LOGITS,
    LATENCY,
    MEMORY,
    ColdStartResult,
    LatencyResult,
    LogitsResult,
    PeakMemory,
)
from .timing import Measured, TimedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .requests import LogitsRequest, MeasureRequest
    from .timing import Tell


class EngineModel(TimedModel):
    """One open model of another engine; a failure of the engine becomes one line with the engine's message."""

    def __init__(self, request: MeasureRequest, tell: Tell) -> None:
        super().__init__(request, tell)
        self._engine = load_engine(request.engine or "")
        work = self.workload
        capacity = max(work.prompt_tokens + 1, work.context_tokens + work.decode_tokens)
        try:
            self._engine.prepare()
            begin = time.perf_counter_ns()
            self._model = self._engine.open_model(
                str(request.artifact), num_threads=request.num_threads, capacity=capacity
            )
            self.load_ns = max(time.perf_counter_ns() - begin, 1)
        except Exception as error:
            raise HavocError(f"{self._engine.PACKAGE} cannot open {request.artifact} ({_words(error)})") from error

    def cpu_ns(self) -> int | None:
        """CPU time of all threads if the engine computes in this process."""
        return time.process_time_ns() if self._model.is_own_process else None

    def time_prefill(self, into: Measured) -> None:
        """Read a new prompt and generate the first token."""
        ids = self._prompt(self.workload.prompt_tokens)
        cpu_before = self.cpu_ns()
        begin = time.perf_counter_ns()
        tokens = list(self._each(ids, 1))
        end = time.perf_counter_ns()
        self.keep(into, begin, end, cpu_before)
        self._hear(tokens)

    def time_first_token(self, into: Measured) -> None:
        """The same as a prefill: an engine takes token ids and returns one."""
        self.time_prefill(into)

    def time_episode(self, *, counts: bool = True) -> dict[str, Any]:
        """Decode after a new context; uncounted runs ask for few tokens, because an engine cannot be stopped."""
        num_context, num_tokens = self.workload.context_tokens, self.workload.decode_tokens
        if not counts:
            num_context, num_tokens = min(num_context, timing.UNCOUNTED_CONTEXT_TOKENS), min(num_tokens, 8)
        ids = self._prompt(num_context)
        times_ns: list[int] = []
        tokens: list[int] = []
        begin = before = time.perf_counter_ns()
        cpu_before = self.cpu_ns()
        for token in self._each(ids, num_tokens):
            now = time.perf_counter_ns()
            times_ns.append(max(now - before, 1))
            if not tokens:
                cpu_before = self.cpu_ns()
            tokens.append(token)
            self.around.look()
            before = time.perf_counter_ns()
        cpu_now = self.cpu_ns()
        self._hear(tokens)
        return {
            "start_ns": begin - self.zero_ns,
            "prefill_ns": times_ns[0],
            "step_ns": times_ns[1:],
            "num_tokens": len(tokens),
            "cpu_ns": None if cpu_now is None or cpu_before is None else cpu_now - cpu_before,
        }

    def proofs(self) -> dict[str, Any]:
        """An engine reports neither nodes nor logits."""
        return {"num_nonfinite_logits": None}

    @property
    def provider_options(self) -> dict[str, str]:
        """None: HAVOC did not open a session of ONNX Runtime."""
        return {}

    def _prompt(self, num_tokens: int) -> list[int]:
        """Uniform random ids from the whole vocabulary, new for every call."""
        ids: list[int] = self.rng.integers(self.request.num_ids, size=num_tokens).tolist()
        return ids

    def _each(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Yield tokens as they come; a wrong number of tokens or an invalid token is a `MeasurementError`."""
        name, num_given = self._engine.PACKAGE, 0
        tokens = iter(self._model.generate(ids, num_tokens))
        while (token := self._next(tokens)) is not None:
            num_given += 1
            if token >= self.request.num_ids:
                raise MeasurementError(f"{name} gave token {token}, but the model has {self.request.num_ids} tokens")
            if num_given <= num_tokens:
                yield token
        if num_given != num_tokens:
            raise MeasurementError(f"{name} gave {num_given} tokens instead of {num_tokens}")

    def _next(self, tokens: Iterator[int]) -> int | None:
        try:
            return next(tokens, None)
        except Exception as error:
            raise MeasurementError(f"{self._engine.PACKAGE} failed while it was measured ({_words(error)})") from error

    def _hear(self, tokens: list[int]) -> None:
        """Keep the output, so different outputs can be told apart."""
        self.outputs.add(hashlib.blake2b(np.array(tokens).tobytes(), digest_size=8).digest())


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def measure_latency(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """Load, first call, warm-up, prefill, first token, decode: the samples of one process."""
    return timing.measure_latency(EngineModel, request, tell)


def measure_cost(request: MeasureRequest, tell: Tell) -> LatencyResult:
    """The samples of a short latency run, and the peak resident set of the same process."""
    return timing.measure_cost(EngineModel, request, tell)


def measure_memory(request: MeasureRequest, tell: Tell) -> PeakMemory:
    """Load, first run, steady state, each with its peak."""
    return timing.measure_memory(EngineModel, request, tell)


def measure_cold_start(request: MeasureRequest, tell: Tell) -> ColdStartResult:
    """Load and call the model once, after its files were dropped from the page cache."""
    files = list(files_of(request.artifact).values())
    weights = [file for file in files if is_weights(file)]
    return timing.measure_cold_start(EngineModel, request, tell, files=files, weights=weights)


def tell_logits(request: LogitsRequest, _tell: Tell) -> LogitsResult:
    """Ask for the logits of the token after each piece; they stay NaN if the engine reports none."""
    engine = load_engine(request.engine or "")
    found = np.full((len(request.pieces), request.num_ids), np.nan, np.float32)
    try:
        engine.prepare()
        capacity = max(map(len, request.pieces)) + 1
        model = engine.open_model(request.artifact, num_threads=request.num_threads, capacity=capacity)
    except Exception as error:
        raise HavocError(f"{engine.PACKAGE} cannot open {request.artifact} ({_words(error)})") from error
    if not hasattr(model, "next_logits"):
        raise HavocError(f"{engine.PACKAGE} reports no token probabilities, so its divergence cannot be measured")
    for place, piece in enumerate(request.pieces):
        try:
            told = model.next_logits(list(piece), request.num_ids)
        except Exception as error:
            raise MeasurementError(f"{engine.PACKAGE} failed while it was measured ({_words(error)})") from error
        if told is not None:
            found[place] = np.asarray(told, np.float32)[: request.num_ids]
    np.save(request.out, found)
    return LogitsResult(num_told=int(np.isfinite(found).all(axis=1).sum()))


JOBS = (
    served(LATENCY, measure_latency),
    served(COST, measure_cost),
    served(MEMORY, measure_memory),
    served(COLD_START, measure_cold_start),
    served(ENGINE_LOGITS, tell_logits),
)

if __name__ == "__main__":
    sys.exit(serve(JOBS))
