"""Statistics: the published figures, the promised coverage, and no bound that bad news can improve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.bench.statistics import (
    Bounds,
    lower_rank,
    minimal_detectable_effect,
    num_outliers,
    num_right_needed,
    num_samples_needed,
    quantile_bounds,
    rate_bounds,
    ratio_bounds,
    share_bounds,
    upper_rank,
    variation,
)
from havoc_core.errors import HavocError

_durations = st.floats(min_value=1.0, max_value=200.0)


@pytest.mark.parametrize(
    ("num_samples", "rank"), [(50, 49), (100, 96), (200, 188), (300, 279), (500, 462), (1000, 916)]
)
def test_published_ranks(num_samples: int, rank: int) -> None:
    """The 95 % ranks for p90 are those every table gives."""
    assert upper_rank(num_samples, quantile=0.9) == rank


def test_too_few_samples_prove_nothing() -> None:
    """28 samples cannot bound p90 from above, 29 can; the smallest sample bounds it from below at once."""
    assert upper_rank(28, quantile=0.9) is None
    assert upper_rank(29, quantile=0.9) == 29
    assert lower_rank(1, quantile=0.9) is None
    assert lower_rank(2, quantile=0.9) == 1
    assert upper_rank(0, quantile=0.9) is None


@pytest.mark.parametrize(
    ("quantile", "num_over", "num_samples"),
    [(0.9, 0, 29), (0.95, 0, 59), (0.99, 0, 299), (0.9, 1, 46), (0.95, 1, 93), (0.99, 1, 473)],
)
def test_published_sample_counts(quantile: float, num_over: int, num_samples: int) -> None:
    """The fewest samples agree with MLPerf's early-stopping table at 95 %."""
    assert num_samples_needed(quantile=quantile, num_over=num_over) == num_samples


@pytest.mark.parametrize(
    ("num_rows", "num_right"), [(100, 92), (200, 179), (250, 223), (500, 439), (1000, 869), (2000, 1727)]
)
def test_published_shares(num_rows: int, num_right: int) -> None:
    """869 of 1000 prove 85 %, 868 do not, and so on; the planning function says the same as the bound."""
    assert share_bounds(num_right, num_rows).low > 0.85
    assert share_bounds(num_right - 1, num_rows).low <= 0.85
    assert num_right_needed(num_rows, share=0.85) == num_right


@pytest.mark.parametrize(("num_rows", "num_right"), [(100, 78), (200, 161), (500, 411), (1000, 830)])
def test_published_misses(num_rows: int, num_right: int) -> None:
    """830 of 1000 prove that 85 % was missed, 831 do not."""
    assert share_bounds(num_right, num_rows).high < 0.85
    assert share_bounds(num_right + 1, num_rows).high >= 0.85


def test_share_edges() -> None:
    """None right and all right have their exact one-sided bounds; impossible counts are refused."""
    assert share_bounds(0, 10) == Bounds(value=0.0, low=0.0, high=pytest.approx(1 - 0.05**0.1), num_samples=10)
    assert share_bounds(10, 10).low == pytest.approx(0.05**0.1)
    assert num_right_needed(18, share=0.85) is None
    assert num_right_needed(19, share=0.85) == 19
    assert share_bounds(869, 1000).value == 0.869
    for num_right, num_rows in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(HavocError, match="is no share"):
            share_bounds(num_right, num_rows)


@settings(max_examples=200, deadline=None)
@given(samples=st.lists(_durations, min_size=1, max_size=120), slower=st.lists(_durations, min_size=1, max_size=60))
def test_slower_samples_never_help_a_quantile(samples: list[float], slower: list[float]) -> None:
    """With samples over the limit added, nothing that did not pass passes."""
    limit = float(np.median(samples))
    before = quantile_bounds(samples, quantile=0.9)
    after = quantile_bounds([*samples, *(limit + value for value in slower)], quantile=0.9)
    if before.high is None or before.high >= limit:
        assert after.high is None or after.high >= limit
    if before.low is not None and before.low >= limit:
        assert after.low is not None
        assert after.low >= limit


@settings(max_examples=60, deadline=None)
@given(
    processes=st.lists(st.lists(_durations, min_size=1, max_size=5), min_size=1, max_size=5),
    factor=st.floats(min_value=1.0, max_value=50.0),
)
def test_slower_episodes_never_turn_a_miss_into_a_hit(processes: list[list[float]], factor: float) -> None:
    """A rate proven below a limit stays not proven above it when a slower episode joins."""
    episodes = [[(127.0, seconds) for seconds in process] for process in processes]
    before = rate_bounds(episodes, num_resamples=200)
    if before.high is None:
        return
    slower = (127.0, 127.0 / before.value * factor)
    after = rate_bounds([[*episodes[0], slower], *episodes[1:]], num_resamples=200)
    assert after.low is not None
    assert after.low <= before.high * (1 + 1e-12)


def test_quantile_coverage() -> None:
    """Over 600 simulated runs of a skewed latency, the one-sided 95 % bounds hold at least 93 % of the time."""
    rng = np.random.default_rng(1)
    true_p90 = float(np.exp(0.3 * 1.2815515655446004))
    bounds = [quantile_bounds(rng.lognormal(0.0, 0.3, size=150).tolist(), quantile=0.9) for _ in range(600)]
    assert np.mean([b.high is not None and b.high >= true_p90 for b in bounds]) > 0.93
    assert np.mean([b.low is not None and b.low <= true_p90 for b in bounds]) > 0.93


