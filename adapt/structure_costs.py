"""Results from the costs of a search's structures, before any answer: noise, frozen objectives, unmet limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .candidate import COST_OBJECTIVES, SPEED_OBJECTIVES
from .front import excess_of
from .ledger import mean_cost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .candidate import Cost, SearchSettings


@dataclass(frozen=True, slots=True)
class StructureCosts:
    """Each objective's relative noise floor; the frozen objectives; disturbances of speed; unmet limits."""

    noise_floor: dict[str, float]
    frozen: tuple[str, ...]
    disturbance: str
    unmet: tuple[str, ...]

    @property
    def set_aside(self) -> tuple[str, ...]:
        """Limits that decide nothing: on figures that cannot be believed, or missed by every structure."""
        return (*(SPEED_OBJECTIVES if self.disturbance else ()), *self.unmet)


def judged_costs(pairs: Sequence[Sequence[Cost]], settings: SearchSettings) -> StructureCosts:
    """Judge the repeated costs of each structure; `pairs` holds at least one structure."""
    means = [mean_cost(pair) for pair in pairs]
    values = [[cost.values for cost in pair] for pair in pairs]
    floor = {metric: max(_range(pair, metric) for pair in values) for metric in COST_OBJECTIVES}
    disturbance = next((cost.disturbance for pair in pairs for cost in pair if cost.disturbance), "")
    untrusted = SPEED_OBJECTIVES if disturbance else ()
    frozen = tuple(
        metric for metric in COST_OBJECTIVES if metric in untrusted or _range(means, metric) <= floor[metric]
    )
    unmet = tuple(
        metric
        for metric, (comparison, limit) in settings.limits.items()
        if metric in means[0] and metric not in untrusted and settings.evidence == "measured_target"
        if all(excess_of(mean[metric], comparison, limit) > 0 for mean in means)
    )
    return StructureCosts(floor, frozen, disturbance, unmet)


def _range(costs: Sequence[Mapping[str, float]], metric: str) -> float:
    """Relative range of a metric."""
    values = [cost[metric] for cost in costs]
    return max(values) / min(values) - 1
