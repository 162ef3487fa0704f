"""How NSGA-II makes candidates: the first generation, and the breeding of each next one.

    seeded   obvious candidates: all experts at 1 in each structure, all at .75, each expert alone, all at .5, seed
             003's mixture; as many as fit into the generation
    random   uniform inside the bounds, for the rest of the generation
    bred     two parents by binary tournament on rank and crowding; simulated binary crossover and polynomial mutation
             of alpha, uniform crossover and random mutation of the structure

Alpha is kept on a grid, so that two candidates always differ visibly, and no candidate is bred twice.

NSGA-II: Deb et al., 2002; `pymoo` by ask and tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.mixed import MixedVariableMating, MixedVariableSampling
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.variable import Choice, Real
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.problems.static import StaticProblem

from ..model.structure import Structure
from .candidate import COST_OBJECTIVES, Candidate, Origin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .candidate import SearchSettings

_ALPHA_STEP: Final = 0.05
_NORMALIZED_DIGITS: Final = 4
_HIGH_LEVEL, _LOW_LEVEL = 0.75, 0.5
_SEED_MIXTURE: Final = (1.2, 0.8, 1.5, 0.9)
_DRAWS: Final = 20
"""Random points drawn for each that is missing, so that equal ones can be passed over."""
_STRUCTURE: Final = "weight_format"

Point = dict[str, Any]
"""A candidate as `pymoo` holds it: a weight for each domain, and the structure's name."""


class Breeder:
    """Generations of candidates; `ask` for one, evaluate it, `tell` its objectives and violations, in its order."""

    def __init__(self, settings: SearchSettings) -> None:
        """Prepare the first generation."""
        self._settings = settings
        self._problem = _problem(settings)
        self._known = _Known()
        first, self._first_origins = _first_points(self._problem, settings)
        self._algorithm: Any = NSGA2(
            pop_size=settings.population,
            sampling=Population.new(X=np.array(first, dtype=object)),
            mating=_Mating(settings, self._known),
            eliminate_duplicates=None,
        )
        self._algorithm.setup(
            self._problem, termination=("n_gen", settings.generations), seed=settings.seed, verbose=False
        )
        self.num_generations = 0

    def generations(self) -> Iterator[list[tuple[Candidate, Origin]]]:
        """Each generation's new candidates with their origins; `tell` comes before the next."""
        while self._algorithm.has_next():
            self._population = self._algorithm.ask()
            if self._population is None or len(self._population) == 0:
                return  # nothing new is left to breed
            self._known.add(self._population)
            yield [self._described(place, one) for place, one in enumerate(self._population)]
            self.num_generations += 1

    def tell(self, objectives: Sequence[Sequence[float]], violations: Sequence[Sequence[float]]) -> None:
        """Give the objectives [N, 4], all to be minimised, and how far each limit is missed, of the last generation."""
        evaluated = StaticProblem(
            self._problem, F=np.array(objectives, dtype=float), G=np.array(violations, dtype=float)
        )
        Evaluator().eval(evaluated, self._population)
        self._algorithm.tell(infills=self._population)

    def _described(self, place: int, one: Any) -> tuple[Candidate, Origin]:  # noqa: ANN401 - pymoo has no types
        candidate = candidate_at(one.X, self._settings)
        if self.num_generations == 0:
            return candidate, self._first_origins[place]
        parents = tuple(candidate_at(parent, self._settings).key() for parent in one.get("parents"))
        origin = Origin(
            kind="bred", generation=self.num_generations, parents=parents, is_repaired=bool(one.get("is_repaired"))
        )
        return candidate, origin


def candidate_at(point: Mapping[str, Any], settings: SearchSettings) -> Candidate:
    """Return the candidate of a point."""
    alpha = tuple(float(point[domain]) for domain in settings.domains)
    return Candidate(alpha, Structure.named(point[_STRUCTURE], settings.activation_dtype))


def repaired(point: Mapping[str, Any], settings: SearchSettings) -> tuple[Point, bool]:
    """Move a point into the bounds, to a sum of 1 if required, and onto the grid; say whether it was moved.

    Rounding to the grid does not count as a move.
    """
    low, high = settings.alpha_bounds
    before = [float(point[domain]) for domain in settings.domains]
    alpha = [min(max(weight, low), high) for weight in before]
    if settings.normalize_alpha:
        total = sum(alpha)
        alpha = [weight / total if total > 0 else 1 / len(alpha) for weight in alpha]
    is_moved = any(abs(a - b) > _ALPHA_STEP / 2 for a, b in zip(alpha, before, strict=True))
    if settings.normalize_alpha:
        alpha = [round(weight, _NORMALIZED_DIGITS) for weight in alpha]
    else:
        alpha = [min(max(_on_grid(weight), low), high) for weight in alpha]
    return {**dict(zip(settings.domains, alpha, strict=True)), _STRUCTURE: point[_STRUCTURE]}, is_moved


def _on_grid(weight: float) -> float:
    return round(round(weight / _ALPHA_STEP) * _ALPHA_STEP, 2)


