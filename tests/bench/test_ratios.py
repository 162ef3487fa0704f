"""Ratios of two records: bounded as often as claimed, equal to published intervals, honest about what would show."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from havoc_core.bench.judge import ratios
from havoc_core.bounds import Bounds, share_bounds

TWO_SIDED = 0.975


def record_of(generator: random.Random, *, level: float, between: float) -> list[list[float]]:
    return [
        [process * generator.gauss(1, 0.01) for _ in range(20)]
        for process in (level * generator.gauss(1, between) for _ in range(5))
    ]


@pytest.mark.parametrize("between", [0.0, 0.01], ids=["alike", "apart"])
def test_the_interval_of_a_ratio_covers_as_often_as_it_claims(between: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A/A, of 100 pairs of equal records: no more than the claimed 5 % prove a change that there is not."""
    monkeypatch.setattr(ratios, "NUM_RESAMPLES", 300)
    generator, num_wrong = random.Random(5), 0
    for _ in range(100):
        old, new = (record_of(generator, level=20.0, between=between) for _ in range(2))
        found = ratios.ratio_bounds(old, new, confidence=TWO_SIDED)
        assert found.low is not None
        assert found.high is not None
        num_wrong += not found.low <= 1 <= found.high
    assert num_wrong <= stats.binom.ppf(0.9999, 100, 0.05)


def test_a_slower_record_lies_above_one() -> None:
    """10 % slower is found, around 1.1 and not around its inverse."""
    generator = random.Random(3)
    old, new = (record_of(generator, level=level, between=0.005) for level in (20.0, 22.0))
    found = ratios.ratio_bounds(old, new, confidence=TWO_SIDED)
    assert 1.05 < found.low <= found.value <= found.high < 1.15


def test_a_single_sample_bounds_nothing() -> None:
    """Without a spread there is a ratio but no interval."""
    assert ratios.ratio_bounds([[10.0]], [[9.0, 9.1]], confidence=TWO_SIDED) == Bounds(pytest.approx(0.905), None, None)


@pytest.mark.parametrize(("num_samples", "percent"), [(30, 1.4), (10, 2.5), (5, 3.5)])
def test_what_would_show_is_the_published_table(num_samples: int, percent: float) -> None:
    """At 2 % variation: 1.4 % from 30 samples, 2.5 % from 10, 3.5 % from 5."""
    error = 0.02 * (2 / num_samples) ** 0.5
    low, high = (1 + sign * 1.96 * error for sign in (-1, 1))
    assert 100 * ratios.detectable_change(low, high, confidence=TWO_SIDED) == pytest.approx(percent, abs=0.15)


def test_shares_agree_with_the_log_interval() -> None:
    """For many rows the ratio's bounds are those of Katz et al. (1978) on the log scale."""
    old, new = (share_bounds(right, 2000, confidence=TWO_SIDED) for right in (1600, 1500))
    low, high = ratios.ratio_of_shares(old, new)
    error = (1 / 1600 - 1 / 2000 + 1 / 1500 - 1 / 2000) ** 0.5
    assert low == pytest.approx(0.9375 * 2.718281828 ** (-1.96 * error), rel=2e-3)
    assert high == pytest.approx(0.9375 * 2.718281828 ** (1.96 * error), rel=2e-3)


@given(st.integers(0, 40), st.integers(0, 40))
def test_shares_of_any_count_have_an_ordered_interval(old_right: int, new_right: int) -> None:
    """None or all right included: the estimate lies between its bounds; after none right, no ratio."""
    old, new = (share_bounds(right, 40, confidence=TWO_SIDED) for right in (old_right, new_right))
    found = ratios.ratio_of_shares(old, new)
    assert (found is None) == (old_right == 0)
    if found is not None:
        assert 0 <= found[0] <= new.value / old.value + 1e-12 <= found[1] + 2e-12
        assert found[0] < found[1]


@pytest.mark.parametrize(("share", "moved"), [(0.9, 0.02), (0.6, 0.1), (0.3, 0.25)])
def test_paired_ratios_cover_the_truth(share: float, moved: float) -> None:
    """Of 2000 pairs of answer sheets with one true ratio, at least 94 % of the 95 % intervals hold it."""
    generator, covered, trials = random.Random(9), 0, 2000
    lost, gained = moved, moved / 2
    true = (share * (1 - lost) + (1 - share) * gained) / share
    for _ in range(trials):
        old = [generator.random() < share for _ in range(200)]
        new = [generator.random() >= lost if was else generator.random() < gained for was in old]
        low, high = ratios.ratio_of_paired_shares(old, new, confidence=0.975) or (0.0, 9e9)
        covered += low <= true <= high
    assert covered >= 0.94 * trials


def test_equal_answers_leave_room_and_none_right_no_ratio() -> None:
    """The same rows right twice is near 1 but no point; where nothing was right there is no ratio."""
    same = [place % 3 > 0 for place in range(300)]
    low, high = ratios.ratio_of_paired_shares(same, same, confidence=0.975) or (0.0, 0.0)
    assert 0.95 < low < 1 < high < 1.05
    assert ratios.ratio_of_paired_shares([False] * 9, [False] * 9, confidence=0.975) is None
    assert ratios.ratio_of_paired_shares([False] * 9, [True] * 9, confidence=0.975) is None
