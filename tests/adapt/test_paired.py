"""The paired margin: its formula, its symmetry, and that its interval covers the truth as often as it says."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from havoc_core.adapt.paired import paired_margin, paired_over_seeds

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30)


def answers(tasks: dict[str, list[tuple[bool, bool]]], side: int) -> dict[str, tuple[bool, ...]]:
    return {task: tuple(pair[side] for pair in pairs) for task, pairs in tasks.items()}


@given(tasks=st.dictionaries(st.sampled_from(["math", "code", "vision"]), PAIRS, min_size=1))
def test_it_is_the_mean_of_the_tasks_mean_differences(tasks: dict[str, list[tuple[bool, bool]]]) -> None:
    """Against NumPy over the rows and half a row of each outcome: each task weighs the same."""
    found = paired_margin(answers(tasks, 0), answers(tasks, 1))
    differences = [np.array([int(a) - int(b) for a, b in pairs]) for pairs in tasks.values()]
    margin = np.mean([part.mean() for part in differences])
    padded = [(np.append(part, (1, -1, 0, 0)), np.append(np.ones(len(part)), (0.5,) * 4)) for part in differences]
    centre = np.mean([np.average(part, weights=weights) for part, weights in padded])
    variances = [np.cov(part, aweights=weights, bias=True) / weights.sum() for part, weights in padded]
    reach = stats.t.ppf(0.975, min(map(len, differences)) - 1) * math.sqrt(sum(variances)) / len(variances)
    assert found["margin"] == pytest.approx(margin, abs=1e-12)
    assert found["low"] == pytest.approx(max(centre - reach, -1), abs=1e-6)
    assert found["high"] == pytest.approx(min(centre + reach, 1), abs=1e-6)
    assert found["is_proven"] == (found["low"] > 0)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 200])
def test_answers_that_agree_leave_an_interval(num_rows: int) -> None:
    """Models that answer alike differ by nothing here, which does not prove that they differ by nothing."""
    alike = {"math": (True,) * num_rows}
    found = paired_margin(alike, alike)
    assert found["margin"] == 0
    assert -found["low"] == found["high"] > 0.5 / num_rows


def test_few_rows_prove_nothing() -> None:
    """Four rows of four won are what a coin gives in one of 16 throws."""
    for num_rows in (1, 2, 3, 4):
        won = paired_margin({"math": (True,) * num_rows}, {"math": (False,) * num_rows})
        assert (won["margin"], won["is_proven"]) == (1, False)
    assert paired_margin({"math": (True,) * 8}, {"math": (False,) * 8})["is_proven"]


@given(tasks=st.dictionaries(st.sampled_from(["math", "code"]), PAIRS, min_size=1))
def test_changing_sides_changes_the_sign(tasks: dict[str, list[tuple[bool, bool]]]) -> None:
    """Ours against theirs is theirs against ours, negated."""
    there = paired_margin(answers(tasks, 0), answers(tasks, 1))
    back = paired_margin(answers(tasks, 1), answers(tasks, 0))
    assert back["margin"] == pytest.approx(-there["margin"])
    assert (back["low"], back["high"]) == pytest.approx((-there["high"], -there["low"]))


def test_the_interval_covers_the_truth() -> None:
    """Two models that agree on most rows, 3 points apart: covered in 93 to 97 % of 2,000 samples of 400 rows."""
    rng = random.Random(3)
    num_covered = num_proven = 0
    for _ in range(2000):
        kinds = rng.choices([(1, 1), (1, 0), (0, 1), (0, 0)], weights=[70, 8, 5, 17], k=400)
        found = paired_margin({"math": [bool(a) for a, _ in kinds]}, {"math": [bool(b) for _, b in kinds]})
        num_covered += found["low"] <= 0.03 <= found["high"]
        num_proven += found["is_proven"]
    assert 0.93 < num_covered / 2000 < 0.97
    assert 0.2 < num_proven / 2000 < 0.8  # neither always nor never


@given(pairs=st.one_of(PAIRS, st.lists(st.tuples(st.booleans(), st.booleans()), min_size=31, max_size=60)))
def test_one_seed_is_a_paired_margin(pairs: list[tuple[bool, bool]]) -> None:
    """Nothing is known of other seeds, so the interval is that of the rows."""
    ours, theirs = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    found, known = paired_over_seeds([ours], [theirs]), paired_margin({"math": ours}, {"math": theirs})
    assert [found[name] for name in ("margin", "low", "high")] == pytest.approx(
        [known[name] for name in ("margin", "low", "high")], abs=1e-9
    )


def test_seeds_that_scatter_widen_the_interval() -> None:
    """One seed of three that learned nothing leaves nothing proven, however many rows there are."""
    base, learned = (False,) * 500, (True,) * 150 + (False,) * 350
    alike = paired_over_seeds([learned] * 3, [base] * 3)
    apart = paired_over_seeds([learned, learned, base], [base] * 3)
    assert alike["low"] > 0.25
    assert apart["margin"] == pytest.approx(0.2)
    assert apart["low"] < 0 < apart["high"]
    assert apart["by_seed"] == pytest.approx([0.3, 0.3, 0.0])


def test_seeds_that_agree_leave_an_interval() -> None:
    """Three runs that answer as the base does differ by nothing here, which does not prove that others would."""
    found = paired_over_seeds([(True, False) * 20] * 3, [(True, False) * 20] * 3)
    assert found["margin"] == 0
    assert -found["low"] == found["high"] > 0


@pytest.mark.parametrize("scatter", [0.0, 0.05])
def test_the_interval_covers_other_rows_and_other_seeds(scatter: float) -> None:
    """Three seeds whose gains scatter around 5 points, on 100 rows: at least 93 % of 400 intervals hold 5 points."""
    rng = random.Random(5)
    num_covered = 0
    for _ in range(400):
        base = [rng.random() < 0.6 for _ in range(100)]
        runs = []
        for _ in range(3):
            gain = rng.uniform(0.05 - scatter, 0.05 + scatter)
            runs.append([right or rng.random() < gain / 0.4 for right in base])
        found = paired_over_seeds(runs, [base] * 3)
        num_covered += found["low"] <= 0.05 <= found["high"]
    assert num_covered >= 372
