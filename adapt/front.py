"""How evaluated candidates compare: objectives, limits as constraints, domination, and whether a search has settled.

Four objectives, as in seed 003: prefill latency and peak memory down, accuracy and throughput up. A frozen objective is
not used: the structures differ in it by no more than the noise, or its figures are not reliable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pymoo.indicators.hv import HV

from .candidate import COST_OBJECTIVES

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .candidate import Evaluation, SearchSettings

_IS_BETTER_HIGHER: Final = frozenset({"decode_tok_per_s"})
_NO_VALUE: Final = 1e9
"""Objective of a candidate that could not be measured; its constraint violation keeps it out of every front."""
_FAILED: Final = math.inf
"""Violation of every constraint by a candidate that failed: no measured one, however far off, ranks below it."""
_FAILED_FINITE: Final = 1e12
"""The same for NSGA-II, which adds violations up; no measured figure is that many times its limit."""
_REFERENCE: Final = 1.1
"""Worst corner of the hypervolume, where 0 is the best and 1 the worst value of each objective in the search."""
_GROWTH: Final = 0.01
_STABLE_GENERATIONS: Final = 3


def objectives(evaluation: Evaluation, frozen: Collection[str]) -> list[float]:
    """All to be minimised; a frozen objective is 0 for everybody."""
    if evaluation.reason:
        return [_NO_VALUE] * (len(COST_OBJECTIVES) + 1)
    cost = [0.0 if metric in frozen else _signed(metric, evaluation.cost[metric]) for metric in COST_OBJECTIVES]
    return [*cost, -evaluation.mean_accuracy]


def _signed(metric: str, value: float) -> float:
    return -value if metric in _IS_BETTER_HIGHER else value


def violations(evaluation: Evaluation, settings: SearchSettings, set_aside: Collection[str] = ()) -> list[float]:
    """How far each limit is missed, relative to it; infinitely far by a candidate that failed; at most 0 means met.

    One value for each limit of the settings, and the last for the KL divergence from the base. A limit that is
    `set_aside`, or on a cost of another device than the target's, counts as met by every candidate.
    """
    if evaluation.reason:
        return [_FAILED] * (len(settings.limits) + 1)
    values = dict(evaluation.cost) | {f"accuracy/{d}": share for d, share in evaluation.accuracy.items()}
    unknown = unjudged(settings, set_aside)
    found = [
        0.0 if metric in unknown else excess_of(values[metric], comparison, limit)
        for metric, (comparison, limit) in settings.limits.items()
    ]
    return [*found, 0.0 if settings.max_kl is None else max(evaluation.kl_to_base.values()) / settings.max_kl - 1]


def excess_of(value: float, comparison: str, limit: float) -> float:
    """How far `value` misses a limit, "<" or ">", relative to it; at most 0 means met."""
    return value / limit - 1 if comparison == "<" else 1 - value / limit


def finite_violations(evaluation: Evaluation, settings: SearchSettings, set_aside: Collection[str] = ()) -> list[float]:
    """Return `violations` for NSGA-II, which cannot add infinities."""
    return [min(excess, _FAILED_FINITE) for excess in violations(evaluation, settings, set_aside)]


def unjudged(settings: SearchSettings, set_aside: Collection[str]) -> set[str]:
    """Limits that cannot rank candidates: no structure meets them, or costs are those of another device."""
    is_other_device = settings.evidence == "measured_other_device"
    return {
        metric for metric in settings.limits if metric in set_aside or (is_other_device and metric in COST_OBJECTIVES)
    }


def is_feasible(evaluation: Evaluation, settings: SearchSettings, set_aside: Collection[str] = ()) -> bool:
    """Whether every limit is met by a figure that speaks for the target."""
    is_within = max(violations(evaluation, settings, set_aside)) <= 0
    return is_within and not unjudged(settings, set_aside)


def front_of(
    measured: Sequence[Evaluation], settings: SearchSettings, frozen: Collection[str], set_aside: Collection[str] = ()
) -> list[Evaluation]:
    """Return the non-dominated evaluations within the limits; if there are none, the least violating one."""
    within = [evaluation for evaluation in measured if max(violations(evaluation, settings, set_aside)) <= 0]
    if not within:
        return [min(measured, key=lambda evaluation: max(violations(evaluation, settings, set_aside)))]
    front: list[tuple[Evaluation, list[float]]] = []
    for evaluation in within:
        point = objectives(evaluation, frozen)
        if not any(_dominates(other, point) for _, other in front):
            front = [(one, other) for one, other in front if not _dominates(point, other)]
            front.append((evaluation, point))
    return [evaluation for evaluation, _ in front]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def preference(
    evaluation: Evaluation, settings: SearchSettings, set_aside: Collection[str] = ()
) -> tuple[float, float]:
    """Rank: limits first, then mean accuracy."""
    return (-max(0.0, *violations(evaluation, settings, set_aside)), evaluation.mean_accuracy)


@dataclass(frozen=True, slots=True)
class Convergence:
    """Whether a search has settled: the hypervolume that its candidates dominate, generation by generation.

    It is taken over the objectives that play a part, each scaled to 0 for the best and 1 for the worst value met, with
    the corner at 1.1. `stable_since` is the first generation after which it grew by less than 1 % to the end.
    """

    hypervolume: tuple[float, ...]
    stable_since: int

    @property
    def is_converged(self) -> bool:
        """Whether it was stable for at least 3 generations, the last included."""
        return len(self.hypervolume) - 1 - self.stable_since >= _STABLE_GENERATIONS

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `front.json` writes them."""
        return {
            "hypervolume": list(self.hypervolume),
            "stable_since": self.stable_since,
            "is_converged": self.is_converged,
        }


def convergence(generations: Sequence[Sequence[Evaluation]], frozen: Collection[str]) -> Convergence:
    """Judge the course of a search by the measurements of each generation, without limits."""
    num_objectives = len(COST_OBJECTIVES) + 1
    points = [
        np.array([objectives(one, frozen) for one in generation if not one.reason]).reshape(-1, num_objectives)
        for generation in generations
    ]
    everything = np.concatenate(points)
    best, worst = everything.min(axis=0), everything.max(axis=0)
    taking_part = worst > best
    if not taking_part.any():
        return Convergence((0.0,) * len(points), 0)
    indicator = HV(ref_point=np.full(int(taking_part.sum()), _REFERENCE))
    scale = (worst - best)[taking_part]
    volumes = []
    for last in range(1, len(points) + 1):
        so_far = (np.concatenate(points[:last])[:, taking_part] - best[taking_part]) / scale
        volumes.append(float(indicator(so_far)) if len(so_far) else 0.0)
    stable = next(place for place, volume in enumerate(volumes) if volume >= (1 - _GROWTH) * volumes[-1])
    return Convergence(tuple(volumes), stable)
