"""Bounds: equal to scipy's, to the published tables, right as often as they claim, and never improved by bad news."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from havoc_core import bounds

QUANTILES = (0.5, 0.9, 0.95, 0.99)
_durations = st.floats(min_value=1.0, max_value=200.0)


def theirs_upper_rank(num_samples: int, *, quantile: float, confidence: float) -> int | None:
    """Return the first rank k with P(Binomial(n, q) <= k - 1) of at least the confidence, by scipy."""
    ranks = np.arange(1, num_samples + 1)
    reached = special.bdtr(ranks - 1, num_samples, quantile) >= confidence
    return int(ranks[reached][0]) if reached.any() else None


def wrong_at_most(num_wrong: int, *, trials: int, error: float) -> bool:
    """Whether so many misses are what an error rate of `error` gives, but for one case of 10,000."""
    return num_wrong <= stats.binom.ppf(0.9999, trials, error)


@pytest.mark.parametrize("quantile", QUANTILES)
def test_ranks_are_those_of_scipy(quantile: float) -> None:
    """Ours against theirs, every count up to 300 and some large ones."""
    for num_samples in [*range(1, 301), 1000, 20_000]:
        ours = bounds.upper_rank(num_samples, quantile=quantile, confidence=0.95)
        assert ours == theirs_upper_rank(num_samples, quantile=quantile, confidence=0.95)


def test_ranks_of_the_published_table() -> None:
    """The 90th percentile at 95 %: 50 samples need the 49th, ..., 1000 the 916th; 28 prove nothing."""
    found = {n: bounds.upper_rank(n, quantile=0.9, confidence=0.95) for n in (28, 29, 50, 100, 200, 300, 500, 1000)}
    assert found == {28: None, 29: 29, 50: 49, 100: 96, 200: 188, 300: 279, 500: 462, 1000: 916}


@pytest.mark.parametrize(
    ("quantile", "confidence", "num_samples"),
    [(0.9, 0.95, 29), (0.95, 0.95, 59), (0.99, 0.95, 299), (0.9, 0.99, 44), (0.95, 0.99, 90), (0.99, 0.99, 459)],
)
def test_published_sample_counts(quantile: float, confidence: float, num_samples: int) -> None:
    """The fewest samples agree with MLPerf's early-stopping table."""
    assert bounds.num_samples_needed(1.0, quantile=quantile, confidence=confidence) == num_samples


def test_fewest_right_answers_of_the_published_table() -> None:
    """More than 85 % at 95 % confidence needs 92 of 100, ..., 1727 of 2000; one less does not do."""
    found = {n: bounds.num_right_needed(n, share=0.85, confidence=0.95) for n in (10, 100, 200, 250, 500, 1000, 2000)}
    assert found == {10: None, 100: 92, 200: 179, 250: 223, 500: 439, 1000: 869, 2000: 1727}
    assert bounds.num_right_needed(1000, share=0.85, confidence=0.99) == 877
    assert bounds.share_bounds(869, 1000, confidence=0.95).low > 0.85
    assert bounds.share_bounds(868, 1000, confidence=0.95).low <= 0.85


@pytest.mark.parametrize(("num_rows", "num_right"), [(100, 78), (200, 161), (500, 411), (1000, 830)])
def test_published_misses(num_rows: int, num_right: int) -> None:
    """830 of 1000 prove that 85 % was missed, 831 do not."""
    assert bounds.share_bounds(num_right, num_rows, confidence=0.95).high < 0.85
    assert bounds.share_bounds(num_right + 1, num_rows, confidence=0.95).high >= 0.85


@given(st.integers(1, 3000), st.floats(0, 1))
def test_share_bounds_are_those_of_scipy(num_rows: int, fraction: float) -> None:
    """Ours by bisection against the inverse beta function."""
    num_right = round(fraction * num_rows)
    num_wrong = num_rows - num_right
    ours = bounds.share_bounds(num_right, num_rows, confidence=0.95)
    low = 0.0 if num_right == 0 else special.betaincinv(num_right, num_wrong + 1, 0.05)
    high = 1.0 if num_wrong == 0 else special.betaincinv(num_right + 1, num_wrong, 0.95)
    assert (ours.low, ours.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.99]))
def test_share_bounds_are_where_the_binomial_tail_is_what_is_allowed(counts: tuple[int, int], confidence: float):
    """At the low bound, so many right or more happen with exactly the allowed probability; the high one likewise."""
    num_right, num_rows = counts
    ours = bounds.share_bounds(num_right, num_rows, confidence=confidence)
    if num_right:
        assert stats.binom.sf(num_right - 1, num_rows, ours.low) == pytest.approx(1 - confidence, rel=1e-6)
    if num_right < num_rows:
        assert stats.binom.cdf(num_right, num_rows, ours.high) == pytest.approx(1 - confidence, rel=1e-6)
    assert ours.low <= ours.value <= ours.high


