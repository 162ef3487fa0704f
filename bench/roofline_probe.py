"""This machine's arithmetic and memory rates in half a second, for an estimate only.

One thread runs in a fresh process, because a thread pool that shares its cores with others spins instead of working;
the arithmetic rate of one core is multiplied by the number of cores. Each rate is the best of several rounds, after a
warm-up; if rounds disagree, the machine is too busy for an estimate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from ..cores import num_physical_cores
from .judge.targets import Roofline

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_SPREAD = 2.0
_SIDE = 256
_NUM_BYTES = 32_000_000
_NUM_ROUNDS = 4
_ROUND_S = 0.025
_TIMEOUT_S = 30.0
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def probe_roofline() -> tuple[Roofline | None, str]:
    """Measure in a fresh process; return the peaks and their origin, or None and why they cannot be measured now."""
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(  # this module itself, no input
            command, env={**os.environ, **_ONE_THREAD}, capture_output=True, check=True, timeout=_TIMEOUT_S
        )
        rounds = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return None, f"not measurable now: the probe did not answer ({type(error).__name__})"
    return roofline_of(rounds["flop_per_s"], rounds["bytes_per_s"], num_cores=num_physical_cores())


def roofline_of(flop_per_s: list[float], bytes_per_s: list[float], *, num_cores: int) -> tuple[Roofline | None, str]:
    """Take the best round of each rate; None if the rounds of a rate differ by more than a factor of `MOST_SPREAD`."""
    for name, rates in (("arithmetic", flop_per_s), ("memory", bytes_per_s)):
        if (spread := max(rates) / min(rates)) > MOST_SPREAD:
            return None, (
                f"not measurable now: {len(rates)} rounds of the {name} probe differ {spread:.1f} times, so the machine"
                " is busy; plan again when it is quiet"
            )
    arithmetic = max(flop_per_s) * num_cores
    peaks = Roofline(
        fp32_flop_per_s=arithmetic,
        fp16_flop_per_s=arithmetic,
        bandwidth_bytes_per_s=max(bytes_per_s),
        practical_share=0.5,
    )
    cores = f"one thread times {num_cores} cores" if num_cores > 1 else "one thread"
    return peaks, f"measured here just now with {cores}, so they prove nothing"


def measure_rounds() -> dict[str, list[float]]:
    """Rates of each round in this process: float32 products of two square matrices, and copies read and written."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((_SIDE, _SIDE), dtype=np.float32)
    source = np.ones(_NUM_BYTES // 4, dtype=np.float32)
    target = np.empty_like(source)
    return {
        "flop_per_s": [2 * _SIDE**3 / best for best in _best_of_rounds(lambda: matrix @ matrix)],
        "bytes_per_s": [2 * _NUM_BYTES / best for best in _best_of_rounds(lambda: np.copyto(target, source))],
    }


def _best_of_rounds(work: Callable[[], Any]) -> list[float]:
    _best_s(work)  # pages are touched and clocks rise
    return [_best_s(work) for _ in range(_NUM_ROUNDS)]


def _best_s(work: Callable[[], Any]) -> float:
    best, end = float("inf"), time.perf_counter() + _ROUND_S
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - begin)
        if now > end:
            return best


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_rounds()))
