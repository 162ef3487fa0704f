"""Find where a series of records changed its level: a t-test after each record, with a corrected error rate.

The series holds logarithms of figures, oldest first. After each record the newest 3, 5 and 10 records are compared with
all older ones of the same level. Their difference is a change if its interval excludes 0, if it is at least the margin,
and if four in five of the newest records agree. So a single bad record is not a change.

    Spread    the pooled scatter of the records around both means. It is larger if neighbours in time are alike: a
              machine that is busy for an hour shifts all records of that hour. With a correlation r between neighbours,
              estimated from the same records, the variance of a mean is (1 + r) / (1 - r) times as large. The spread is
              never less than what the processes within the records explain.
    Error     repeated looks would find a change in any series. So the error rate `ERROR` is divided: the first 100
              looks share one half, the next 100 a quarter, and so on. Each look divides its part between its three
              windows and both directions (Bonferroni). Then a false change is found in at most `ERROR` of all series,
              of any length, if the records are normal and independent; tests/bench/simulated_histories.py checks this
              on real records.
    Place     of all splits in two, the one with the least scatter (the greatest t) gives the place of the change.

Further records never undo a change: each look uses only the records up to its own. A new level begins at the change,
and later records are compared with it.
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
FEWEST_BEFORE: Final = 10  # with fewer, the correlation of neighbours cannot be estimated
MOST_ALIKE: Final = 0.95
AGREEING_SHARE: Final = 0.8
WINDOWS: Final = (3, 5, 10)
"""The numbers of newest records that a look compares with the older ones."""
FEWEST_RECORDS: Final = FEWEST_BEFORE + WINDOWS[0]
AFTER: Final = 5
POWER: Final = 0.9


@dataclass(frozen=True, slots=True)
class Level:
    """One record's figure: its logarithm, and the standard error that the processes within the record explain."""

    log_value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class LevelChange:
    """A change of level.

    `first` is the index of the first record on the new level, `seen` that of the record that proved the change. The new
    level is `ratio` times the old one; the interval of `ratio` is `low` to `high`.
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
    """The error rate of look `number`, counted from 1; the rates of all looks sum to `ERROR`."""
    return ERROR * 0.5 ** ((number - 1) // LOOKS_A_HALF + 1) / LOOKS_A_HALF


def level_changes(levels: Sequence[Level], *, margin: float, looks: Sequence[int] | None = None) -> list[LevelChange]:
    """Find every change of level, in order; `looks` gives the numbers of the records' looks if they are not 1, 2, 3 ...

    A margin of 0.01 ignores changes of less than 1 %.
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
    """Smallest step, as a share, that `AFTER` more records would show in `POWER` of all cases; None: too few records.

    `levels` are the levels since the last change; `look` is the number of the newest record's look.
    """
    if len(levels) < FEWEST_BEFORE:
        return None
    variance, degrees = _Split(levels).variance(len(levels)), len(levels) + AFTER - 2
    error = math.sqrt(variance * (1 / len(levels) + 1 / AFTER))
    wanted = _reach(degrees, error_at_look(look + AFTER)) + student_t(degrees, confidence=POWER)
    return math.expm1(wanted * error)


def _newest_change(levels: Sequence[Level], error: float, least: float) -> tuple[int, float, float] | None:
    """Place, step and half the interval of a change that the newest records prove; None if they prove no change."""
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
    """How many standard errors a step must be away from 0, if both directions and all windows share `error`."""
    return student_t(degrees, confidence=1 - error / 2 / len(WINDOWS))


class _Split:
    """One series cut in two at any place: the step between the two means, and its standard error."""

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
        """Effective variance of one record: the variance of a mean of n records is this over n, raised by correlation.

        If `place` is the end of the series, there is only one side.
        """
        sides = [(begin, end) for begin, end in ((0, place), (place, self._total)) if end > begin]
        scatter = sum(self._scatter(begin, end) for begin, end in sides)
        if not scatter:
            return self._own_variance
        measured = sum(self._alike(begin, end) for begin, end in sides) / scatter
        alike = min(max(measured + 2 / self._total, 0.0), MOST_ALIKE)  # an estimate from few records is too low
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
        """Whether the step is at least `least`, and at least `wanted` standard errors away from 0."""
        return abs(self.step(place)) >= max(least, wanted * self.error(place))

    def agree(self, place: int) -> bool:
        """Whether at least four in five of the records from `place` on lie beyond the midpoint of the two means."""
        middle, step = self._sums[place] / place + self.step(place) / 2, self.step(place)
        newest = self._values[place:]
        return sum((value - middle) * step > 0 for value in newest) >= AGREEING_SHARE * len(newest)

    def score(self, place: int) -> float:
        """The step in standard errors; infinite if there is no scatter."""
        error = self.error(place)
        return abs(self.step(place)) / error if error else math.inf
