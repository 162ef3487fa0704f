"""Search mixture and structure with NSGA-II, against measurements that are handed in.

Cost is measured twice per structure, in fresh processes; the widest difference of two such measurements is the
objective's noise floor. An objective whose range over the structures stays inside its floor is frozen and named,
because what NSGA-II would find in it is luck; so are figures of speed that were measured beside other work. Accuracy is
paired: every candidate answers the same rows of the search split. Limits are constraints, the KL divergence from the
base among them; one on a cost that no structure meets is set aside, because it tells no candidate from another; a
failed candidate is infeasible with its reason. The best few are scored again on fresh rows of the search split, so that
the choice is not the luckiest of many, and among them the best of the points the program starts from and the best of
those it bred: the result says whether breeding found anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HavocError, MeasurementError
from ..model.structure import Structure
from ..progress import SILENT, Progress
from ..track.catalogue import GENERATION
from ..track.metrics_file import Record, record_nothing
from .breeding import Breeder
from .candidate import COST_OBJECTIVES, FORMAT_METRICS, SPEED_OBJECTIVES
from .front import convergence, excess_of, finite_violations, front_of, is_feasible, objectives, preference
from .generation_figures import generation_figures
from .ledger import NUM_COST_REPEATS, Ledger, mean_cost
from .paired import paired_margin

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from .candidate import Candidate, Cost, Evaluation, Evidence, Origin, SearchSettings
    from .front import Convergence
    from .ledger import Measurer


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The front, what was frozen and why, the finalists' second scores, and the chosen candidate.

    `evaluations` are in the order they were made, `origins` and `feasible` beside them. `chosen` has its second score:
    not the value it was selected by in the search. `disturbance` says why figures of speed played no part, "" where
    they did; `unmet` are the limits that no structure meets, so that no candidate is feasible.
    """

    evaluations: tuple[Evaluation, ...]
    origins: tuple[Origin, ...]
    feasible: tuple[bool, ...]
    front: tuple[Evaluation, ...]
    noise_floor: Mapping[str, float]
    frozen: tuple[str, ...]
    disturbance: str
    unmet: tuple[str, ...]
    rescored: tuple[Evaluation, ...]
    chosen: Evaluation
    convergence: Convergence
    evidence: Evidence

    @property
    def bred_against_seeded(self) -> dict[str, Any] | None:
        """The best bred against the best other finalist, by mean accuracy on fresh rows; None where one is missing.

        Keys of the candidates, and the paired difference with its 95 % interval, as `paired_margin` gives it.
        """
        bred, others = self._finalists(is_bred=True), self._finalists(is_bred=False)
        if not bred or not others:
            return None
        ours, theirs = (max(group, key=lambda one: one.mean_accuracy) for group in (bred, others))
        margin = paired_margin(ours.answers, theirs.answers)
        return {"bred": ours.candidate.key(), "seeded": theirs.candidate.key(), **margin}

    def _finalists(self, *, is_bred: bool) -> list[Evaluation]:
        kinds = {one.candidate.key(): origin.kind for one, origin in zip(self.evaluations, self.origins, strict=True)}
        scored = [one for one in self.rescored if not one.reason]
        return [one for one in scored if (kinds[one.candidate.key()] == "bred") == is_bred]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `front.json`."""
        rescored = {evaluation.candidate.key(): evaluation for evaluation in self.rescored}
        evaluated = list(zip(self.evaluations, self.origins, self.feasible, strict=True))
        return {
            "evaluations": len(self.evaluations),
            "evidence": self.evidence,
            "noise_floor": dict(self.noise_floor),
            "frozen": list(self.frozen),
            "disturbance": self.disturbance,
            "unmet": list(self.unmet),
            "convergence": self.convergence.to_json(),
            "bred_against_seeded": self.bred_against_seeded,
            "chosen": self.chosen.candidate.key(),
            "candidates": [
                {**_summary(evaluation, rescored), "is_feasible": is_within, "origin": origin.to_json()}
                for evaluation, origin, is_within in evaluated
                if not evaluation.reason
            ],
            "front": [evaluation.candidate.key() for evaluation in self.front],
            "failed": [
                {"key": evaluation.candidate.key(), "reason": evaluation.reason, "origin": origin.to_json()}
                for evaluation, origin, _ in evaluated
                if evaluation.reason
            ],
        }


def _summary(evaluation: Evaluation, rescored: Mapping[str, Evaluation]) -> dict[str, Any]:
    key = evaluation.candidate.key()
    again = rescored.get(key)
    return {
        "key": key,
        "alpha": list(evaluation.candidate.alpha),
        "structure": evaluation.candidate.structure.to_fields(),
        "cost": {metric: evaluation.cost[metric] for metric in COST_OBJECTIVES},
        "format_cost": {metric: evaluation.cost[metric] for metric in FORMAT_METRICS if metric in evaluation.cost},
        "kl_to_base": dict(evaluation.kl_to_base),
        "search_accuracy": evaluation.accuracy,
        "rescored_accuracy": None if again is None or again.reason else again.accuracy,
    }


def search(
    measurer: Measurer,
    *,
    settings: SearchSettings,
    journal_path: Path,
    progress: Progress = SILENT,
    record: Record = record_nothing,
) -> SearchResult:
    """Run the search, or go on with the one that `journal_path` holds, and return its result.

    `record` is handed the metrics of each generation, those that the journal gives back included.
    Raises `HavocError` when the journal belongs to other settings or no candidate could be measured.
    """
    ledger = Ledger(measurer, settings, journal_path)
    total = (
        NUM_COST_REPEATS * len(settings.weight_formats)
        + settings.population * settings.generations
        + settings.num_finalists
    )
    with progress.stage("search", total) as stage:
        costs = _costs(ledger, settings, stage.advance)
        frozen, set_aside = costs.frozen, costs.set_aside
        course = _evolve(ledger, settings, frozen, set_aside, stage.advance, record)
        measured = [one for one in course.evaluations if not one.reason]
        if not measured:
            reason = course.evaluations[0].reason
            raise HavocError(
                f"none of the {len(course.evaluations)} candidates could be measured; the first failed with: {reason}"
            )
        rescored = []
        finalists = [one.candidate for one in _finalists(course, settings, set_aside)]
        for evaluation in ledger.evaluate(finalists, samples=[settings.num_repeats], origins=[None] * len(finalists)):
            rescored.append(evaluation)
            stage.advance(note="finalists on fresh rows")
    settled = convergence(course.generations(), frozen)
    for generation, volume in enumerate(settled.hypervolume):
        record(GENERATION, generation, {"adas/hypervolume": volume})
    scored = [evaluation for evaluation in rescored if not evaluation.reason]
    if not scored:
        msg = f"none of the {len(rescored)} best candidates could be scored again; the first failed with: "
        raise MeasurementError(msg + rescored[0].reason)
    return SearchResult(
        evaluations=tuple(course.evaluations),
        origins=tuple(course.origins),
        feasible=tuple(is_feasible(one, settings, set_aside) for one in course.evaluations),
        front=tuple(front_of(measured, settings, frozen, set_aside)),
        noise_floor=costs.noise_floor,
        frozen=frozen,
        disturbance=costs.disturbance,
        unmet=costs.unmet,
        rescored=tuple(rescored),
        chosen=max(scored, key=lambda evaluation: preference(evaluation, settings, set_aside)),
        convergence=settled,
        evidence=settings.evidence,
    )


@dataclass(frozen=True, slots=True)
class _Costs:
    """What the structures' costs say before anything answers."""

    noise_floor: dict[str, float]
    frozen: tuple[str, ...]
    disturbance: str
    unmet: tuple[str, ...]

    @property
    def set_aside(self) -> tuple[str, ...]:
        """Limits that decide nothing: on figures that cannot be believed, or missed by every structure."""
        return (*(SPEED_OBJECTIVES if self.disturbance else ()), *self.unmet)


