"""Checks that a measuring worker keeps its speed: it measures the first structure, the sentinel, again and again.

The first two measurements of the sentinel on a worker define its normal speed. The worker measures the sentinel once
more after each structure. If two such measurements in a row are outside the noise, the worker has drifted: the card
throttles, its clock changed, or another program uses it. Its results since the last good sentinel are discarded.

The noise is the largest relative difference between two measurements of one structure on that worker, at least
`LEAST_NOISE`. The sentinel may differ by `FACTOR` times the noise, because the first two measurements give only one
difference, which may be small by chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..adapt.candidate import SPEED_OBJECTIVES
from ..bench.warmup import LEAST_TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LEAST_NOISE: Final = LEAST_TOLERANCE
FACTOR: Final = 3.0


@dataclass
class Sentinel:
    """A worker's normal speed and the relative noise seen so far, both by metric."""

    normal: dict[str, float]
    noise: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, opening: Sequence[Mapping[str, float]]) -> Sentinel:
        """Start from the first measurements of the sentinel on a worker, at least two."""
        means = {metric: sum(one[metric] for one in opening) / len(opening) for metric in SPEED_OBJECTIVES}
        sentinel = cls(means)
        sentinel.learn(opening)
        return sentinel

    def learn(self, repeats: Sequence[Mapping[str, float]]) -> None:
        """Raise the noise to the difference between repeats of one structure, if that is larger."""
        for metric in SPEED_OBJECTIVES:
            values = [one[metric] for one in repeats]
            self.noise[metric] = max(self.noise.get(metric, LEAST_NOISE), max(values) / min(values) - 1)

    def moved(self, values: Mapping[str, float]) -> str:
        """Say how far a new measurement of the sentinel is outside the noise; return "" if it is inside."""
        for metric in SPEED_OBJECTIVES:
            change, allowed = values[metric] / self.normal[metric] - 1, FACTOR * self.noise[metric]
            if abs(change) > allowed:
                return (
                    f"{metric} of the sentinel moved by {change:+.1%} (from {self.normal[metric]:.4g} to "
                    f"{values[metric]:.4g}); the noise allows {allowed:.1%}"
                )
        return ""
