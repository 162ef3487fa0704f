"""Is the new side slower than the old one? The ratio of their times, from turns taken in lockstep.

A block is a fresh process of each side; in `lockstep.py` they take turns, so that both run under the same conditions.
The median over a block's pairs of turns gives one number, the log of a ratio. Processes of the same side differ between
blocks, not between turns. So the interval of the mean is Student's t over blocks: it includes the spread between them.

Two witnesses measure each quantity of the turns. CPU time depends little on other work and counts in every block. Time
on the clock also includes waiting; it counts in blocks in which the old side ran the whole time. The new side is worse
if one witness proves more than the margin. A quantity that a process measures once (load time, peak memory) gives one
ratio per block, by one witness. All intervals of the deciding quantities hold together at `CONFIDENCE`; the other
intervals are equally wide.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from ...bounds import mean_bounds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Shift = Literal["worse", "better", "equal", "undecided"]
Witness = Literal["CPU time", "time on the clock", "each process"]
Group = Literal["latency", "memory", "load"]
CONFIDENCE = 0.99
_MOST_LOG_RATIO = 100.0
"""A bound further away is useless: it comes from two blocks that differ, at a high confidence."""
RAN_SHARE = 0.95  # of the time on the clock, by at least one thread
_WITNESSES: tuple[Witness, ...] = ("CPU time", "time on the clock")
_ONCE: Witness = "each process"
PREFILL, STEP, FIRST, LOAD, PEAK = "prefill", "decode step", "time to first token", "load", "peak memory"
DECIDING: Mapping[Group, tuple[str, ...]] = {"latency": (PREFILL, STEP), "memory": (PEAK,), "load": (LOAD,)}
"""The quantities that decide a comparison; all other measured ones are only shown.

The time to the first token is a prefill and one choice among the logits, and each decode step has such a choice too: if
it becomes slower, so does one of the two.
"""
_SCALES = {PEAK: ("MB", 1e6)}


@dataclass(frozen=True, slots=True)
class Turn:
    """Calls of one side in one turn: time of each call in ns, and CPU time of all threads; None if not counted."""

    wall_ns: Sequence[int]
    cpu_ns: int | None

    def per_call_ns(self, witness: Witness) -> float | None:
        """Mean CPU time, or the median time on the clock, which a single interruption does not change."""
        if witness == "CPU time":
            return self.cpu_ns / len(self.wall_ns) if self.cpu_ns else None
        return statistics.median(self.wall_ns)


@dataclass(frozen=True, slots=True)
class Block:
    """Turns of one pair of processes: for each quantity the batches of the old side and the new one, in order.

    `once` has the quantities that a process measures once, for the old process and the new one, in ns or bytes.
    """

    turns: Mapping[str, Sequence[tuple[Turn, Turn]]]
    once: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def is_calm(self, quantity: str) -> bool:
        """Whether the old side ran the whole time, so that no other work delayed either side; True if unknown."""
        pairs = self.turns[quantity]
        used = [old.cpu_ns for old, _ in pairs if old.cpu_ns is not None]
        return not used or sum(used) >= RAN_SHARE * sum(sum(old.wall_ns) for old, _ in pairs)

    def times_ns(self, quantity: str, witness: Witness) -> list[tuple[float, float]]:
        """Times per call of both sides by turn, or the figure of each process; empty if the witness does not count."""
        if witness == _ONCE:
            return [self.once[quantity]] if quantity in self.once else []
        if witness == "time on the clock" and not self.is_calm(quantity):
            return []
        found = [(old.per_call_ns(witness), new.per_call_ns(witness)) for old, new in self.turns[quantity]]
        return [(old, new) for old, new in found if old and new]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One quantity by one witness: medians of all turns in `unit`, and the ratio of new to old.

    `low` and `high` bound `ratio`; all are None if no block counts, the bounds also if only one block counts. A row
    that does not decide is only shown.
    """

    quantity: str
    witness: Witness
    num_blocks: int
    unit: str = "ms"
    old: float | None = None
    new: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    shift: Shift = "undecided"
    decides: bool = True