def test_rate_coverage() -> None:
    """With 5 processes that differ by 2 %, the bootstrap's one-sided bounds hold at least 88 % of the time.

    Five processes say little about their spread; the bound is honest about most of it, and the gate asks for the worst
    process besides.
    """
    rng = np.random.default_rng(2)
    held = []
    for _ in range(300):
        speed = 60.0 * (1 + 0.02 * rng.standard_normal(5))
        episodes = [[(127.0, 127.0 / (s * (1 + 0.01 * rng.standard_normal()))) for _ in range(6)] for s in speed]
        bounds = rate_bounds(episodes, num_resamples=500)
        held.append((bounds.low <= 60.0, bounds.high >= 60.0))
    assert np.mean([low for low, _ in held]) > 0.88
    assert np.mean([high for _, high in held]) > 0.88


def test_rate_is_total_over_total() -> None:
    """A rate is tokens over time in all, not a mean of rates; one episode alone bounds nothing."""
    bounds = rate_bounds([[(100.0, 1.0), (100.0, 3.0)]])
    assert bounds.value == 50.0
    assert bounds.low is not None
    assert bounds.low <= 50.0
    assert rate_bounds([[(100.0, 2.0)]]) == Bounds(value=50.0, low=None, high=None, num_samples=1)


def test_rate_bounds_show_every_spread() -> None:
    """Spread within a process, between processes, and processes of unequal length all widen the bounds as they must."""
    within = rate_bounds([[(1.0, 1.0), (1.0, 3.0)]])
    assert (within.low, within.high) == (pytest.approx(1 / 3), 1.0)
    between = rate_bounds([[(1.0, 1.0)] * 3, [(1.0, 2.0)] * 3, [(1.0, 4.0)] * 3])
    assert (between.low, between.high) == (0.25, 1.0)
    ragged = rate_bounds([[(1.0, 2.0)], [(1.0, 2.0)] * 7, [(2.0, 4.0)] * 2])
    assert (ragged.low, ragged.value, ragged.high, ragged.num_samples) == (0.5, 0.5, 0.5, 10)


@pytest.mark.parametrize("episodes", [[], [[]], [[(1.0, 1.0)], []], [[(0.0, 1.0)]], [[(1.0, 0.0)]], [[(1.0, -1.0)]]])
def test_rate_of_nothing_is_refused(episodes: list[list[tuple[float, float]]]) -> None:
    """No episode, an empty process, or one of no tokens or no time has no rate."""
    with pytest.raises(HavocError):
        rate_bounds(episodes)


def test_ratio_is_of_the_quantile_asked_for() -> None:
    """The 90th percentile's ratio is bounded around itself, not around the smallest or the median."""
    bounds = ratio_bounds([[1.0] * 300], [[value / 3 for value in range(1, 301)]], quantile=0.9, num_resamples=300)
    assert bounds.value == pytest.approx(90, abs=0.5)
    assert 80 < bounds.low <= bounds.value <= bounds.high < 97
    assert bounds.num_samples == 600
    for before, after in [([[0.0]], [[1.0]]), ([[1.0]], [[0.0]])]:
        with pytest.raises(HavocError, match="positive"):
            ratio_bounds(before, after)


def test_ratio_of_equal_records_holds_one() -> None:
    """Two sets of one distribution give an interval around 1; a 10 % slower one lies above 1."""
    rng = np.random.default_rng(3)
    draw = lambda scale: [(scale * rng.normal(20.0, 0.2, size=30)).tolist() for _ in range(5)]  # noqa: E731
    same, slower = (
        ratio_bounds(draw(1.0), draw(1.0), num_resamples=500),
        ratio_bounds(draw(1.0), draw(1.1), num_resamples=500),
    )
    assert same.low < 1.0 < same.high
    assert 1.05 < slower.low <= slower.value <= slower.high < 1.15


def test_minimal_detectable_effect_table() -> None:
    """At 2 % variation: 1.5 % from 30 samples, 2.5 % from 10, 3.5 % from 5."""
    effects = [round(100 * minimal_detectable_effect(0.02, n), 1) for n in (30, 10, 5)]
    assert effects == [1.4, 2.5, 3.5]
    assert variation([1.0]) is None
    assert variation([9.0, 11.0]) == pytest.approx(0.1414, abs=1e-4)


def test_outliers_are_counted() -> None:
    """Tukey's fences sort a far and a very far sample."""
    samples = [10.0, 10.5, 11.0, 11.5, 12.0, 10.2, 10.8, 11.2, 11.8, 13.6, 30.0]
    assert num_outliers(samples) == (0, 1)
    assert num_outliers([*samples[:9], 14.2, 30.0]) == (1, 1)
    spread = [0.0, 10.0, 20.0, 30.0, 40.0]
    assert num_outliers([*spread * 4, 75.0]) == (1, 0)
    assert num_outliers([*spread * 4, -30.0, 105.0]) == (1, 1)


@pytest.mark.parametrize(
    ("samples", "words"),
    [([], "no samples"), ([1.0, float("nan")], "not a finite number"), ([float("inf")], "not a finite number")],
    ids=["none", "nan", "inf"],
)
def test_no_statistic_of_nothing(samples: list[float], words: str) -> None:
    """Empty or non-finite samples are an error, never a number."""
    with pytest.raises(HavocError, match=words):
        quantile_bounds(samples, quantile=0.9)
