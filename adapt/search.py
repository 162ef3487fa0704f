"""Search mixture and structure with NSGA-II, against measurements that are handed in.

A candidate is alpha in [0, 2]^K, one weight per expert, and a structure, since a folded mixture costs the same for
every alpha. Four objectives, as seed 003 asks: prefill latency and peak memory down, accuracy and throughput up. Cost
is measured twice per structure, in fresh processes; the widest difference of two such measurements is the objective's
noise floor. An objective whose range over the structures stays inside its floor is frozen and named, because what
NSGA-II would find in it is luck. Accuracy is paired: every candidate answers the same rows of the search split.
Limits are constraints; a failed candidate is infeasible with its reason. The best few are scored again on fresh rows
of the search split, so that the choice is not the luckiest of many.

NSGA-II: Deb et al., 2002; `pymoo` by ask and tell. Every finished evaluation is a line of `journal.jsonl`; a search
that was killed replays the journal and goes on, with the same result as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import storage
from ..errors import HavocError, MeasurementError
from ..model.structure import ActivationDtype, Structure
from ..progress import SILENT, Progress
from .entries import known_entries

if TYPE_CHECKING:
    from pymoo.core.population import Population

COST_OBJECTIVES = ("prefill_ms", "peak_bytes", "decode_tok_per_s")
_IS_BETTER_HIGHER = frozenset({"decode_tok_per_s"})
_NUM_REPEATS = 2
_ALPHA_STEP = 0.05
_FIRST_LEVELS = (0.75, 0.5)
_SEED_MIXTURE = (1.2, 0.8, 1.5, 0.9)
_NO_VALUE = 1e9
"""Objective of a candidate that could not be measured; its constraint violation keeps it out of every front."""
_FAILED = math.inf
"""Violation of every constraint by a candidate that failed: no measured one, however far off, ranks below it."""
_FAILED_FINITE = 1e12
"""The same for NSGA-II, which adds violations up; no measured figure is that many times its limit."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is evaluated: alpha in the order of the experts, and the structure."""

    alpha: tuple[float, ...]
    structure: Structure

    def key(self) -> str:
        """Name the candidate in the journal."""
        return storage.sha256_json({"alpha": self.alpha, "structure": self.structure.to_fields()})[:16]


Answers = Mapping[str, Sequence[bool]]
"""For each domain, whether each row of the sample was answered right."""


