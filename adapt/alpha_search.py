"""The cross-entropy method over alpha, one weight per expert: sample, keep the best, sample around them.

    population 0   the base, each expert alone, the mean of all, and points drawn uniformly within the bounds
    population g   points of a normal distribution with the mean and deviation of the elite of population g - 1,
                   clipped to the bounds

The result is the best point of all populations, so on the rows used it is no worse than the base or any single expert.
A fitness is a pair, compared in order: the share of right answers, then a number that breaks ties. No point is
evaluated twice. The same seed gives the same search.

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
"""Least deviation, as a share of the bounds' width: a narrower distribution would draw the same point repeatedly."""
_DIGITS: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropySettings:
    """How many points are evaluated, how many of them are the elite, and the bounds of alpha."""

    population: int = 32
    elite_share: float = 0.2
    generations: int = 10
    low: float = 0.0
    high: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that allow no search."""
        if self.population < 2 or self.generations < 1:  # noqa: PLR2004 - a deviation needs two
            raise HavocError(
                f"population {self.population} and generations {self.generations}: expected at least 2 and 1"
            )
        if not 0 < self.elite_share <= 1:
            raise HavocError(f"an elite share of {self.elite_share:g}: expected more than 0 and at most 1")
        if not self.low < self.high:
            raise HavocError(f"alpha from {self.low:g} to {self.high:g}: expected a low end below the high one")

    @property
    def num_elite(self) -> int:
        """Number of elite points, at least two; the next population is drawn around them."""
        return max(2, round(self.elite_share * self.population))


@dataclass(frozen=True, slots=True)
class FoundAlpha:
    """The best point, its fitness, and how many different points were evaluated."""

    alpha: Alpha
    fitness: Fitness
    num_asked: int


def cross_entropy_search(
    fitness: Callable[[Alpha], Fitness], *, num_experts: int, settings: CrossEntropySettings
) -> FoundAlpha:
    """Return the alpha with the highest fitness found; of equal ones, the first.

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
    """The base, single experts and the mean, as far as they lie within the bounds; the rest is drawn uniformly."""
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
    """Draw one point around the elite."""
    least = _LEAST_DEVIATION * (settings.high - settings.low)
    weights = []
    for values in zip(*elite, strict=True):
        drawn = rng.gauss(statistics.fmean(values), max(statistics.stdev(values), least))
        weights.append(_rounded(min(max(drawn, settings.low), settings.high)))
    return tuple(weights)


def _rounded(weight: float) -> float:
    return round(weight, _DIGITS)
