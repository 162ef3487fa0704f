"""Simulated histories of real noise, judged by the product's own code: how often is an alarm false, or late?

    .venv/bin/python tests/bench/simulated_histories.py --histories 2000      (part of make simulate)

A record of a history is one real bench of nano, drawn anew: its processes' figures, so that what differs between
benches and what differs between the processes of one are as they were measured (`nano_levels.json`, which says on what
machine). What the figures scatter by can be set to another size; its form stays. Benches are drawn one by one, or in
stretches of neighbours, which keeps what one bench shares with the next.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from havoc_core.bench.judge.change_points import Level, level_changes, level_of
from havoc_core.bench.judge.history import MARGIN

NOISE = json.loads(Path(__file__).with_name("nano_levels.json").read_text())
QUANTITIES = tuple(NOISE["log_ns"])
STEP = 1.05
WITHIN = 5  # records on the new level

Bench = Sequence[float]
"""Logarithms of a quantity, one a process."""
Finds = Callable[[Sequence[Level]], list[tuple[int, float]]]
"""Where a level is said to have changed, by the place of the record that showed it, and to how many times the old."""


def product(levels: Sequence[Level]) -> list[tuple[int, float]]:
    """The product's own changes."""
    return [(change.seen, change.ratio) for change in level_changes(levels, margin=MARGIN)]


def benches(quantity: str, *, scatter: float | None = None) -> list[Bench]:
    """Return the real benches of a quantity around 0; `scatter` sets the standard deviation of their means."""
    rows = NOISE["log_ns"][quantity]
    means = [statistics.fmean(row) for row in rows]
    middle, factor = statistics.fmean(means), 1.0 if scatter is None else scatter / statistics.stdev(means)
    return [[factor * (value - middle) for value in row] for row in rows]


def drawn(noise: Sequence[Bench], generator: random.Random, num: int, *, stretch: int) -> list[Level]:
    """Draw the levels of `num` records, `stretch` neighbouring benches at a time."""
    rows: list[Bench] = []
    while len(rows) < num:
        begin = generator.randrange(len(noise) - stretch + 1)
        rows += noise[begin : begin + stretch]
    return [level_of([math.exp(value) for value in row]) for row in rows[:num]]


def false_alarms(
    noise: Sequence[Bench], num: int, *, seed: int, length: int = 60, stretch: int = 1, finds: Finds = product
) -> float:
    """Share of histories of one level in which any record is said to have brought a slower one."""
    generator = random.Random(seed)
    histories = (drawn(noise, generator, length, stretch=stretch) for _ in range(num))
    return sum(any(ratio > 1 for _, ratio in finds(levels)) for levels in histories) / num


def found(noise: Sequence[Bench], num: int, *, seed: int, before: int = 30, finds: Finds = product) -> float:
    """Share of histories in which a level slower by `STEP` is an alarm within `WITHIN` records, and not before."""
    generator, num_found = random.Random(seed), 0
    for _ in range(num):
        levels = drawn(noise, generator, before + WITHIN, stretch=1)
        slower = [Level(level.log_value + math.log(STEP), level.error) for level in levels[before:]]
        alarms = [seen for seen, ratio in finds([*levels[:before], *slower]) if ratio > 1]
        num_found += bool(alarms) and min(alarms) >= before
    return num_found / num


def main() -> int:
    """Print false alarms and found steps by quantity and scatter; exit 1 above 2 % false or below 90 % found."""
    parser = argparse.ArgumentParser(description="simulate histories and count false and late alarms")
    parser.add_argument("--histories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    num, seed = chosen.histories, chosen.seed
    print(NOISE["about"])
    is_well = True
    for quantity in QUANTITIES:
        noise = benches(quantity)
        false, beside = (false_alarms(noise, num, seed=seed, stretch=stretch) for stretch in (1, 5))
        is_well &= false <= 0.02
        own = statistics.stdev(statistics.fmean(row) for row in noise)
        print(f"{quantity}: benches scatter by {own:.1%}; false alarms {false:.2%}, neighbours kept {beside:.2%}")
        for scatter in (0.01, 0.0125, 0.015, 0.02, own):
            share = found(benches(quantity, scatter=scatter), num, seed=seed)
            is_well &= share >= 0.9 or scatter > 0.0125
            print(f"  scatter {scatter:.2%}: {share:.1%} of steps of 5 % found within {WITHIN} records, 30 before")
    return int(not is_well)


if __name__ == "__main__":
    sys.exit(main())