class Measurer(Protocol):
    """How candidates are measured; the pipeline hands over the bench."""

    def cost(self, structure: Structure) -> Mapping[str, float]:
        """Measure `COST_OBJECTIVES` of a structure in a fresh process."""

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterable[Answers | HavocError]:
        """Answer the rows of search-split sample number `sample` (0 screens, 1 re-scores); the same rows every time.

        In the order of the candidates, each as soon as it may be; one that fails gives its error in its place.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """What the course of a search depends on. `limits` are the constraints: metric to (comparison, value).

    `measured` names what the measurer measures and on what (base, experts, rule, rows, device): plain JSON values, so
    that a journal of anything else is refused.
    """

    domains: tuple[str, ...]
    seed: int = 0
    population: int = 8
    generations: int = 4
    weight_formats: tuple[str, ...] = ("fp32", "int8", "int4", "int4-cfp32")
    activation_dtype: ActivationDtype = "fp32"
    alpha_max: float = 2.0
    num_finalists: int = 3
    limits: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a search that cannot run."""
        if self.population < 4 or self.generations < 1:  # noqa: PLR2004
            msg = f"population {self.population} and generations {self.generations}: at least 4 and 1 are needed"
            raise HavocError(msg)
        for name in self.weight_formats:
            if Structure.named(name, self.activation_dtype).weight_format == "keep":
                msg = "keep stores a file's own blocks, and a mixture has none: it cannot be searched"
                raise HavocError(msg)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measured candidate; `reason` says why it failed, and then it has neither answers nor cost."""

    candidate: Candidate
    answers: Answers
    cost: Mapping[str, float]
    reason: str = ""

    @property
    def accuracy(self) -> dict[str, float]:
        """Share right by domain."""
        return {domain: sum(right) / len(right) for domain, right in self.answers.items()}

    @property
    def mean_accuracy(self) -> float:
        """Mean of the domains' shares."""
        accuracy = self.accuracy
        return sum(accuracy.values()) / len(accuracy) if accuracy else 0.0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The front, what was frozen and why, the finalists' second scores, and the chosen candidate."""

    evaluations: tuple[Evaluation, ...]
    front: tuple[Evaluation, ...]
    noise_floor: Mapping[str, float]
    frozen: tuple[str, ...]
    rescored: tuple[Evaluation, ...]
    chosen: Evaluation
    """The chosen candidate with its second score: not the value it was selected by in the search."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `front.json`."""
        rescored = {evaluation.candidate.key(): evaluation for evaluation in self.rescored}
        return {
            "evaluations": len(self.evaluations),
            "noise_floor": dict(self.noise_floor),
            "frozen": list(self.frozen),
            "chosen": self.chosen.candidate.key(),
            "candidates": [_summary(evaluation, rescored) for evaluation in self.evaluations if not evaluation.reason],
            "front": [evaluation.candidate.key() for evaluation in self.front],
            "failed": [
                {"key": evaluation.candidate.key(), "reason": evaluation.reason}
                for evaluation in self.evaluations
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
        "cost": dict(evaluation.cost),
        "search_accuracy": evaluation.accuracy,
        "rescored_accuracy": None if again is None or again.reason else again.accuracy,
    }


def search(
    measurer: Measurer, *, settings: SearchSettings, journal_path: Path, progress: Progress = SILENT
) -> SearchResult:
    """Run the search, or go on with the one that `journal_path` holds, and return its result.

    Raises `HavocError` when the journal belongs to other settings or no candidate could be measured.
    """
    ledger = _Ledger(measurer, settings, journal_path)
    total = (
        _NUM_REPEATS * len(settings.weight_formats)
        + settings.population * settings.generations
        + settings.num_finalists
    )
    with progress.stage("search", total) as stage:
        pairs, failures = {}, {}
        for name in settings.weight_formats:
            try:
                pairs[name] = ledger.costs(Structure.named(name, settings.activation_dtype))
            except HavocError as error:
                failures[name] = str(error)
            stage.advance(_NUM_REPEATS, note=f"cost of {name}")
        if not pairs:
            msg = (
                f"none of the structures could be measured; {settings.weight_formats[0]} failed with: "
                + (failures[settings.weight_formats[0]])
            )
            raise MeasurementError(msg)
        costs = {name: _mean_cost(pair) for name, pair in pairs.items()}
        floor = {metric: max(_range(pair, metric) for pair in pairs.values()) for metric in COST_OBJECTIVES}
        frozen = tuple(metric for metric in COST_OBJECTIVES if _range(list(costs.values()), metric) <= floor[metric])
        seen = _evolve(ledger, settings, frozen, stage.advance)
        measured = [evaluation for evaluation in seen.values() if not evaluation.reason]
        if not measured:
            reason = next(iter(seen.values())).reason
            msg = f"none of the {len(seen)} candidates could be measured; the first failed with: {reason}"
            raise HavocError(msg)
        front = _front(measured, settings, frozen)
        rescored = []
        finalists = [evaluation.candidate for evaluation in _finalists(measured, settings)]
        for evaluation in ledger.evaluate(finalists, sample=1):
            rescored.append(evaluation)
            stage.advance(note="finalists on fresh rows")
    scored = [evaluation for evaluation in rescored if not evaluation.reason]
    if not scored:
        msg = f"none of the {len(rescored)} best candidates could be scored again; the first failed with: "
        raise MeasurementError(msg + rescored[0].reason)
    chosen = max(scored, key=lambda evaluation: _preference(evaluation, settings))
    return SearchResult(tuple(seen.values()), tuple(front), floor, frozen, tuple(rescored), chosen)


def _range(costs: Sequence[Mapping[str, float]], metric: str) -> float:
    """Relative range of a metric."""
    values = [cost[metric] for cost in costs]
    return max(values) / min(values) - 1


def _mean_cost(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: sum(cost[metric] for cost in costs) / len(costs) for metric in COST_OBJECTIVES}


class _Ledger:
    """The journal and the measurer behind it: nothing finished is measured twice."""

    def __init__(self, measurer: Measurer, settings: SearchSettings, path: Path) -> None:
        self._measurer = measurer
        self._journal = storage.Journal(path)
        plain = dataclasses.asdict(settings)
        opening = {"kind": "search", "settings": storage.sha256_json(plain)}
        if not self._journal.entries:
            self._journal.append({**opening, "plain": plain})
        first = self._journal.entries[0]
        if {name: first.get(name) for name in opening} != opening:
            msg = f"{path} is the journal of a search with other settings; choose another --out or remove it"
            raise HavocError(msg)
        self._known = known_entries(self._journal.entries, path, objectives=COST_OBJECTIVES, domains=settings.domains)

    def _entry(self, key: str, measure: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a thunk
        if key not in self._known:
            entry = {"key": key, **measure()}
            self._journal.append(entry)
            self._known[key] = entry
        return self._known[key]

    def cost(self, structure: Structure, *, repeat: int = 0) -> dict[str, float]:
        """Measure the cost of a structure once per `repeat`; non-finite or non-positive values are refused."""

        def measure() -> dict[str, Any]:
            try:
                cost = {metric: float(value) for metric, value in self._measurer.cost(structure).items()}
            except HavocError as error:
                return {"kind": "cost", "structure": structure.to_fields(), "reason": str(error)}
            bad = [
                metric
                for metric in COST_OBJECTIVES
                if not (math.isfinite(cost.get(metric, 0)) and cost.get(metric, 0) > 0)
            ]
            if bad:
                msg = f"the cost of {structure} has no usable {', '.join(bad)}: {cost}"
                raise HavocError(msg)
            return {"kind": "cost", "structure": structure.to_fields(), "cost": cost}

        key = f"cost:{storage.sha256_json(structure.to_fields())[:16]}:{repeat}"
        entry = self._entry(key, measure)
        if "reason" in entry:
            raise MeasurementError(entry["reason"])
        cost: dict[str, float] = entry["cost"]
        return cost

    def costs(self, structure: Structure) -> list[dict[str, float]]:
        """Measure a structure as often as its noise needs; one that failed before fails again with the same reason."""
        return [self.cost(structure, repeat=repeat) for repeat in range(_NUM_REPEATS)]

    def evaluate(self, candidates: Sequence[Candidate], *, sample: int = 0) -> Iterator[Evaluation]:
        """Measure candidates, in their order; a `HavocError` becomes an infeasible candidate with its reason."""
        costs = {candidate.structure: self._cost_or_reason(candidate.structure) for candidate in candidates}
        keys = [f"{candidate.key()}:{sample}" for candidate in candidates]
        unknown = {
            key: candidate
            for key, candidate in zip(keys, candidates, strict=True)
            if key not in self._known and not isinstance(costs[candidate.structure], str)
        }
        answered = iter(self._measurer.answers(list(unknown.values()), sample=sample)) if unknown else iter(())
        for key, candidate in zip(keys, candidates, strict=True):
            cost = costs[candidate.structure]
            if isinstance(cost, str):
                yield Evaluation(candidate, {}, {}, cost)
                continue
            entry = self._entry(key, lambda candidate=candidate: _described(candidate, sample, next(answered)))
            if "reason" in entry:
                yield Evaluation(candidate, {}, {}, entry["reason"])
                continue
            answers = {domain: tuple(mark == "1" for mark in marks) for domain, marks in entry["right"].items()}
            yield Evaluation(candidate, answers, cost)

    def _cost_or_reason(self, structure: Structure) -> dict[str, float] | str:
        try:
            return _mean_cost(self.costs(structure))
        except HavocError as error:
            return str(error)


def _described(candidate: Candidate, sample: int, outcome: Answers | HavocError) -> dict[str, Any]:
    """Give an evaluation's entry in the journal."""
    described = {
        "kind": "evaluation",
        "sample": sample,
        "alpha": list(candidate.alpha),
        "structure": candidate.structure.to_fields(),
    }
    if isinstance(outcome, HavocError):
        return {**described, "reason": str(outcome)}
    return {**described, "right": {d: "".join("01"[bool(x)] for x in right) for d, right in outcome.items()}}


def _evolve(
    ledger: _Ledger, settings: SearchSettings, frozen: Sequence[str], advance: Callable[..., None]
) -> dict[str, Evaluation]:
    """Run the generations; return every distinct evaluation in the order it was made."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating
    from pymoo.problems.static import StaticProblem

    problem = _problem(settings)
    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=_first_population(problem, settings),
        mating=MixedVariableMating(eliminate_duplicates=MixedVariableDuplicateElimination()),
        eliminate_duplicates=MixedVariableDuplicateElimination(),
    )
    algorithm.setup(problem, termination=("n_gen", settings.generations), seed=settings.seed, verbose=False)
    seen: dict[str, Evaluation] = {}
    while algorithm.has_next():
        population = algorithm.ask()
        rows = []
        candidates = [_candidate(x, settings) for x in population.get("X")]
        for evaluation in ledger.evaluate(candidates):
            seen.setdefault(evaluation.candidate.key(), evaluation)
            violations = [min(excess, _FAILED_FINITE) for excess in _violations(evaluation, settings)]
            rows.append((_objectives(evaluation, frozen), violations))
            best = max(seen.values(), key=lambda item: item.mean_accuracy)
            advance(note=f"best mean accuracy {best.mean_accuracy:.1%}")
        static = StaticProblem(problem, F=_matrix(rows, 0), G=_matrix(rows, 1))
        Evaluator().eval(static, population)
        algorithm.tell(infills=population)
    return seen


def _matrix(rows: Sequence[tuple[list[float], list[float]]], part: int) -> Any:  # noqa: ANN401 - numpy, imported lazily
    import numpy as np

    return np.array([row[part] for row in rows], dtype=float)


def _problem(settings: SearchSettings) -> Any:  # noqa: ANN401 - pymoo has no types
    from pymoo.core.problem import Problem
    from pymoo.core.variable import Choice, Real

    variables: dict[str, Any] = {domain: Real(bounds=(0.0, settings.alpha_max)) for domain in settings.domains}
    variables["weight_format"] = Choice(options=list(settings.weight_formats))
    return Problem(vars=variables, n_obj=len(COST_OBJECTIVES) + 1, n_ieq_constr=len(settings.limits) + 1)


def _first_population(problem: Any, settings: SearchSettings) -> Population:  # noqa: ANN401 - pymoo has no types
    """Start from what a person would try: all experts at 1 in each format, seed 003's example; the rest at random."""
    import numpy as np
    from pymoo.core.mixed import MixedVariableSampling
    from pymoo.core.population import Population

    size = len(settings.domains)
    known = [((1.0,) * size, name) for name in settings.weight_formats]
    known += [((level,) * size, settings.weight_formats[0]) for level in _FIRST_LEVELS]
    if size == len(_SEED_MIXTURE):
        known.append((_SEED_MIXTURE, settings.weight_formats[0]))
    chosen = [
        {**dict(zip(settings.domains, alpha, strict=True)), "weight_format": name}
        for alpha, name in known[: settings.population]
    ]
    num_random = settings.population - len(chosen)
    random_state = np.random.default_rng(settings.seed)
    if num_random:
        chosen += list(MixedVariableSampling()(problem, num_random, random_state=random_state).get("X"))
    return Population.new(X=np.array(chosen, dtype=object))


def _candidate(x: Mapping[str, Any], settings: SearchSettings) -> Candidate:
    alpha = tuple(round(round(float(x[domain]) / _ALPHA_STEP) * _ALPHA_STEP, 2) for domain in settings.domains)
    return Candidate(alpha, Structure.named(x["weight_format"], settings.activation_dtype))


def _objectives(evaluation: Evaluation, frozen: Sequence[str]) -> list[float]:
    """All to be minimised; a frozen objective is 0 for everybody."""
    if evaluation.reason:
        return [_NO_VALUE] * (len(COST_OBJECTIVES) + 1)
    cost = [0.0 if metric in frozen else _signed(metric, evaluation.cost[metric]) for metric in COST_OBJECTIVES]
    return [*cost, -evaluation.mean_accuracy]


def _signed(metric: str, value: float) -> float:
    return -value if metric in _IS_BETTER_HIGHER else value


def _violations(evaluation: Evaluation, settings: SearchSettings) -> list[float]:
    """How far each limit is missed, relative to it; infinitely far by a candidate that failed; at most 0 means met."""
    if evaluation.reason:
        return [_FAILED] * (len(settings.limits) + 1)
    values = dict(evaluation.cost) | {f"accuracy/{d}": share for d, share in evaluation.accuracy.items()}
    violations = []
    for metric, (comparison, limit) in settings.limits.items():
        excess = values[metric] / limit - 1
        violations.append(excess if comparison == "<" else -excess)
    return [*violations, 0.0]


def _front(measured: Sequence[Evaluation], settings: SearchSettings, frozen: Sequence[str]) -> list[Evaluation]:
    """Return the feasible evaluations that no other dominates; where none is feasible, the least violating one."""
    feasible = [evaluation for evaluation in measured if max(_violations(evaluation, settings)) <= 0]
    if not feasible:
        return [min(measured, key=lambda evaluation: max(_violations(evaluation, settings)))]
    points = [_objectives(evaluation, frozen) for evaluation in feasible]
    return [
        evaluation
        for evaluation, point in zip(feasible, points, strict=True)
        if not any(_dominates(other, point) for other in points)
    ]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def _preference(evaluation: Evaluation, settings: SearchSettings) -> tuple[float, float]:
    """Rank: limits first, then mean accuracy."""
    return (-max(0.0, *_violations(evaluation, settings)), evaluation.mean_accuracy)


def _finalists(measured: Sequence[Evaluation], settings: SearchSettings) -> list[Evaluation]:
    ranked = sorted(measured, key=lambda evaluation: _preference(evaluation, settings), reverse=True)
    return ranked[: settings.num_finalists]
