"""An artifact against torch on the same card, in turns: `python tests/gpu/eager.py BASE ARTIFACT`.

torch runs HAVOC's own model in fp16, eagerly, with its growing cache: what a checkpoint does before it is exported.
Both read the same ids; a turn is `PREFILLS` prompts of 512 tokens, then `STEPS` greedy steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import load_base
from havoc_core.storage import read_json

if TYPE_CHECKING:
    from collections.abc import Callable

TURNS, PREFILLS, STEPS, PROMPT = 6, 20, 64, 512


def main(base: str, artifact: str) -> None:
    """Print medians of each, and the ratios of the medians of each turn."""
    is_static = read_json(f"{artifact}/manifest.json")["graph"].get("cache") == "static"
    options = {"enable_cuda_graph": "1"} if is_static else None
    ours, theirs = _ours(artifact, options), _theirs(base)
    turns: list[dict[str, tuple[float, float]]] = []
    for turn in range(TURNS + 1):
        ids = np.random.default_rng(turn).integers(10, 500, (1, PROMPT))
        pair = {"havoc": ours(ids), "torch": theirs(ids)} if turn % 2 else {"torch": theirs(ids), "havoc": ours(ids)}
        turns.append(pair)
    del turns[0]
    found: dict[str, Any] = {"turns": TURNS, "captures_steps": is_static}
    for index, what in enumerate(("prefill_ms", "step_ms")):
        for side in ("havoc", "torch"):
            found[f"{side}_{what}"] = statistics.median(turn[side][index] for turn in turns)
        ratios = sorted(turn["torch"][index] / turn["havoc"][index] for turn in turns)
        found[f"torch_over_havoc_{what}"] = [ratios[0], statistics.median(ratios), ratios[-1]]
    print(json.dumps(found))


def _ours(artifact: str, options: dict[str, str] | None) -> Callable[[np.ndarray], tuple[float, float]]:
    session = DecoderSession.open(artifact, provider=CUDA, provider_options=options)
    empty = session.empty_past(1, capacity=PROMPT + STEPS)

    def turn(ids: np.ndarray) -> tuple[float, float]:
        prefills, steps = [], []
        for _ in range(PREFILLS):
            before = time.perf_counter()
            logits, past = session.extend(ids, None, empty)
            prefills.append(time.perf_counter() - before)
        for _ in range(STEPS - 1):
            before = time.perf_counter()
            logits, past = session.decode(logits.argmax(-1)[:, None], None, past)
            steps.append(time.perf_counter() - before)
        return 1e3 * statistics.median(prefills), 1e3 * statistics.median(steps)

    return turn


def _theirs(base: str) -> Callable[[np.ndarray], tuple[float, float]]:
    model = load_base(base).model.eval().to("cuda", torch.float16)

    @torch.inference_mode()
    def turn(ids: np.ndarray) -> tuple[float, float]:
        prefills, steps = [], []
        for _ in range(PREFILLS):
            before = time.perf_counter()
            logits_11V, past = model(torch.from_numpy(ids).to("cuda"), use_cache=True, last_only=True)
            logits = logits_11V[:, -1].float().cpu().numpy()
            prefills.append(time.perf_counter() - before)
        for _ in range(STEPS - 1):
            before = time.perf_counter()
            token = torch.from_numpy(logits.argmax(-1)[:, None]).to("cuda")
            logits_11V, past = model(token, past_key_values=past, use_cache=True)
            logits = logits_11V[:, -1].float().cpu().numpy()
            steps.append(time.perf_counter() - before)
        return 1e3 * statistics.median(prefills), 1e3 * statistics.median(steps)

    return turn


if __name__ == "__main__":
    main(*sys.argv[1:3])