def confidence_at_look(number: int, confidence: float = CONFIDENCE) -> float:
    """The confidence of all intervals of look `number`, so that those of all looks together hold at `confidence`.

    Look k spends 1 / (k (k + 1)) of the error rate; these shares sum to 1, so any number of looks is allowed.
    """
    return 1 - (1 - confidence) / (number * (number + 1))


def judge_blocks(
    blocks: Sequence[Block], *, margin: float, confidence: float = CONFIDENCE, on: Sequence[Group] = ("latency",)
) -> list[Paired]:
    """Bound the ratio of new to old, for every quantity and witness; a margin of 0.1 allows 10 %.

    All intervals of the quantities `on`, which decide, hold together at `confidence`. A deciding quantity that was not
    measured is a row without figures.
    """
    if not blocks:
        return []
    chosen = [quantity for group in on for quantity in DECIDING[group]]
    turns, once = blocks[0].turns, list(dict.fromkeys(name for block in blocks for name in block.once))
    asked = [(quantity, witness) for quantity in turns if quantity in chosen for witness in _WITNESSES]
    asked += [(quantity, _ONCE) for quantity in chosen if quantity not in (PREFILL, STEP)]
    shown = [(quantity, _WITNESSES[-1]) for quantity in turns if quantity not in chosen]
    shown += [(quantity, _ONCE) for quantity in once if quantity not in chosen]
    one_sided = 1 - (1 - confidence) / max(len(asked), 1)
    return [
        *(_paired(quantity, witness, blocks, margin, one_sided) for quantity, witness in asked),
        *(replace(_paired(quantity, witness, blocks, margin, one_sided), decides=False) for quantity, witness in shown),
    ]


def verdict_of(rows: Sequence[Paired]) -> Shift:
    """Return one word for all deciding rows: worse if any is; equal or better if a witness proves it for each."""
    rows = [row for row in rows if row.decides]
    words = {row.shift for row in rows}
    if "worse" in words:
        return "worse"
    told = {row.quantity for row in rows if row.shift != "undecided"}
    if not rows or told != {row.quantity for row in rows}:
        return "undecided"
    return "better" if "better" in words else "equal"


def _paired(quantity: str, witness: Witness, blocks: Sequence[Block], margin: float, one_sided: float) -> Paired:
    told = [turns for block in blocks if (turns := block.times_ns(quantity, witness))]
    unit, scale = _SCALES.get(quantity, ("ms", 1e6))
    if not told:
        return Paired(quantity=quantity, witness=witness, num_blocks=0, unit=unit)
    found = mean_bounds([log_ratio(turns) for turns in told], confidence=one_sided)
    low, high = (
        None if bound is None or abs(bound) > _MOST_LOG_RATIO else math.exp(bound) for bound in (found.low, found.high)
    )
    return Paired(
        quantity=quantity,
        witness=witness,
        num_blocks=len(told),
        unit=unit,
        old=statistics.median(old for turns in told for old, _ in turns) / scale,
        new=statistics.median(new for turns in told for _, new in turns) / scale,
        ratio=math.exp(found.value),
        low=low,
        high=high,
        shift=_shift(low, high, margin),
    )


def log_ratio(turns: Sequence[tuple[float, float]]) -> float:
    """Return a block's log ratio: the median over its turns of the log of new over old."""
    return statistics.median(math.log(new / old) for old, new in turns)


def _shift(low: float | None, high: float | None, margin: float) -> Shift:
    if low is None or high is None:
        return "undecided"
    if low > 1 + margin:
        return "worse"
    if high < 1 / (1 + margin):
        return "better"
    return "equal" if low >= 1 / (1 + margin) and high <= 1 + margin else "undecided"
