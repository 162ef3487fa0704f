"""The journal of a search and the measurer behind it: nothing finished is measured twice.

Every finished cost and every answered sample is a line of `journal.jsonl`, under a key that names the structure, or the
candidate and the sample. A search that was killed reads the journal and continues, with the same result as without the
stop. `pace.json` in the same folder holds its speed, for progress displays: no result depends on it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import storage
from ..errors import HavocError
from .candidate import COST_OBJECTIVES, Cost, Evaluation
from .entries import known_entries
from .pace import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ..model.structure import Structure
    from .candidate import Answers, Candidate, Origin, SearchSettings
    from .pace import Pace

NUM_COST_REPEATS: Final = 2


class Measurer(Protocol):
    """How candidates are measured; the pipeline hands over the bench."""

    def costs(self, structures: Sequence[Structure]) -> Iterable[Cost | HavocError]:
        """Measure `COST_OBJECTIVES` of each structure in a fresh process; repeat it while it is disturbed.

        Yields results in the order of the structures, each as soon as it is known; a structure that fails yields its
        error. Equal neighbours are repeats: all repeats of a failed structure yield the same error.
        """

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterable[Answers | HavocError]:
        """Answer the rows of search-split sample number `sample`; each sample has its own rows, the same every time.

        Yields results in the order of the candidates, each as soon as it is known; one that fails yields its error.
        """

    def divergences(self, alphas: Sequence[Sequence[float]]) -> Iterable[Mapping[str, float] | HavocError]:
        """KL(mixture || base) of each alpha by domain, nats a predicted token; in their order, as `answers` does."""


class Ledger:
    """Results of structures and candidates, from the journal or from a new measurement."""

    def __init__(
        self,
        measurer: Measurer,
        settings: SearchSettings,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the journal, or begin one; that of other settings is a `HavocError`. `clock` counts seconds."""
        self._measurer, self._max_kl = measurer, settings.max_kl
        self._journal = storage.Journal(path)
        plain = dataclasses.asdict(settings)
        opening = {"kind": "search", "settings": storage.sha256_json(plain)}
        if not self._journal.entries:
            self._journal.append({**opening, "plain": plain})
        first = self._journal.entries[0]
        if {name: first.get(name) for name in opening} != opening:
            raise HavocError(
                f"{path} is the journal of a search with other settings; choose another --out or remove it"
            )
        self._known = known_entries(self._journal.entries, path, objectives=COST_OBJECTIVES, domains=settings.domains)
        self._pacer = Pacer(path.parent, clock=clock)

    @property
    def pace(self) -> Pace:
        """How fast the search has been, its earlier runs included."""
        return self._pacer.pace

    def _entry(self, key: str, measure: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a thunk
        if key not in self._known:
            entry = {"key": key, **measure()}
            self._journal.append(entry)
            self._pacer.count(entry["kind"])
            self._known[key] = entry
        return self._known[key]

    def costs(self, structures: Sequence[Structure]) -> Iterator[list[Cost] | str]:
        """Measure structures as often as their noise requires, in their order: the costs of each, or why it has none.

        Values that are not finite or not positive are rejected.
        """
        keys = [
            [f"cost:{storage.sha256_json(one.to_fields())[:16]}:{n}" for n in range(NUM_COST_REPEATS)]
            for one in structures
        ]
        failed = [any("reason" in self._known.get(key, {}) for key in those) for those in keys]
        unknown = [
            structure
            for structure, those, has_failed in zip(structures, keys, failed, strict=True)
            for key in those
            if key not in self._known and not has_failed
        ]
        measured = iter(self._measurer.costs(unknown)) if unknown else iter(())
        for structure, those, has_failed in zip(structures, keys, failed, strict=True):
            known = [key for key in those if key in self._known] if has_failed else those
            entries = [self._entry(key, lambda it=structure: _priced(it, next(measured))) for key in known]
            reason = next((str(entry["reason"]) for entry in entries if "reason" in entry), None)
            yield reason or [Cost(entry["cost"], entry.get("disturbance", "")) for entry in entries]

    def evaluate(
        self, candidates: Sequence[Candidate], *, samples: Sequence[int], origins: Sequence[Origin | None]
    ) -> Iterator[Evaluation]:
        """Measure candidates, in their order; a `HavocError` becomes an infeasible candidate with its reason.

        Each answers all `samples`; the journal records a candidate's origin with its answers.
        """
        structures = list(dict.fromkeys(candidate.structure for candidate in candidates))
        found = zip(structures, self.costs(structures), strict=True)
        costs = {structure: one if isinstance(one, str) else mean_cost(one) for structure, one in found}
        kls = self._kls([candidate.alpha for candidate in candidates])
        given = [self._answered(candidates, costs, sample, origins) for sample in samples]
        earlier = [list(column) for column in given[:-1]]
        for place, last in enumerate(given[-1]):
            candidate = candidates[place]
            parts = [*(column[place] for column in earlier), last]
            cost = costs[candidate.structure]
            kl_to_base = kls[candidate.alpha]
            answers = [part for part in parts if not isinstance(part, str)]
            if isinstance(cost, str):
                yield Evaluation(candidate, {}, {}, cost)
            elif isinstance(kl_to_base, str):
                yield Evaluation(candidate, {}, {}, kl_to_base)
            elif len(answers) < len(parts):
                yield Evaluation(candidate, {}, {}, next(part for part in parts if isinstance(part, str)))
            else:
                yield Evaluation(candidate, joined(answers), cost, kl_to_base=kl_to_base)

    def _kls(self, alphas: Sequence[tuple[float, ...]]) -> dict[tuple[float, ...], Mapping[str, float] | str]:
        """Each alpha's KL divergence from the base by domain, or why it is missing; empty if no limit needs it."""
        if self._max_kl is None:
            return {alpha: {} for alpha in alphas}
        keys = {alpha: f"kl:{storage.sha256_json(alpha)[:16]}" for alpha in alphas}
        unknown = [alpha for alpha, key in keys.items() if key not in self._known]
        measured = iter(self._measurer.divergences(unknown)) if unknown else iter(())
        found: dict[tuple[float, ...], Mapping[str, float] | str] = {}
        for alpha, key in keys.items():
            entry = self._entry(key, lambda alpha=alpha: _diverged(alpha, next(measured)))
            found[alpha] = str(entry["reason"]) if "reason" in entry else entry["kl_to_base"]
        return found

    def _answered(
        self,
        candidates: Sequence[Candidate],
        costs: Mapping[Structure, Mapping[str, float] | str],
        sample: int,
        origins: Sequence[Origin | None],
    ) -> Iterator[Answers | str]:
        """Each candidate's answers to one sample, or why there are none."""
        keys = [f"{candidate.key()}:{sample}" for candidate in candidates]
        unknown = {
            key: candidate
            for key, candidate in zip(keys, candidates, strict=True)
            if key not in self._known and not isinstance(costs[candidate.structure], str)
        }
        answered = iter(self._measurer.answers(list(unknown.values()), sample=sample)) if unknown else iter(())
        for key, candidate, origin in zip(keys, candidates, origins, strict=True):
            cost = costs[candidate.structure]
            if isinstance(cost, str):
                yield cost
                continue
            entry = self._entry(key, lambda it=candidate, origin=origin: _described(it, sample, origin, next(answered)))
            if "reason" in entry:
                yield str(entry["reason"])
            else:
                yield answers_in(entry)


def answers_in(entry: Mapping[str, Any]) -> Answers:
    """Return the answers that an evaluation's line holds: for each domain whether each row is right."""
    return {domain: tuple(mark == "1" for mark in marks) for domain, marks in entry["right"].items()}


def joined(answers: Sequence[Answers]) -> Answers:
    """The rows of one sample, then those of the other."""
    return {domain: tuple(right for part in answers for right in part[domain]) for domain in answers[0]}


def mean_cost(costs: Sequence[Cost]) -> dict[str, float]:
    """Mean of each figure over the repeats."""
    return {metric: sum(cost.values[metric] for cost in costs) / len(costs) for metric in costs[0].values}


def _priced(structure: Structure, outcome: Cost | HavocError) -> dict[str, Any]:
    """Give a cost's entry in the journal."""
    described = {"kind": "cost", "structure": structure.to_fields()}
    if isinstance(outcome, HavocError):
        return {**described, "reason": str(outcome)}
    values = {metric: float(value) for metric, value in outcome.values.items()}
    bad = [metric for metric in COST_OBJECTIVES if not 0 < values.get(metric, 0) < math.inf]
    if bad:
        return {**described, "reason": f"the cost of {structure} has no usable {', '.join(bad)}: {values}"}
    return {**described, "cost": values} | ({"disturbance": outcome.disturbance} if outcome.disturbance else {})


def _diverged(alpha: Sequence[float], outcome: Mapping[str, float] | HavocError) -> dict[str, Any]:
    """Give a divergence's entry in the journal."""
    described = {"kind": "divergence", "alpha": list(alpha)}
    if isinstance(outcome, HavocError):
        return {**described, "reason": str(outcome)}
    if not all(math.isfinite(nats) for nats in outcome.values()):
        return {**described, "reason": f"the KL divergence from the base is not finite: {dict(outcome)}"}
    return {**described, "kl_to_base": {domain: float(nats) for domain, nats in outcome.items()}}


def _described(
    candidate: Candidate, sample: int, origin: Origin | None, outcome: Answers | HavocError
) -> dict[str, Any]:
    """Give an evaluation's entry in the journal."""
    described = {
        "kind": "evaluation",
        "sample": sample,
        "alpha": list(candidate.alpha),
        "structure": candidate.structure.to_fields(),
    } | ({} if origin is None else {"origin": origin.to_json()})
    if isinstance(outcome, HavocError):
        return {**described, "reason": str(outcome)}
    return {**described, "right": {d: "".join("01"[bool(x)] for x in right) for d, right in outcome.items()}}
