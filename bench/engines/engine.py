"""The child of `lockstep` for another engine: `python engine.py ENGINE` opens one model and times it by episodes.

Its protocol is that of `bench/ruler.py`: one JSON line is a request; it answers when the model is open, then once for
each further line. It needs NumPy and the engine's package, but not HAVOC. `ENGINE.py` beside it has

    PACKAGE                                  the distribution that it needs
    prepare()                                imports it
    open_model(path, num_threads, capacity)  a model; `capacity` is the number of tokens it must hold
    model.generate(ids, num_tokens)          yields greedy tokens, each immediately, the first after the
                                             prompt was read; never stops at an end-of-text token
    model.next_logits(ids, num_ids)          logits or log-probabilities of the next token [num_ids], None where they
                                             are unknown; left out by an engine that never gives them
    model.is_own_process                     whether the engine computes in this process, so its CPU time counts

`python engine.py ENGINE --version` says which version is installed.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FAULT_CODE = 3
"""The exit code of `--version` if the engine is not installed."""


def load_engine(name: str) -> Any:  # noqa: ANN401 - a module
    """Load the file of an engine; this works in any package, and without one."""
    spec = importlib.util.spec_from_file_location(f"havoc_engine_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def episode(model: Any, ids: list[int], num_tokens: int, *, num_ids: int | None) -> dict[str, Any]:  # noqa: ANN401
    """Time one prompt and the tokens after it, each from the token before.

    A prefill ends with the first token. A wrong number of tokens, or a token outside `num_ids`, is an error.
    """
    gc.collect()
    gc.disable()
    tokens: list[int] = []
    wall_ns: list[int] = []
    cpu_first, before = time.process_time_ns(), time.perf_counter_ns()
    cpu_before = cpu_first
    for token in model.generate(ids, num_tokens):
        now = time.perf_counter_ns()
        wall_ns.append(max(now - before, 1))
        if not tokens:
            cpu_before = time.process_time_ns()
        tokens.append(token)
        before = time.perf_counter_ns()
    cpu_last = time.process_time_ns()
    gc.enable()
    if len(tokens) != num_tokens:
        raise RuntimeError(f"it gave {len(tokens)} tokens instead of {num_tokens}")
    if num_ids is not None and max(tokens) >= num_ids:
        raise RuntimeError(f"it gave token {max(tokens)}, but the model has {num_ids} tokens")
    counts = model.is_own_process
    first = {"wall_ns": wall_ns[:1], "cpu_ns": cpu_before - cpu_first if counts else None}
    return {
        "prefill": first,
        "first": first,
        "decode": {"wall_ns": wall_ns[1:], "cpu_ns": cpu_last - cpu_before if counts else None},
        "tokens": tokens,
    }


def main() -> int:
    """Answer until the parent closes the pipe; stop after the first failure, which is sent as the last answer."""
    engine = load_engine(sys.argv[1])
    if sys.argv[2:] == ["--version"]:
        try:
            sys.stdout.write(importlib.metadata.version(engine.PACKAGE) + "\n")
        except importlib.metadata.PackageNotFoundError:
            return FAULT_CODE
        return 0
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's prints must not mix with the answers

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    rng = np.random.default_rng(request["seed"])
    capacity = request["prompt_tokens"] + request["decode_tokens"]
    is_open = False
    try:
        engine.prepare()
        begin = time.perf_counter_ns()
        model = engine.open_model(request["artifact"], num_threads=request["num_threads"], capacity=capacity)
        load_ns = time.perf_counter_ns() - begin
        is_open = True
        answer({"load_ns": load_ns if model.is_own_process else None})
        for _ in iter(sys.stdin.readline, ""):
            ids = rng.choice(np.arange(request["num_ids"], dtype=np.int64), size=(1, request["prompt_tokens"]))
            answer(episode(model, ids[0].tolist(), request["decode_tokens"], num_ids=request["num_own_ids"]))
    except Exception as error:  # noqa: BLE001 - any error of an engine is sent to the parent
        answer({"error": f"{type(error).__name__}: {error}", "is_open": is_open})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
