"""The status of a search, from its evaluations or from the journal that it is writing; neither is changed.

It shows the generation, the size of the front, the hypervolume, the best candidate so far, the pace and the time left.
The hypervolume is that of `front.convergence` over all candidates so far. The time left is known after the first
candidate has answered.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import storage
from ..errors import HavocError
from ..model.structure import Structure
from .candidate import COST_OBJECTIVES, Candidate, Cost, Evaluation, Origin, SearchSettings
from .entries import known_entries
from .front import convergence, front_of, is_feasible, preference
from .ledger import NUM_COST_REPEATS, answers_in, joined, mean_cost
from .pace import read_pace
from .structure_costs import judged_costs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from .pace import Pace
    from .structure_costs import StructureCosts

_S_PER_MIN = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The progress of a search. Unknown values are None.

    `generation` is the last one with an evaluated candidate, from 0. `best_accuracy` is the mean accuracy of the best
    candidate so far, limits first; `is_best_feasible` says whether it is within every limit.
    """

    num_costs: int
    num_costs_planned: int
    generation: int | None
    num_generations: int
    num_evaluated: int
    num_planned: int
    num_failed: int
    num_rescored: int
    front_size: int
    hypervolume: float | None
    best: Candidate | None
    best_accuracy: float | None
    is_best_feasible: bool | None
    evaluations_per_min: float | None
    left_s: float | None

    def figures(self) -> dict[str, str]:
        """Return the figures for people, by name, as text; a dash for unknown values."""
        best = "-"
        if self.best_accuracy is not None:
            accuracy = f"{self.best_accuracy:.1%}"
            best = accuracy if self.is_best_feasible else f"none (best of all {accuracy})"
        return {
            "generation": "-" if self.generation is None else f"{self.generation + 1} of {self.num_generations}",
            "front": f"{self.front_size}" if self.num_evaluated else "-",
            "hypervolume": "-" if self.hypervolume is None else f"{self.hypervolume:.3f}",
            "best feasible": best,
            "evaluations a minute": "-" if self.evaluations_per_min is None else f"{self.evaluations_per_min:.3g}",
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        best = None if self.best is None else {"alpha": list(self.best.alpha), "structure": str(self.best.structure)}
        return {**plain, "best": best}


def standing_of(
    settings: SearchSettings,
    costs: StructureCosts | None,
    evaluations: Sequence[Evaluation],
    origins: Sequence[Origin],
    *,
    num_costs: int,
    num_rescored: int,
    pace: Pace,
) -> Standing:
    """Judge the evaluations so far; `origins` are in the same order, `costs` is None if unknown."""
    frozen, set_aside = ((), ()) if costs is None else (costs.frozen, costs.set_aside)
    measured = [one for one in evaluations if not one.reason]
    best = max(measured, key=lambda one: preference(one, settings, set_aside), default=None)
    planned_costs = NUM_COST_REPEATS * len(settings.weight_formats)
    num_planned = settings.population * settings.generations
    return Standing(
        num_costs=num_costs,
        num_costs_planned=planned_costs,
        generation=max((origin.generation for origin in origins), default=None),
        num_generations=settings.generations,
        num_evaluated=len(evaluations),
        num_planned=num_planned,
        num_failed=len(evaluations) - len(measured),
        num_rescored=num_rescored,
        front_size=len(front_of(measured, settings, frozen, set_aside)) if measured else 0,
        hypervolume=convergence([measured], frozen).hypervolume[-1] if measured else None,
        best=None if best is None else best.candidate,
        best_accuracy=None if best is None else best.mean_accuracy,
        is_best_feasible=None if best is None else is_feasible(best, settings, set_aside),
        **paced(settings, pace, num_costs=num_costs, num_evaluated=len(evaluations), num_rescored=num_rescored),
    )


def paced(
    settings: SearchSettings, pace: Pace, *, num_costs: int, num_evaluated: int, num_rescored: int
) -> dict[str, float | None]:
    """Return `evaluations_per_min` and `left_s` of a search with this progress; None if unknown."""
    if pace.s_per_sample is None:
        return {"evaluations_per_min": None, "left_s": None}
    costs_left = max(0, NUM_COST_REPEATS * len(settings.weight_formats) - num_costs)
    evaluations_left = max(0, settings.population * settings.generations - num_evaluated)
    samples_left = evaluations_left * settings.num_repeats + max(0, settings.num_finalists - num_rescored)
    left_s = samples_left * pace.s_per_sample + costs_left * (pace.s_per_cost or 0.0)
    s_per_evaluation = pace.s_per_sample * settings.num_repeats
    return {"evaluations_per_min": _S_PER_MIN / s_per_evaluation if s_per_evaluation else None, "left_s": left_s}


@dataclass(frozen=True, slots=True)
class JournalSoFar:
    """The content of a journal: the settings, structures' costs, candidates with their origins, and numbers of lines.

    `evaluations` are the candidates that have answered all their samples, in the order they were made.
    """

    settings: SearchSettings
    costs: StructureCosts | None
    evaluations: tuple[Evaluation, ...]
    origins: tuple[Origin, ...]
    num_costs: int
    num_rescored: int
    pace: Pace

    @property
    def standing(self) -> Standing:
        """The status of the search by the journal."""
        return standing_of(
            self.settings,
            self.costs,
            self.evaluations,
            self.origins,
            num_costs=self.num_costs,
            num_rescored=self.num_rescored,
            pace=self.pace,
        )


def read_so_far(path: Path) -> JournalSoFar:
    """Read the journal of a search that may be running; a half-written last line is left out.

    A file that is not such a journal, or whose first line does not have the settings, is a `HavocError`.
    """
    entries = storage.read_journal(path)
    settings = _settings_in(entries, path)
    known = known_entries(entries, path, objectives=COST_OBJECTIVES, domains=settings.domains).values()
    try:
        by_structure = _costs_in(known)
        evaluations, origins, num_rescored = _evaluations_in(known, by_structure, settings)
    except (KeyError, TypeError, ValueError) as error:
        raise HavocError(f"{path}: holds a line that a search of this version does not write ({error!r})") from error
    measured = [[cost for cost in pair if isinstance(cost, Cost)] for pair in by_structure.values()]
    pairs = [pair for pair in measured if len(pair) == NUM_COST_REPEATS]
    return JournalSoFar(
        settings,
        judged_costs(pairs, settings) if pairs else None,
        evaluations,
        origins,
        sum(map(len, by_structure.values())),
        num_rescored,
        read_pace(path.parent),
    )


def _settings_in(entries: Sequence[Mapping[str, Any]], path: Path) -> SearchSettings:
    plain = entries[0].get("plain") if entries else None
    if not isinstance(plain, dict) or entries[0].get("settings") != storage.sha256_json(plain):
        raise HavocError(f"{path}: not the journal of a search, or from an older version that did not write settings")
    tuples: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    try:
        return SearchSettings(**tuples)
    except TypeError as error:
        raise HavocError(f"{path}: is the journal of another version of havoc ({error})") from error


def _costs_in(known: Iterable[Mapping[str, Any]]) -> dict[Structure, list[Cost | str]]:
    """Each structure's costs so far, or why they are missing."""
    found: dict[Structure, list[Cost | str]] = {}
    for entry in known:
        if entry["kind"] == "cost":
            cost = entry["reason"] if "reason" in entry else Cost(entry["cost"], entry.get("disturbance", ""))
            found.setdefault(Structure.from_fields(entry["structure"]), []).append(cost)
    return found


def _evaluations_in(
    known: Iterable[Mapping[str, Any]], costs: Mapping[Structure, Sequence[Cost | str]], settings: SearchSettings
) -> tuple[tuple[Evaluation, ...], tuple[Origin, ...], int]:
    """The candidates that have answered all their samples, their origins, and how many were scored again."""
    kls = {tuple(entry["alpha"]): entry for entry in known if entry["kind"] == "divergence"}
    answered: dict[Candidate, list[Mapping[str, Any]]] = {}
    num_rescored = 0
    for entry in known:
        if entry["kind"] == "evaluation" and "origin" not in entry:
            num_rescored += 1
        elif entry["kind"] == "evaluation":
            candidate = Candidate(tuple(entry["alpha"]), Structure.from_fields(entry["structure"]))
            answered.setdefault(candidate, []).append(entry)
    evaluations, origins = [], []
    for candidate, lines in answered.items():
        if len(lines) == settings.num_repeats:
            evaluations.append(_evaluation(candidate, lines, costs[candidate.structure], kls.get(candidate.alpha, {})))
            origin = lines[0]["origin"]
            origins.append(Origin(**{**origin, "parents": tuple(origin["parents"])}))
    return tuple(evaluations), tuple(origins), num_rescored


def _evaluation(
    candidate: Candidate, lines: Sequence[Mapping[str, Any]], costs: Sequence[Cost | str], kl: Mapping[str, Any]
) -> Evaluation:
    reasons = [entry["reason"] for entry in (*lines, kl) if "reason" in entry]
    reasons += [cost for cost in costs if isinstance(cost, str)]
    if reasons:
        return Evaluation(candidate, {}, {}, reasons[0])
    cost = mean_cost([cost for cost in costs if isinstance(cost, Cost)])
    answers = joined([answers_in(entry) for entry in lines])
    return Evaluation(candidate, answers, cost, kl_to_base=kl.get("kl_to_base", {}))
