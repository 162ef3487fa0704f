"""Whether a measuring worker is still the device it was: the first structure is measured again and again as a sentinel.

The first two measurements of the sentinel on a worker say what speed is normal there. After each structure it is
measured once more. Outside the noise, twice in a row, the worker has drifted: a card that throttles, another clock,
somebody who trains beside it. What it measured since its last good sentinel is not believed.

The noise is the widest relative difference of two measurements of one structure on that worker, at least
`LEAST_NOISE`; the sentinel may be off by `FACTOR` times as much. Two measurements give one difference, which may be
small by chance, hence the factor.
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
    """The speed that is normal for a worker, by metric, and the noise seen on it so far, relative."""

    normal: dict[str, float]
    noise: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, opening: Sequence[Mapping[str, float]]) -> Sentinel:
        """Begin with the first measurements of the sentinel on a worker, at least two."""
        means = {metric: sum(one[metric] for one in opening) / len(opening) for metric in SPEED_OBJECTIVES}
        sentinel = cls(means)
        sentinel.learn(opening)
        return sentinel

    def learn(self, repeats: Sequence[Mapping[str, float]]) -> None:
        """Widen the noise by what repeats of one structure differ."""
        for metric in SPEED_OBJECTIVES:
            values = [one[metric] for one in repeats]
            self.noise[metric] = max(self.noise.get(metric, LEAST_NOISE), max(values) / min(values) - 1)

    def moved(self, values: Mapping[str, float]) -> str:
        """Say how far a new measurement of the sentinel is outside the noise, "" for inside."""
        for metric in SPEED_OBJECTIVES:
            change, allowed = values[metric] / self.normal[metric] - 1, FACTOR * self.noise[metric]
            if abs(change) > allowed:
                return (
                    f"{metric} of the sentinel moved by {change:+.1%} (from {self.normal[metric]:.4g} to "
                    f"{values[metric]:.4g}), its noise allows {allowed:.1%}"
                )
        return ""
