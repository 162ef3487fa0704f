"""The cross-entropy method over alpha, one weight per expert: sample, keep the best, sample around them.

    population 0   the base, each expert alone, the mean of all, and points drawn evenly from the bounds
    population g   a normal distribution by mean and deviation of the elite of population g - 1, cut at the bounds

The best point of all populations is the result, so it is on the asked rows no worse than the base or any single expert.
A fitness is a pair that is compared in order: the share of right answers, then what breaks its ties. A point that was
asked before is not asked again. The same seed gives the same search.

Rubinstein & Kroese, The Cross-Entropy Method (2004); for alpha: Transformer-Squared, arXiv 2501.06252.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Callable

Alpha = tuple[float, ...]
Fitness = tuple[float, float]

_LEAST_DEVIATION: Final = 0.02
"""Of the bounds' width: a distribution narrower than this would ask for the same point again and again."""
_DIGITS: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropySettings:
    """How many points are asked, how many of them are the elite, and where alpha may lie."""

    population: int = 32
    elite_share: float = 0.2
    generations: int = 10
    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a search that cannot be, with the numbers."""
        if self.population < 2 or self.generations < 1:  # noqa: PLR2004 - a deviation needs two
            raise HavocError(
                f"population {self.population} and generations {self.generations}: at least 2 and 1 are needed"
            )
        if not 0 < self.elite_share <= 1:
            raise HavocError(f"an elite share of {self.elite_share:g}: expected more than 0 and at most 1")
        if not self.low < self.high:
            raise HavocError(f"alpha from {self.low:g} to {self.high:g}: expected a low end below the high one")

    @property
    def num_elite(self) -> int:
        """Points of a population that the next one is drawn around: at least two."""
        return max(2, round(self.elite_share * self.population))


@dataclass(frozen=True, slots=True)
class FoundAlpha:
    """The best point, its fitness, and how many different points were asked."""

    alpha: Alpha
    fitness: Fitness
    num_asked: int


def cross_entropy_search(
    fitness: Callable[[Alpha], Fitness], *, num_experts: int, settings: CrossEntropySettings
) -> FoundAlpha:
    """Return the alpha of the highest fitness that was met; of equal ones the first.

    `fitness` must give the same pair for the same point.
    """
    rng = random.Random(f"havoc alpha {settings.seed}")
    known: dict[Alpha, Fitness] = {}
    points = _first_population(num_experts, settings, rng)
    for _ in range(settings.generations):
        for point in points:
            if point not in known:
                known[point] = fitness(point)
        elite = sorted(points, key=known.__getitem__, reverse=True)[: settings.num_elite]
        points = [_drawn(elite, settings, rng) for _ in range(settings.population)]
    best = max(known, key=known.__getitem__)
    return FoundAlpha(best, known[best], len(known))


def _first_population(num_experts: int, settings: CrossEntropySettings, rng: random.Random) -> list[Alpha]:
    """The base, single experts and the mean, where the bounds hold them; the rest of the population is drawn evenly."""
    places = range(num_experts)
    fixed = [
        tuple(0.0 for _ in places),
        *(tuple(float(place == one) for place in places) for one in places),
        tuple(_rounded(1 / num_experts) for _ in places),
    ]
    fixed = [point for point in fixed if all(settings.low <= weight <= settings.high for weight in point)]
    num_drawn = max(settings.population - len(fixed), 0)
    drawn = [tuple(_rounded(rng.uniform(settings.low, settings.high)) for _ in places) for _ in range(num_drawn)]
    return [*fixed, *drawn]


def _drawn(elite: list[Alpha], settings: CrossEntropySettings, rng: random.Random) -> Alpha:
    """One point around the elite."""
    least = _LEAST_DEVIATION * (settings.high - settings.low)
    weights = []
    for values in zip(*elite, strict=True):
        drawn = rng.gauss(statistics.fmean(values), max(statistics.stdev(values), least))
        weights.append(_rounded(min(max(drawn, settings.low), settings.high)))
    return tuple(weights)


def _rounded(weight: float) -> float:
    return round(weight, _DIGITS)
