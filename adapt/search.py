"""Search mixture and structure with NSGA-II; the caller provides the measurer.

Cost is measured twice per structure, in fresh processes. The largest difference between two such measurements is the
objective's noise floor. An objective whose range over the structures is within its floor is frozen and named, because
NSGA-II would only find luck in it. Figures of speed that were measured beside other work are frozen too. Accuracy is
paired: every candidate answers the same rows of the search split. Limits are constraints, also the one on the KL
divergence from the base. A limit on a cost that no structure meets is set aside, because it does not separate the
candidates. A failed candidate is infeasible, with its reason. The best few candidates are scored again on fresh rows of
the search split, so the choice is not the luckiest of many. They include the best starting point and the best bred
point, so the result says whether breeding found anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import HavocError, MeasurementError
from ..model.structure import Structure
from ..progress import SILENT, Progress
from ..track.catalogue import GENERATION
from ..track.metrics_file import Record, record_nothing
from .breeding import Breeder
from .candidate import COST_OBJECTIVES, FORMAT_METRICS
from .front import convergence, finite_violations, front_of, is_feasible, objectives, preference
from .generation_figures import generation_figures
from .ledger import NUM_COST_REPEATS, Ledger
from .paired import paired_margin
from .standing import Standing, paced, standing_of
from .structure_costs import judged_costs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ..progress import Stage
    from .candidate import Candidate, Evaluation, Evidence, Origin, SearchSettings
    from .front import Convergence
    from .ledger import Measurer
    from .structure_costs import StructureCosts

_TELLING_SHARE: Final = 50
"""The full status is computed again after this many times the seconds of the last one: 2 % of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The front, what was frozen and why, the finalists' second scores, and the chosen candidate.

    `evaluations` are in the order they were made; `origins` and `feasible` have the same order. `chosen` has its second
    score, not the value that selected it in the search. `disturbance` says why figures of speed were not used ("": they
    were used). `unmet` are the limits that no structure meets, so no candidate is feasible.
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
        """The best bred against the best other finalist, by mean accuracy on fresh rows; None if one is missing.

        It has the keys of the candidates, and the paired difference with its 95 % interval from `paired_margin`.
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
    """Run the search, or continue the one in `journal_path`, and return its result.

    `record` gets the metrics of each generation, also of those from the journal. Raises `HavocError` if the journal
    belongs to other settings or if no candidate could be measured.
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
        teller = _Teller(stage, ledger, settings, costs)
        course = _evolve(ledger, settings, costs, teller, record)
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
            teller.advance(course, num_rescored=len(rescored))
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


def _costs(ledger: Ledger, settings: SearchSettings, advance: Callable[..., None]) -> StructureCosts:
    """Measure every structure."""
    structures = [Structure.named(name, settings.activation_dtype) for name in settings.weight_formats]
    found = []
    for name, costs in zip(settings.weight_formats, ledger.costs(structures), strict=True):
        found.append(costs)
        advance(NUM_COST_REPEATS, note=f"cost of {name}")
    pairs = [costs for costs in found if not isinstance(costs, str)]
    if not pairs:
        first = settings.weight_formats[0]
        raise MeasurementError(f"none of the structures could be measured; {first} failed with: {found[0]}")
    return judged_costs(pairs, settings)


class _Course:
    """Every candidate in the order of evaluation, with its origin."""

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


class _Teller:
    """Shows the status of the search: the pace after every candidate, the full status if it takes little time."""

    def __init__(self, stage: Stage, ledger: Ledger, settings: SearchSettings, costs: StructureCosts) -> None:
        self._stage, self._ledger, self._settings, self._costs = stage, ledger, settings, costs
        self._standing: Standing | None = None
        self._due_s = 0.0

    def advance(self, course: _Course, *, num_rescored: int = 0) -> None:
        """Count one more evaluation and show the status."""
        num_costs = NUM_COST_REPEATS * len(self._settings.weight_formats)
        start_s = time.monotonic()
        if self._standing is None or start_s >= self._due_s:
            self._standing = standing_of(
                self._settings,
                self._costs,
                course.evaluations,
                course.origins,
                num_costs=num_costs,
                num_rescored=num_rescored,
                pace=self._ledger.pace,
            )
            now_s = time.monotonic()
            self._due_s = now_s + _TELLING_SHARE * (now_s - start_s)
        else:
            counts = {"num_evaluated": len(course.evaluations), "num_rescored": num_rescored}
            pace = paced(self._settings, self._ledger.pace, num_costs=num_costs, **counts)
            changes: dict[str, Any] = {"generation": course.origins[-1].generation, **counts, **pace}
            self._standing = replace(self._standing, **changes)
        self._stage.tell(self._standing.figures(), left_s=self._standing.left_s)
        self._stage.advance(note="finalists on fresh rows" if num_rescored else "candidates")


def _evolve(
    ledger: Ledger,
    settings: SearchSettings,
    costs: StructureCosts,
    teller: _Teller,
    record: Record,
) -> _Course:
    """Run the generations; no candidate is met twice."""
    frozen, set_aside = costs.frozen, costs.set_aside
    course, breeder = _Course(), Breeder(settings)
    samples = range(settings.num_repeats)
    for generation in breeder.generations():
        candidates: list[Candidate] = [candidate for candidate, _ in generation]
        origins = [origin for _, origin in generation]
        found = []
        for place, evaluation in enumerate(ledger.evaluate(candidates, samples=samples, origins=origins)):
            course.add(evaluation, origins[place])
            found.append(evaluation)
            teller.advance(course)
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
    """Return the best few, and also the best bred and the best other one if they are not among them."""
    pairs = [(one, origin) for one, origin in zip(course.evaluations, course.origins, strict=True) if not one.reason]
    ranked = sorted(pairs, key=lambda pair: preference(pair[0], settings, set_aside), reverse=True)
    chosen = ranked[: settings.num_finalists]
    for is_bred in (True, False):
        group = [pair for pair in ranked if (pair[1].kind == "bred") == is_bred]
        chosen += [pair for pair in group[:1] if pair not in chosen]
    return [one for one, _ in chosen]