@given(st.integers(0, 50), st.sampled_from([0.5, 0.9, 0.95]))
def test_one_more_right_row_never_lowers_a_share_bound(num_right: int, confidence: float) -> None:
    """Bounds rise with the number of right rows, and widen with confidence."""
    fewer, more, surer = (
        bounds.share_bounds(right, 51, confidence=level)
        for right, level in ((num_right, confidence), (num_right + 1, confidence), (num_right, 0.99))
    )
    assert surer.low <= fewer.low < more.low
    assert fewer.high <= more.high


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.001, 0.999))
def test_binomial_is_that_of_scipy(count: int, num_trials: int, probability: float) -> None:
    """Both tails, without the loss of digits that one minus the other would bring."""
    ours = bounds.binomial_cdf(count, num_trials=num_trials, probability=probability)
    assert ours == pytest.approx(special.bdtr(min(count, num_trials), num_trials, probability), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 29, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.975, 0.99])
def test_students_t_is_that_of_scipy(degrees: int, confidence: float) -> None:
    """Few processes need Student's t; ours by a finite sum against theirs."""
    theirs = stats.t.ppf(confidence, degrees)
    assert bounds.student_t(degrees, confidence=confidence) == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    level = bounds.expanded_level(degrees + 1, confidence=confidence)
    assert level == pytest.approx(stats.norm.cdf(theirs), abs=1e-10)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=200), st.sampled_from(QUANTILES))
def test_quantile_bounds_are_those_of_numpy(samples: list[float], quantile: float) -> None:
    """Estimate and both bounds, ours against numpy's quantile and scipy's ranks, the lower one by mirroring."""
    ours = bounds.quantile_bounds(samples, quantile=quantile, confidence=0.95)
    above = theirs_upper_rank(len(samples), quantile=quantile, confidence=0.95)
    below = theirs_upper_rank(len(samples), quantile=1 - quantile, confidence=0.95)
    assert ours.value == pytest.approx(float(np.quantile(samples, quantile)))
    assert ours.high == (None if above is None else sorted(samples)[above - 1])
    assert ours.low == (None if below is None else sorted(samples, reverse=True)[below - 1])


def test_a_prediction_is_the_textbooks() -> None:
    """Mean plus t s sqrt(1 + 1/k); a single value predicts itself."""
    values = [1.0, 2.0, 3.0, 4.0, 10.0]
    spread = float(np.std(values, ddof=1))
    t = stats.t.ppf(0.95, 4)
    assert bounds.next_bound(values, scatter=values, confidence=0.95) == pytest.approx(4 + t * spread * math.sqrt(1.2))
    assert bounds.next_bound([7.0], scatter=[3.0], confidence=0.95) == 7.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40), st.sampled_from([0.9, 0.95, 0.975]))
def test_mean_bounds_are_those_of_scipy(values: list[float], confidence: float) -> None:
    """Each end of scipy's t interval is one-sided at the confidence."""
    ours = bounds.mean_bounds(values, confidence=confidence)
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = stats.t.ppf(confidence, len(values) - 1) * spread / math.sqrt(len(values))
    assert ours.value == pytest.approx(mean, abs=1e-9)
    assert (ours.low, ours.high) == (pytest.approx(mean - reach, abs=1e-6), pytest.approx(mean + reach, abs=1e-6))


def test_one_value_bounds_no_mean() -> None:
    """It is its own mean, and nothing is known of the next."""
    assert bounds.mean_bounds([3.0], confidence=0.95) == bounds.Bounds(3.0, None, None)


@pytest.mark.parametrize(("quantile", "num_samples"), [(0.5, 30), (0.9, 100), (0.95, 150), (0.99, 600)])
def test_quantile_bounds_cover_as_often_as_they_claim(quantile: float, num_samples: int) -> None:
    """Of 1000 simulated measurements of a known quantile, no more than the claimed 5 % are wrong on either side."""
    generator = random.Random(7)
    num_below = num_above = 0
    for _ in range(1000):
        samples = [generator.random() for _ in range(num_samples)]
        found = bounds.quantile_bounds(samples, quantile=quantile, confidence=0.95)
        num_below += found.high is not None and found.high < quantile
        num_above += found.low is not None and found.low > quantile
    assert wrong_at_most(num_below, trials=1000, error=0.05)
    assert wrong_at_most(num_above, trials=1000, error=0.05)
    assert num_below + num_above > 10  # and they are not merely wide


