"""Simulated comparisons in lockstep, judged by the product's own code: how often is one falsely red?

    .venv/bin/python tests/bench/simulated_pairs.py --comparisons 2000      (part of make simulate)

The machine is that of `simulated_benches.py`: processes differ, calls of one are correlated, a few are interrupted, and
0 to 3 neighbours work now and then for stretches of a tenth of a second to half a minute, from one process to the next.
On the model's CPU they make it wait; on the other they cost it CPU time as well, through what both CPUs share.
"""

from __future__ import annotations

import argparse
import math
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from havoc_core.bench.judge.paired import Block, Turn, judge_blocks, verdict_of
from havoc_core.bench.lockstep import NUM_BLOCKS

simulated = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("simulated_benches.py"))))
MARGIN = 0.10
NUM_TURNS = 8  # of the real 20, with 8 steps each of the real 127: cheaper, and noisier
NUM_STEPS = 8

Judge = Callable[[Sequence[Block]], str]


def verdict(blocks: Sequence[Block]) -> str:
    """The product's word for the blocks of one comparison."""
    return verdict_of(judge_blocks(blocks, margin=MARGIN))


def random_machine(generator: random.Random) -> Any:
    """A machine with two CPUs and random neighbours; the model computes on one thread."""
    span_s = math.exp(generator.uniform(math.log(0.1), math.log(30)))
    return simulated.Machine(
        num_cpus=2,
        num_threads=1,
        between=generator.choice([0.005, 0.02, 0.05]),
        within=generator.choice([0.005, 0.02, 0.05]),
        num_neighbours=generator.randint(0, 3),
        shared_cost=generator.choice([0.05, 0.3, 0.65]),
        on_s=span_s,
        off_s=span_s * math.exp(generator.uniform(-1.5, 2.5)),
    )


def batch(clock: Any, noise: Any, quiet_ms: float, num_calls: int) -> Turn:
    """Time calls that take `quiet_ms` each on a quiet machine."""
    done = [clock.work(noise.draw(quiet_ms)) for _ in range(num_calls)]
    return Turn([wall_ns for _, wall_ns, _ in done], sum(cpu_ns for _, _, cpu_ns in done))


def simulated_blocks(machine: Any, generator: random.Random, *, prefill: float, step: float) -> list[Block]:
    """Measure two sides in lockstep, of which the new one takes `prefill` and `step` times as long."""
    clock = simulated.Clock(machine, generator)
    blocks = []
    for _ in range(NUM_BLOCKS):
        clock.idle(1e9 * generator.uniform(0.5, 2.0))  # processes start
        noises = [simulated.Noise(machine, generator) for _ in range(2)]
        turns: dict[str, list[tuple[Turn, Turn]]] = {"prefill": [], "decode step": []}
        for place in range(NUM_TURNS):
            found: dict[int, list[Turn]] = {}
            for side in (0, 1) if place % 2 == 0 else (1, 0):
                call_ms = machine.call_ms * (prefill if side else 1.0)
                step_ms = machine.step_ms * (step if side else 1.0)
                found[side] = [batch(clock, noises[side], call_ms, 1), batch(clock, noises[side], step_ms, NUM_STEPS)]
            for quantity, old, new in zip(turns, found[0], found[1], strict=True):
                turns[quantity].append((old, new))
        blocks.append(Block({quantity: tuple(pairs) for quantity, pairs in turns.items()}))
    return blocks


def verdicts(num: int, *, seed: int, prefill: float, step: float, judge: Judge = verdict) -> dict[str, int]:
    """Count the words of many comparisons on random machines."""
    generator, counts = random.Random(seed), dict.fromkeys(("worse", "better", "equal", "undecided"), 0)
    for _ in range(num):
        machine = random_machine(generator)
        counts[judge(simulated_blocks(machine, generator, prefill=prefill, step=step))] += 1
    return counts


def main() -> int:
    """Compare a side with itself, with one slower by just the margin, and with one that decodes 30 % slower."""
    parser = argparse.ArgumentParser(description="simulate comparisons beside load and count false reds")
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    same, edge, slow = (
        verdicts(chosen.comparisons, seed=chosen.seed, prefill=prefill, step=step)
        for prefill, step in ((1.0, 1.0), (1 + MARGIN, 1 + MARGIN), (1.0, 1.3))
    )
    print(f"with itself: {same}\nslower by just the margin: {edge}\ndecoding 30 % slower: {slow}")
    return int(max(same["worse"], edge["worse"]) > 0.01 * chosen.comparisons)


if __name__ == "__main__":
    sys.exit(main())
