"""The child of `lockstep`: opens one artifact and times one episode for each request of its parent; else it sleeps.

It may run with the modules of another checkout, so that the same code measures both sides. So it uses only the decoder
of the package, and the types of its request and answer are defined here. The request is one JSON line, answered by one
line when the model is open; each further line asks for an episode and gets one line. The child ends with its standard
input.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np

from ..export.runtime.devices import kind_of_provider
from ..export.runtime.session import DecoderSession


@dataclass(frozen=True, kw_only=True)
class RulerRequest:
    """The measured model and its inputs."""

    artifact: str
    provider: str
    num_threads: int
    prompt_tokens: int
    decode_tokens: int
    seed: int
    num_ids: int | None = None
    """Prompts are drawn from this number of first token ids; None: from all ids except that of an image patch."""
    num_own_ids: int | None = None
    """The number of token ids of an engine's model; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class TimedCalls:
    """Times of calls in ns, and the CPU time of all threads for all; None if another processor runs the model."""

    wall_ns: tuple[int, ...]
    cpu_ns: int | None


@dataclass(frozen=True, kw_only=True)
class RulerReady:
    """The first answer, when the model is open: how long that took; None if a server had opened it before."""

    load_ns: int | None


@dataclass(frozen=True, kw_only=True)
class RulerEpisode:
    """The answer: one prefill, the decode steps after it, and the greedy tokens of both.

    `first` is the prefill and the choice of the first token; a step is a decode call and the choice of the next one.
    """

    prefill: TimedCalls
    first: TimedCalls
    decode: TimedCalls
    tokens: tuple[int, ...]


class Ruler:
    """One open artifact and its inputs; B = 1 prompt of T random tokens, new for every episode."""

    def __init__(self, request: RulerRequest) -> None:
        self._request = request
        begin = time.perf_counter_ns()
        self._session = DecoderSession.open(
            request.artifact, provider=request.provider, num_threads=request.num_threads
        )
        self.load_ns = time.perf_counter_ns() - begin
        capacity = request.prompt_tokens + request.decode_tokens
        self._past = self._session.empty_past(1, capacity=capacity)
        self._rng = np.random.default_rng(request.seed)
        config, num_ids = self._session.config, request.num_ids
        ids = np.arange(config.vocab_size if num_ids is None else num_ids, dtype=np.int64)
        if config.vision is not None and num_ids is None:
            ids = ids[ids != config.vision.image_token_id]
        self._ids = ids

    def episode(self) -> RulerEpisode:
        """Read a prompt, then decode."""
        ids = self._rng.choice(self._ids, size=(1, self._request.prompt_tokens))
        gc.collect()
        gc.disable()
        cpu_first, begin = time.process_time_ns(), time.perf_counter_ns()
        logits, past = self._session.extend(ids, None, self._past)
        prefill_ns, cpu_prefill = time.perf_counter_ns() - begin, time.process_time_ns()
        tokens = [logits.argmax(axis=-1)[:, None]]
        first_ns, cpu_before = time.perf_counter_ns() - begin, time.process_time_ns()
        step_ns = []
        for _ in range(self._request.decode_tokens - 1):
            begin = time.perf_counter_ns()
            logits, past = self._session.decode(tokens[-1], None, past)
            tokens.append(logits.argmax(axis=-1)[:, None])
            step_ns.append(time.perf_counter_ns() - begin)
        cpu_last = time.process_time_ns()
        gc.enable()
        is_counted = kind_of_provider(self._request.provider).is_host
        return RulerEpisode(
            prefill=TimedCalls(wall_ns=(prefill_ns,), cpu_ns=cpu_prefill - cpu_first if is_counted else None),
            first=TimedCalls(wall_ns=(first_ns,), cpu_ns=cpu_before - cpu_first if is_counted else None),
            decode=TimedCalls(wall_ns=tuple(step_ns), cpu_ns=cpu_last - cpu_before if is_counted else None),
            tokens=tuple(int(token_11[0, 0]) for token_11 in tokens),
        )


def main() -> int:
    """Answer until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's prints must not mix with the answers

    def answer(said: RulerReady | RulerEpisode) -> None:
        answers.write(json.dumps(asdict(said)) + "\n")
        answers.flush()

    ruler = Ruler(RulerRequest(**json.loads(sys.stdin.readline())))
    answer(RulerReady(load_ns=ruler.load_ns))
    for _ in iter(sys.stdin.readline, ""):
        answer(ruler.episode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