@pytest.mark.parametrize("between", [0.0, 0.02], ids=["alike", "apart"])
def test_rate_bounds_cover_as_often_as_they_claim(between: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five processes that differ by 0 or 2 %: either bound is wrong in no more than the claimed 5 % of cases."""
    monkeypatch.setattr(bounds, "NUM_RESAMPLES", 700)
    generator, trials = random.Random(11), 300
    num_high = num_low = 0
    for _ in range(trials):
        processes = [
            [(127.0, 0.25 * level * generator.gauss(1, 0.01)) for _ in range(6)]
            for level in (generator.gauss(1, between) for _ in range(5))
        ]
        found = bounds.rate_bounds(processes, confidence=0.95)
        assert found.low is not None
        assert found.high is not None
        num_high += found.low > 127 / 0.25
        num_low += found.high < 127 / 0.25
    assert wrong_at_most(num_high, trials=trials, error=0.05)
    assert wrong_at_most(num_low, trials=trials, error=0.05)


def test_rate_is_total_over_total() -> None:
    """A rate is tokens over time in all, not a mean of rates; one episode alone bounds nothing."""
    assert bounds.rate_bounds([[(100.0, 1.0), (100.0, 3.0)]], confidence=0.95).value == 50.0
    assert bounds.rate_bounds([[(127.0, 0.3)]], confidence=0.95) == bounds.Bounds(127.0 / 0.3, None, None)


@pytest.mark.parametrize(
    ("num_processes", "confidence", "is_carried"),
    [
        (5, 0.95, True),
        (5, 0.99, False),
        (4, 0.95, True),
        (3, 0.95, False),
        (3, 0.9, True),
        (2, 0.95, False),
        (20, 1 - 1e-16, False),
    ],
)
def test_no_rate_is_bounded_beyond_what_resamples_carry(
    num_processes: int, confidence: float, is_carried: bool
) -> None:
    """A level that fewer than ten of 2000 resamples lie beyond would be the outermost of them, however high it is."""
    runs = [[(127.0, 0.25 + 0.01 * (run * place % 7)) for run in range(6)] for place in range(1, num_processes + 1)]
    found = bounds.rate_bounds(runs, confidence=confidence)
    assert (found.low is not None, found.high is not None) == (is_carried, is_carried)


def test_rate_bounds_show_every_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread within a process and between processes both widen the bounds; unequal lengths do not."""
    monkeypatch.setattr(bounds, "TAIL_RESAMPLES", 0.0)
    within = bounds.rate_bounds([[(1.0, 1.0), (1.0, 3.0)]], confidence=0.95)
    assert (within.low, within.high) == (pytest.approx(1 / 3), 1.0)
    between = bounds.rate_bounds([[(1.0, 1.0)] * 3, [(1.0, 2.0)] * 3, [(1.0, 4.0)] * 3], confidence=0.95)
    assert (between.low, between.high) == (0.25, 1.0)
    ragged = bounds.rate_bounds([[(1.0, 2.0)], [(1.0, 2.0)] * 7, [(2.0, 4.0)] * 2], confidence=0.95)
    assert ragged == bounds.Bounds(0.5, 0.5, 0.5)


def test_many_runs_are_joined_in_order() -> None:
    """300 runs become 64 blocks of neighbours, so what drifts slowly is drawn together and nothing is lost."""
    runs = [(1.0, float(place)) for place in range(300)]
    blocks = bounds._blocks(runs)
    assert len(blocks) == bounds.MAX_BLOCKS
    assert sum(amount for amount, _ in blocks) == 300
    assert sum(seconds for _, seconds in blocks) == sum(range(300))
    assert [seconds / amount for amount, seconds in blocks] == sorted(seconds / amount for amount, seconds in blocks)
    assert bounds._blocks(runs[:64]) == runs[:64]


@given(st.floats(0.0, 1.0), st.sampled_from([0.85, 0.9]))
def test_the_needed_number_of_samples_is_enough(share: float, quantile: float) -> None:
    """So many samples, that share of them within the limit, prove it; a share that cannot prove it asks for none."""
    needed = bounds.num_samples_needed(share, quantile=quantile, confidence=0.95)
    if needed is None:
        assert share <= quantile + 0.01
    else:
        assert bounds.proves_share(int(share * needed), needed, share=quantile, confidence=0.95)


@given(st.integers(1, 500), st.sampled_from(QUANTILES))
def test_ranks_never_fall(num_samples: int, quantile: float) -> None:
    """One sample more never lowers the rank that is needed: what makes slower samples unable to pass a limit."""
    smaller = bounds.upper_rank(num_samples, quantile=quantile, confidence=0.95)
    larger = bounds.upper_rank(num_samples + 1, quantile=quantile, confidence=0.95)
    assert smaller is None or (larger is not None and smaller <= larger <= smaller + 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(_durations, min_size=1, max_size=120), st.lists(_durations, min_size=1, max_size=60))
def test_slower_samples_never_help_a_quantile(samples: list[float], slower: list[float]) -> None:
    """With samples over the limit added, nothing that did not pass passes, and nothing that failed recovers."""
    limit = float(np.median(samples))
    before = bounds.quantile_bounds(samples, quantile=0.9, confidence=0.95)
    after = bounds.quantile_bounds([*samples, *(limit + value for value in slower)], quantile=0.9, confidence=0.95)
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
    before = bounds.rate_bounds(episodes, confidence=0.95)
    if before.high is None:
        return
    slower = (127.0, 127.0 / before.value * factor)
    after = bounds.rate_bounds([[*episodes[0], slower], *episodes[1:]], confidence=0.95)
    assert after.low is not None
    assert after.low <= before.high * (1 + 1e-12)
