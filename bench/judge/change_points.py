"""Where a series of records changed its level for good: a t-test after each record, with a corrected error rate.

Logarithms of figures, oldest first. After each record the newest 3, 5 and 10 are held against all older ones of the
same level. Their difference is a change when the interval around it excludes 0, when it is no smaller than the margin,
and when four in five of the newest agree: a single bad record is none.

    Spread    that of the records around both means, pooled, and larger where neighbours in time are alike: a machine
              that is busy for an hour shifts all records of that hour. With a correlation r between neighbours,
              estimated from the same records, the variance of a mean is (1 + r) / (1 - r) times as large. It is never
              less than what the records' own processes explain.
    Error     looking again and again would find a change in anything. Of the `ERROR` that may go wrong the first 100
              looks share one half, the next 100 a quarter, and so on; a look shares its part between its three windows
              and both directions (Bonferroni). So at most in `ERROR` of all series without a change, however long,
              one is found, if their records are normal and independent; tests/bench/simulated_histories.py holds it
              against real ones.
    Place     of all splits in two, the one that leaves the least scatter (the greatest t) says where the level changed.

A change stays found when further records come: each look sees only the records up to its own. What begins at the change
is a level of its own, which the next records are held against.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from ...bounds import student_t

if TYPE_CHECKING:
    from collections.abc import Sequence

ERROR: Final = 0.02
LOOKS_A_HALF: Final = 100
FEWEST_BEFORE: Final = 10  # of fewer, nobody can tell how alike neighbours are
MOST_ALIKE: Final = 0.95
AGREEING_SHARE: Final = 0.8
WINDOWS: Final = (3, 5, 10)
"""How many of the newest records a look holds against the older ones."""
FEWEST_RECORDS: Final = FEWEST_BEFORE + WINDOWS[0]
AFTER: Final = 5
POWER: Final = 0.9


@dataclass(frozen=True, slots=True)
class Level:
    """What one record says of a quantity: its logarithm, and the standard error that its own processes explain."""

    log_value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class LevelChange:
    """A change of level.

    `first` is the place of the first record on the new level, `seen` of the one that proved it; the new level is
    `ratio` times the old one, which lies between `low` and `high`.
    """

    first: int
    seen: int
    ratio: float
    low: float
    high: float


def level_of(processes: Sequence[float]) -> Level:
    """Join the positive figures of a record's processes: mean and standard error of their logarithms."""
    logs = [math.log(value) for value in processes]
    mean = math.fsum(logs) / len(logs)
    if len(logs) == 1:
        return Level(mean)
    squares = math.fsum((value - mean) ** 2 for value in logs)
    return Level(mean, math.sqrt(squares / (len(logs) - 1) / len(logs)))


