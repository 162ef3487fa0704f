"""Is the second of two sides slower than the first? The ratio of their times, from blocks measured in turn.

A block is one fresh process of each side, one right after the other (`turns.py` measures them). What a process costs
more or less than the next of its kind, and what the machine does meanwhile, differs from block to block and not from
call to call; so a block gives one number, the log of its ratio, and the interval of the mean is Student's t over
blocks: the spread between them is in it.

Beside neighbours the clock alone tells little, so several witnesses tell of each quantity. The lower decile of CPU time
and of short steps is what a call takes when least comes between; both count in every block. The median on the clock
also knows of waiting and of what only some calls do; it counts in blocks that nothing disturbed. A side is worse when
one witness proves more than the margin. All intervals together hold at `CONFIDENCE`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .bounds import mean_bounds, quantile_of
from .disturbance import disturbed_share
from .findings import REPEAT_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .schema import ProcessSamples

Shift = Literal["worse", "better", "equal", "undecided"]
Witness = Literal["CPU time", "shortest steps", "time when quiet"]
CONFIDENCE = 0.99
LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Block:
    """One process of each side, measured one right after the other."""

    old: ProcessSamples
    new: ProcessSamples

    @property
    def is_disturbed(self) -> bool:
        """Whether something else took the CPU for so long that wall times of a process say nothing."""
        return any((disturbed_share([side]) or 0.0) > REPEAT_SHARE for side in (self.old, self.new))


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One quantity by one witness: times in ms (medians of processes), and how many times the old one the new one is.

    `low` and `high` bound `ratio`; None where too few blocks tell of it.
    """

    quantity: str
    witness: Witness
    num_blocks: int
    old_ms: float | None
    new_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    shift: Shift


def judge_blocks(blocks: Sequence[Block], *, margin: float) -> list[Paired]:
    """Bound how many times slower the new side is, for every quantity and witness; `margin` 0.1 allows 10 %."""
    calm = [block for block in blocks if not block.is_disturbed]
    one_sided = 1 - (1 - CONFIDENCE) / len(_QUANTITIES)
    return [
        _paired(quantity, witness, calm if witness == "time when quiet" else blocks, read, margin, one_sided)
        for quantity, witness, read in _QUANTITIES
    ]


def verdict_of(rows: Sequence[Paired]) -> Shift:
    """Return one word for all rows: worse if any is; else better or equal only if none contradicts."""
    words = {row.shift for row in rows}
    if "worse" in words:
        return "worse"
    told = [{row.shift for row in rows if row.quantity == quantity} for quantity in {row.quantity for row in rows}]
    if all(word & {"equal", "better"} for word in told):
        return "better" if "better" in words else "equal"
    return "undecided"


def _paired(
    quantity: str,
    witness: Witness,
    blocks: Sequence[Block],
    read: Callable[[ProcessSamples], float | None],
    margin: float,
    one_sided: float,
) -> Paired:
    pairs = [(old, new) for block in blocks if (old := read(block.old)) and (new := read(block.new))]
    if not pairs:
        return Paired(
            quantity=quantity,
            witness=witness,
            num_blocks=0,
            old_ms=None,
            new_ms=None,
            ratio=None,
            low=None,
            high=None,
            shift="undecided",
        )
    found = mean_bounds([math.log(new / old) for old, new in pairs], confidence=one_sided)
    low, high = (None if bound is None else math.exp(bound) for bound in (found.low, found.high))
    return Paired(
        quantity=quantity,
        witness=witness,
        num_blocks=len(pairs),
        old_ms=statistics.median(old for old, _ in pairs) / 1e6,
        new_ms=statistics.median(new for _, new in pairs) / 1e6,
        ratio=math.exp(found.value),
        low=low,
        high=high,
        shift=_shift(low, high, margin),
    )


def _shift(low: float | None, high: float | None, margin: float) -> Shift:
    if low is None or high is None:
        return "undecided"
    if low > 1 + margin:
        return "worse"
    if high < 1 / (1 + margin):
        return "better"
    return "equal" if low >= 1 / (1 + margin) and high <= 1 + margin else "undecided"


def _prefill_cpu(process: ProcessSamples) -> float | None:
    return _quantile(process.prefill.cpu_ns, LEAST)


def _prefill_median(process: ProcessSamples) -> float | None:
    return _quantile(process.prefill.duration_ns, 0.5)


def _step_cpu(process: ProcessSamples) -> float | None:
    runs = [run for run in process.decode if run.step_ns and run.cpu_ns]
    return _quantile([run.cpu_ns / len(run.step_ns) for run in runs if run.cpu_ns], LEAST)


def _step_least(process: ProcessSamples) -> float | None:
    return _quantile([step for run in process.decode for step in run.step_ns], LEAST)


def _step_median(process: ProcessSamples) -> float | None:
    return _quantile([step for run in process.decode for step in run.step_ns], 0.5)


def _quantile(values: Sequence[float], quantile: float) -> float | None:
    return quantile_of(sorted(values), quantile) if values else None


_QUANTITIES: tuple[tuple[str, Witness, Callable[[ProcessSamples], float | None]], ...] = (
    ("prefill", "CPU time", _prefill_cpu),
    ("prefill", "time when quiet", _prefill_median),
    ("decode step", "CPU time", _step_cpu),
    ("decode step", "shortest steps", _step_least),
    ("decode step", "time when quiet", _step_median),
)