def _problem(settings: SearchSettings) -> Any:  # noqa: ANN401 - pymoo has no types
    variables: dict[str, Any] = {domain: Real(bounds=settings.alpha_bounds) for domain in settings.domains}
    variables[_STRUCTURE] = Choice(options=list(settings.weight_formats))
    return Problem(vars=variables, n_obj=len(COST_OBJECTIVES) + 1, n_ieq_constr=len(settings.limits) + 1)


def _first_points(
    problem: Any,  # noqa: ANN401 - pymoo has no types
    settings: SearchSettings,
) -> tuple[list[Point], list[Origin]]:
    """Return the first generation: the seeded points that differ, then random ones."""
    known = _Known()
    points: list[Point] = []
    origins: list[Origin] = []
    for label, alpha, name in _seeds(settings):
        point, is_moved = repaired({**dict(zip(settings.domains, alpha, strict=True)), _STRUCTURE: name}, settings)
        if len(points) < settings.population and known.is_new(point):
            points.append(point)
            origins.append(Origin(kind="seeded", generation=0, label=label, is_repaired=is_moved))
    num_random = settings.population - len(points)
    random_state = np.random.default_rng(settings.seed)
    num_drawn = _DRAWS * num_random
    drawn = MixedVariableSampling()(problem, num_drawn, random_state=random_state).get("X") if num_random else []
    for place, one in enumerate(drawn):
        point, is_moved = repaired(one, settings)
        is_last_chance = len(drawn) - place <= settings.population - len(points)
        if len(points) < settings.population and (known.is_new(point) or is_last_chance):
            points.append(point)
            origins.append(Origin(kind="random", generation=0, is_repaired=is_moved))
    return points, origins


def _seeds(settings: SearchSettings) -> Iterator[tuple[str, tuple[float, ...], str]]:
    """Name, alpha and structure of the points a person would try, the most telling first."""
    domains, first = settings.domains, settings.weight_formats[0]
    size = len(domains)
    for name in settings.weight_formats:
        yield f"all experts at 1 in {name}", (1.0,) * size, name
    yield f"all experts at {_HIGH_LEVEL}", (_HIGH_LEVEL,) * size, first
    if size > 1:
        for position, domain in enumerate(domains):
            yield f"{domain} alone", tuple(float(position == other) for other in range(size)), first
    yield f"all experts at {_LOW_LEVEL}", (_LOW_LEVEL,) * size, first
    if size == len(_SEED_MIXTURE):
        yield "the mixture that seed 003 names", _SEED_MIXTURE, first


class _Known(DuplicateElimination):  # type: ignore[misc]  # pymoo has no types
    """Removes from a population every point that was a candidate in an earlier generation."""

    def __init__(self) -> None:
        super().__init__()
        self._points: set[tuple[Any, ...]] = set()

    def is_new(self, point: Point) -> bool:
        """Whether the point was met for the first time; then it is known from now on."""
        place = tuple(sorted(point.items()))
        if place in self._points:
            return False
        self._points.add(place)
        return True

    def add(self, population: Population) -> None:
        """Remember the points of a population."""
        for point in population.get("X"):
            self.is_new(point)

    def do(self, pop: Population, *others: Population, to_itself: bool = True) -> Population:
        """Return those of `pop` that no population before, nor `others`, nor an earlier place of `pop` holds."""
        met = {tuple(sorted(point.items())) for other in others if len(other) for point in other.get("X")}
        places = []
        for place, point in enumerate(pop.get("X")):
            key = tuple(sorted(point.items()))
            if key not in met and key not in self._points:
                places.append(place)
                met |= {key} if to_itself else set()
        return pop[places]


class _Mating(MixedVariableMating):  # type: ignore[misc]  # pymoo has no types
    """`pymoo`'s crossover and mutation of mixed variables, after NSGA-II's own selection, with parents remembered."""

    def __init__(self, settings: SearchSettings, known: _Known) -> None:
        selection = TournamentSelection(func_comp=binary_tournament)  # MixedVariableMating's own takes any at random
        super().__init__(selection=selection, eliminate_duplicates=known)
        self._settings = settings

    def _do(
        self,
        problem: Any,  # noqa: ANN401 - pymoo has no types
        pop: Population,
        n_offsprings: int,
        parents: bool = False,
        random_state: Any = None,  # noqa: ANN401 - pymoo has no types
        **kwargs: Any,  # noqa: ANN401 - pymoo has no types
    ) -> Population:
        pairs = pop
        if not parents:
            num_pairs = -(-n_offsprings // 2)
            pairs = self.selection(problem, pop, num_pairs, 2, random_state=random_state, **kwargs)
        children = super()._do(problem, pairs, n_offsprings, parents=True, random_state=random_state, **kwargs)
        for place, child in enumerate(children):
            child.X, is_moved = repaired(child.X, self._settings)
            child.set("is_repaired", is_moved)
            child.set("parents", [parent.X for parent in pairs[place % len(pairs)]])
        return children
