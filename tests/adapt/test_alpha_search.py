"""The cross-entropy search finds a planted alpha, sooner than chance does, and the same one for the same seed."""

from __future__ import annotations

import math
import random

import pytest

from havoc_core.adapt.alpha_search import Alpha, CrossEntropySettings, Fitness, cross_entropy_search
from havoc_core.errors import HavocError

PLANTED = (0.83, 0.12, 0.41, 0.67)
SEEDS = range(12)


def rounded_share(alpha: Alpha) -> Fitness:
    """As few examples see it: a share that few points tell apart, and a likelihood that breaks its ties."""
    distance = math.dist(alpha, PLANTED)
    return math.floor(5 * max(0.0, 1 - distance)) / 5, -distance


def test_the_planted_alpha_is_found() -> None:
    """Within 0.1 in every weight, for every seed, at the default budget."""
    for seed in SEEDS:
        found = cross_entropy_search(rounded_share, num_experts=4, settings=CrossEntropySettings(seed=seed))
        assert max(abs(ours - planted) for ours, planted in zip(found.alpha, PLANTED, strict=True)) < 0.1
        assert found.fitness == rounded_share(found.alpha)


def test_it_beats_random_search_of_the_same_budget() -> None:
    """For every seed the same number of evenly drawn points has no better one, and on average one 5 times as far."""
    ours, theirs = [], []
    for seed in SEEDS:
        found = cross_entropy_search(rounded_share, num_experts=4, settings=CrossEntropySettings(seed=seed))
        rng = random.Random(seed)
        drawn = [tuple(rng.random() for _ in PLANTED) for _ in range(found.num_asked)]
        ours.append(math.dist(found.alpha, PLANTED))
        theirs.append(min(math.dist(point, PLANTED) for point in drawn))
    assert all(a < b for a, b in zip(ours, theirs, strict=True))
    assert sum(theirs) > 5 * sum(ours)


def test_a_seed_is_a_search() -> None:
    """The same seed asks the same points in the same order; another seed asks others."""

    def points(seed: int) -> list[Alpha]:
        seen: list[Alpha] = []

        def fitness(alpha: Alpha) -> Fitness:
            seen.append(alpha)
            return rounded_share(alpha)

        cross_entropy_search(fitness, num_experts=4, settings=CrossEntropySettings(seed=seed, generations=3))
        return seen

    assert points(1) == points(1) != points(2)


def test_no_point_is_asked_twice_and_none_lies_outside() -> None:
    """Points that are cut at the bounds come again and again; each costs one evaluation."""
    seen: list[Alpha] = []

    def corner(alpha: Alpha) -> Fitness:
        seen.append(alpha)
        return alpha[0], -alpha[1]

    found = cross_entropy_search(corner, num_experts=2, settings=CrossEntropySettings())
    assert found.alpha == (1.0, 0.0)
    assert len(seen) == len(set(seen)) == found.num_asked
    assert all(0 <= weight <= 1 for alpha in seen for weight in alpha)


def test_it_is_never_worse_than_the_base_or_an_expert_alone() -> None:
    """Whatever the fitness, the result is at least the best of those on the rows that were asked."""
    alone = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    for seed in SEEDS:
        worth = {alpha: random.Random(f"{seed} {alpha}").random() for alpha in alone}

        def only_these(alpha: Alpha, worth: dict[Alpha, float] = worth) -> Fitness:
            return worth.get(alpha, 0.0), 0.0

        found = cross_entropy_search(only_these, num_experts=3, settings=CrossEntropySettings(seed=seed, generations=2))
        assert found.fitness[0] == max(worth.values())


def test_ties_go_by_the_second_number() -> None:
    """All points have the same share: the likelihood decides."""
    found = cross_entropy_search(
        lambda alpha: (0.6, -abs(alpha[0] - 0.3)), num_experts=1, settings=CrossEntropySettings()
    )
    assert abs(found.alpha[0] - 0.3) < 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 1}, "population 1"),
        ({"generations": 0}, "generations 0"),
        ({"elite_share": 0.0}, "an elite share of 0"),
        ({"low": 1.0, "high": 1.0}, "alpha from 1 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, words: str) -> None:
    """With the numbers, in one line."""
    with pytest.raises(HavocError, match=words):
        CrossEntropySettings(**changes)
