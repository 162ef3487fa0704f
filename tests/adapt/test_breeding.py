"""NSGA-II earns its name: it beats chance, and each of its parts does what it is there for."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pymoo.indicators.hv import HV
from pymoo.operators.selection.rnd import RandomSelection
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from scipy.stats import binomtest

from havoc_core.adapt import breeding
from havoc_core.adapt.breeding import Breeder, repaired
from havoc_core.adapt.candidate import Candidate, Origin, SearchSettings
from havoc_core.errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Callable

BEST = {"math": 1.35, "code": 0.3, "reasoning": 0.85, "vision": 1.7}
COST = {"fp32": 1.0, "int8": 0.6, "int4": 0.5}
LOSS = {"fp32": 0.0, "int8": 0.02, "int4": 0.2}
SETTINGS = SearchSettings(
    domains=tuple(BEST),
    seed=0,
    population=12,
    generations=12,
    weight_formats=tuple(COST),
    alpha_bounds=(0.0, 2.0),
    normalize_alpha=False,
    num_repeats=1,
)
SEEDED = [dataclasses.replace(SETTINGS, seed=seed) for seed in range(30)]

Described = list[tuple[Candidate, Origin]]


def points_of(candidate: Candidate) -> list[float]:
    """Cost and, negated, accuracy: the front is BEST in each of the three formats."""
    distances = [abs(weight - best) for weight, best in zip(candidate.alpha, BEST.values(), strict=True)]
    accuracy = 1 - statistics.fmean(distances) / 2 - LOSS[candidate.structure.weight_format]
    return [COST[candidate.structure.weight_format], 0.0, 0.0, -accuracy]


def evolved(settings: SearchSettings) -> list[Described]:
    """Every generation of a search on the known landscape."""
    breeder = Breeder(settings)
    course = []
    for generation in breeder.generations():
        course.append(generation)
        breeder.tell([points_of(candidate) for candidate, _ in generation], [[0.0]] * len(generation))
    return course


def at_random(settings: SearchSettings, num_candidates: int) -> list[Candidate]:
    """As many points, uniform on the same grid."""
    draw = np.random.default_rng(settings.seed)
    names = settings.weight_formats
    drawn = [
        {**dict(zip(BEST, draw.uniform(0, 2, 4), strict=True)), "weight_format": draw.choice(names)}
        for _ in range(num_candidates)
    ]
    return [breeding.candidate_at(repaired(point, settings)[0], settings) for point in drawn]


def hypervolume(candidates: list[Candidate]) -> float:
    points = np.array([points_of(candidate) for candidate in candidates])[:, [0, 3]]
    return float(HV(ref_point=np.array([1.1, 0.0]))(points))


def all_of(course: list[Described]) -> list[Candidate]:
    return [candidate for generation in course for candidate, _ in generation]


@pytest.fixture(scope="module")
def courses() -> list[list[Described]]:
    return [evolved(settings) for settings in SEEDED]


def is_better(ours: list[float], theirs: list[float]) -> bool:
    """Whether ours wins more often than chance would, one-sided at 1 % (sign test)."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    return binomtest(sum(a > b for a, b in pairs), len(pairs), alternative="greater").pvalue < 0.01


def test_the_search_beats_random_points_of_equal_number(courses: list[list[Described]]) -> None:
    """Hypervolume over 30 seeds, against as many candidates drawn at random."""
    ours = [hypervolume(all_of(course)) for course in courses]
    theirs = [
        hypervolume(at_random(settings, len(all_of(course)))) for settings, course in zip(SEEDED, courses, strict=True)
    ]
    assert is_better(ours, theirs)