def _costs(ledger: Ledger, settings: SearchSettings, advance: Callable[..., None]) -> _Costs:
    """Measure every structure."""
    pairs: dict[str, list[Cost]] = {}
    failures = {}
    for name in settings.weight_formats:
        try:
            pairs[name] = ledger.costs(Structure.named(name, settings.activation_dtype))
        except HavocError as error:
            failures[name] = str(error)
        advance(NUM_COST_REPEATS, note=f"cost of {name}")
    if not pairs:
        first = settings.weight_formats[0]
        raise MeasurementError(f"none of the structures could be measured; {first} failed with: {failures[first]}")
    means = [mean_cost(pair) for pair in pairs.values()]
    values = [[cost.values for cost in pair] for pair in pairs.values()]
    floor = {metric: max(_range(pair, metric) for pair in values) for metric in COST_OBJECTIVES}
    disturbance = next((cost.disturbance for pair in pairs.values() for cost in pair if cost.disturbance), "")
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
    return _Costs(floor, frozen, disturbance, unmet)


def _range(costs: Sequence[Mapping[str, float]], metric: str) -> float:
    """Relative range of a metric."""
    values = [cost[metric] for cost in costs]
    return max(values) / min(values) - 1


class _Course:
    """Every candidate in the order it was evaluated, with where it came from."""

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.origins: list[Origin] = []

    def add(self, evaluation: Evaluation, origin: Origin) -> None:
        self.evaluations.append(evaluation)
        self.origins.append(origin)

    def generations(self) -> list[list[Evaluation]]:
        last = max(origin.generation for origin in self.origins)
        pairs = list(zip(self.evaluations, self.origins, strict=True))
        return [[one for one, origin in pairs if origin.generation == number] for number in range(last + 1)]