def error_at_look(number: int) -> float:
    """What look `number`, counted from 1, may go wrong with; those of all looks sum to `ERROR`."""
    return ERROR * 0.5 ** ((number - 1) // LOOKS_A_HALF + 1) / LOOKS_A_HALF


def level_changes(levels: Sequence[Level], *, margin: float, looks: Sequence[int] | None = None) -> list[LevelChange]:
    """Find every change of level, in order; `looks` numbers the records' looks where they are not simply 1, 2, 3.

    A margin of 0.01 leaves out what moved by less than 1 %.
    """
    found, begin = [], 0
    for seen, number in enumerate(looks or range(1, len(levels) + 1)):
        change = _newest_change(levels[begin : seen + 1], error_at_look(number), math.log1p(margin))
        if change is not None:
            place, step, reach = change
            bounds = (step, step - reach, step + reach)
            found.append(LevelChange(begin + place, seen, *(math.exp(value) for value in bounds)))
            begin += place
    return found


def least_step(levels: Sequence[Level], *, look: int) -> float | None:
    """Least step, as a share, that `AFTER` records more would show in `POWER` of all cases; None from too few records.

    `levels` are those since the last change, `look` is the number of the newest one's look.
    """
    if len(levels) < FEWEST_BEFORE:
        return None
    variance, degrees = _Split(levels).variance(len(levels)), len(levels) + AFTER - 2
    error = math.sqrt(variance * (1 / len(levels) + 1 / AFTER))
    wanted = _reach(degrees, error_at_look(look + AFTER)) + student_t(degrees, confidence=POWER)
    return math.expm1(wanted * error)


def _newest_change(levels: Sequence[Level], error: float, least: float) -> tuple[int, float, float] | None:
    """Place, step and half the interval of a change that the newest records prove; None where they prove none."""
    total = len(levels)
    windows = [window for window in WINDOWS if total - window >= FEWEST_BEFORE]
    if not windows:
        return None
    split = _Split(levels)
    wanted = _reach(total - 2, error)
    if not any(split.is_change(total - window, wanted, least) and split.agree(total - window) for window in windows):
        return None
    places = [place for place in range(FEWEST_BEFORE, total - WINDOWS[0] + 1) if split.is_change(place, wanted, least)]
    best = max(places, key=lambda place: (split.score(place), place))
    return best, split.step(best), wanted * split.error(best)


@functools.cache
def _reach(degrees: int, error: float) -> float:
    """How many standard errors a step must lie from 0, where both sides and all windows share `error`."""
    return student_t(degrees, confidence=1 - error / 2 / len(WINDOWS))


class _Split:
    """One series cut in two at any place: the step between both means, and its standard error."""

    def __init__(self, levels: Sequence[Level]) -> None:
        origin = levels[0].log_value  # so that equal values have sums of exactly 0
        values = [level.log_value - origin for level in levels]
        self._total = len(values)
        self._sums = [0.0, *accumulate(values)]
        self._squares = [0.0, *accumulate(value * value for value in values)]
        self._products = [0.0, *accumulate(value * other for value, other in pairwise(values))]
        self._values = values
        self._own_variance = math.fsum(level.error**2 for level in levels) / self._total

    def step(self, place: int) -> float:
        """Mean of the records from `place` on, minus the mean of those before."""
        after = (self._sums[-1] - self._sums[place]) / (self._total - place)
        return after - self._sums[place] / place

    def error(self, place: int) -> float:
        """Standard error of the step."""
        return math.sqrt(self.variance(place) * (1 / place + 1 / (self._total - place)))

    def variance(self, place: int) -> float:
        """What the variance of a mean of so many records is that many times of: larger where neighbours are alike.

        With the end for `place` there is one side.
        """
        sides = [(begin, end) for begin, end in ((0, place), (place, self._total)) if end > begin]
        scatter = sum(self._scatter(begin, end) for begin, end in sides)
        if not scatter:
            return self._own_variance
        measured = sum(self._alike(begin, end) for begin, end in sides) / scatter
        alike = min(max(measured + 2 / self._total, 0.0), MOST_ALIKE)  # what is measured on few is too low
        between = scatter / (self._total - len(sides)) * (1 + alike) / (1 - alike)
        return max(between, self._own_variance)

    def _scatter(self, begin: int, end: int) -> float:
        """Sum of the squared distances from the mean."""
        total = self._sums[end] - self._sums[begin]
        return max(self._squares[end] - self._squares[begin] - total * total / (end - begin), 0.0)

    def _alike(self, begin: int, end: int) -> float:
        """Sum over neighbours of the product of their distances from the mean."""
        total = self._sums[end] - self._sums[begin]
        mean, ends = total / (end - begin), self._values[begin] + self._values[end - 1]
        products = self._products[end - 1] - self._products[begin]
        return products - mean * (2 * total - ends) + (end - begin - 1) * mean * mean

    def is_change(self, place: int, wanted: float, least: float) -> bool:
        """Whether the step is no smaller than `least`, and `wanted` standard errors away from 0."""
        return abs(self.step(place)) >= max(least, wanted * self.error(place))

    def agree(self, place: int) -> bool:
        """Whether four in five of the records from `place` on lie beyond the middle between both means."""
        middle, step = self._sums[place] / place + self.step(place) / 2, self.step(place)
        newest = self._values[place:]
        return sum((value - middle) * step > 0 for value in newest) >= AGREEING_SHARE * len(newest)

    def score(self, place: int) -> float:
        """The step in standard errors; without any scatter, beyond all others."""
        error = self.error(place)
        return abs(self.step(place)) / error if error else math.inf