def without_crossover(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pymoo.operators.crossover.sbx.SBX._do", lambda self, problem, X, **_: X)
    patch.setattr("pymoo.operators.crossover.ux.UX._do", lambda self, problem, X, **_: X)


def without_mutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pymoo.operators.mutation.pm.PM._do", lambda self, problem, X, **_: X)
    patch.setattr("pymoo.operators.mutation.rm.ChoiceRandomMutation._do", lambda self, problem, X, **_: X)


def without_survival(patch: pytest.MonkeyPatch) -> None:
    ranked = RankAndCrowding._do

    def any_of_them(
        self: Any, problem: Any, pop: Any, *args: Any, n_survive: int, random_state: Any, **more: Any
    ) -> Any:
        everybody = ranked(self, problem, pop, *args, n_survive=len(pop), random_state=random_state, **more)
        return everybody[random_state.permutation(len(everybody))[:n_survive]]

    patch.setattr(RankAndCrowding, "_do", any_of_them)


@pytest.mark.parametrize("part", [without_crossover, without_mutation, without_survival])
def test_each_part_is_worth_its_place(
    part: Callable[[pytest.MonkeyPatch], None], courses: list[list[Described]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crossover, mutation or survival left to chance ends with less over 30 seeds."""
    ours = [hypervolume(all_of(course)) for course in courses]
    part(monkeypatch)
    assert is_better(ours, [hypervolume(all_of(course)) for course in map(evolved, SEEDED)])


def share_of_good_parents(course: list[Described]) -> float:
    """Share of parents that no candidate of an earlier generation dominates."""
    known: dict[str, list[float]] = {}
    marks = []
    for generation in course:
        for _, origin in generation:
            for parent in (known[key] for key in origin.parents):
                marks.append(not any(other[0] <= parent[0] and other[3] < parent[3] for other in known.values()))
        known |= {candidate.key(): points_of(candidate) for candidate, _ in generation}
    return statistics.fmean(marks)


def test_parents_are_chosen_by_tournament(courses: list[list[Described]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The better of two becomes a parent; `pymoo`'s mating of mixed variables by itself takes any."""
    ours = [share_of_good_parents(course) for course in courses]
    monkeypatch.setattr(breeding, "TournamentSelection", lambda **_: RandomSelection())
    assert is_better(ours, [share_of_good_parents(course) for course in map(evolved, SEEDED)])


def test_every_candidate_says_where_it_came_from(courses: list[list[Described]]) -> None:
    """Seeded, random or bred; its generation; and parents that were candidates of an earlier one."""
    for course in courses:
        earlier: set[str] = set()
        for number, generation in enumerate(course):
            kinds = {origin.kind for _, origin in generation}
            assert kinds <= ({"seeded", "random"} if number == 0 else {"bred"})
            assert all(origin.generation == number for _, origin in generation)
            parents = {parent for _, origin in generation for parent in origin.parents}
            assert parents <= earlier
            assert bool(parents) == (number > 0)
            earlier |= {candidate.key() for candidate, _ in generation}


def test_no_candidate_is_bred_twice(courses: list[list[Described]]) -> None:
    """Each costs a scoring, so each is new; and the budget is used up."""
    for course in courses:
        keys = [candidate.key() for candidate in all_of(course)]
        assert len(set(keys)) == len(keys) == SETTINGS.population * SETTINGS.generations


def test_the_seeds_hold_each_expert_alone_and_all_together() -> None:
    """What a person would try first is in the first generation, by name."""
    first = next(Breeder(SETTINGS).generations())
    found = {(origin.label, candidate.alpha) for candidate, origin in first if origin.kind == "seeded"}
    assert ("code alone", (0.0, 1.0, 0.0, 0.0)) in found
    assert ("all experts at 1 in int8", (1.0, 1.0, 1.0, 1.0)) in found
    assert ("the mixture that seed 003 names", (1.2, 0.8, 1.5, 0.9)) in found


@pytest.mark.parametrize(
    ("bounds", "is_normalized"), [((0.0, 1.0), False), ((0.0, 1.0), True), ((0.5, 0.9), False), ((-1.0, 1.0), False)]
)
def test_alpha_keeps_its_bounds_and_its_sum(bounds: tuple[float, float], *, is_normalized: bool) -> None:
    """In every generation, the first included; what had to be moved says so."""
    settings = dataclasses.replace(SETTINGS, alpha_bounds=bounds, normalize_alpha=is_normalized, generations=4)
    course = evolved(settings)
    for candidate in all_of(course):
        assert all(bounds[0] <= weight <= bounds[1] for weight in candidate.alpha)
        assert not is_normalized or sum(candidate.alpha) == pytest.approx(1, abs=2e-4)
    seeds = {origin.label: origin.is_repaired for _, origin in course[0]}
    assert seeds["the mixture that seed 003 names"]


@pytest.mark.parametrize(
    ("bounds", "is_normalized"), [((1.0, 1.0), False), ((0.0, 99.0), False), ((-1.0, 1.0), True), ((0.0, 0.5), True)]
)
def test_bounds_that_leave_nothing_are_refused(bounds: tuple[float, float], *, is_normalized: bool) -> None:
    """With the numbers."""
    with pytest.raises(HavocError, match=r"alpha_bounds \["):
        dataclasses.replace(SETTINGS, alpha_bounds=bounds, normalize_alpha=is_normalized)


def test_a_space_that_is_used_up_ends_the_search() -> None:
    """Fewer candidates exist than were asked for: all of them are met once, and the generations end."""
    settings = dataclasses.replace(
        SETTINGS, domains=("math",), population=8, generations=9, weight_formats=("fp32",), alpha_bounds=(0.0, 0.5)
    )
    breeder = Breeder(settings)
    keys = []
    for generation in breeder.generations():
        keys += [candidate.key() for candidate, _ in generation]
        breeder.tell([[1.0, 0, 0, -candidate.alpha[0]] for candidate, _ in generation], [[0.0]] * len(generation))
    assert len(set(keys)) == len(keys) <= 11