def _evolve(
    ledger: Ledger,
    settings: SearchSettings,
    frozen: Sequence[str],
    set_aside: Sequence[str],
    advance: Callable[..., None],
    record: Record,
) -> _Course:
    """Run the generations; no candidate is met twice."""
    course, breeder = _Course(), Breeder(settings)
    samples = range(settings.num_repeats)
    for generation in breeder.generations():
        candidates: list[Candidate] = [candidate for candidate, _ in generation]
        origins = [origin for _, origin in generation]
        found = []
        for place, evaluation in enumerate(ledger.evaluate(candidates, samples=samples, origins=origins)):
            course.add(evaluation, origins[place])
            found.append(evaluation)
            best = max(one.mean_accuracy for one in course.evaluations)
            advance(note=f"generation {breeder.num_generations}, best mean accuracy {best:.1%}")
        breeder.tell(
            [objectives(one, frozen) for one in found],
            [finite_violations(one, settings, set_aside) for one in found],
        )
        record(GENERATION, breeder.num_generations, _figures(course, settings, frozen, set_aside))
    return course


def _figures(
    course: _Course, settings: SearchSettings, frozen: Sequence[str], set_aside: Sequence[str]
) -> dict[str, float | None]:
    """The metrics of the generation that was evaluated last."""
    measured = [one for one in course.evaluations if not one.reason]
    return generation_figures(
        course.evaluations,
        course.origins,
        settings,
        front_size=len(front_of(measured, settings, frozen, set_aside)) if measured else 0,
        num_feasible=sum(is_feasible(one, settings, set_aside) for one in measured),
    )


def _finalists(course: _Course, settings: SearchSettings, set_aside: Sequence[str]) -> list[Evaluation]:
    """Return the best few, and the best bred and the best other one where they are not among them."""
    pairs = [(one, origin) for one, origin in zip(course.evaluations, course.origins, strict=True) if not one.reason]
    ranked = sorted(pairs, key=lambda pair: preference(pair[0], settings, set_aside), reverse=True)
    chosen = ranked[: settings.num_finalists]
    for is_bred in (True, False):
        group = [pair for pair in ranked if (pair[1].kind == "bred") == is_bred]
        chosen += [pair for pair in group[:1] if pair not in chosen]
    return [one for one, _ in chosen]
