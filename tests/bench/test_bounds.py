"""The gate's own bounds: equal to scipy's, to the published tables, and right as often as they claim."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.bench import bounds, statistics


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95, 0.99])
def test_ranks_are_those_of_scipy(quantile: float) -> None:
    """Ours against theirs, every count up to 300 and some large ones."""
    for num_samples in [*range(1, 301), 1000, 20_000]:
        ours = bounds.upper_rank(num_samples, quantile=quantile, confidence=0.95)
        theirs = statistics.upper_rank(num_samples, quantile=quantile, confidence=0.95)
        assert ours == theirs


def test_ranks_of_the_published_table() -> None:
    """The 90th percentile at 95 %: 50 samples need the 49th, ..., 1000 the 916th."""
    found = {n: bounds.upper_rank(n, quantile=0.9, confidence=0.95) for n in (28, 29, 50, 100, 200, 300, 500, 1000)}
    assert found == {28: None, 29: 29, 50: 49, 100: 96, 200: 188, 300: 279, 500: 462, 1000: 916}


def test_fewest_right_answers_of_the_published_table() -> None:
    """More than 85 % at 95 % confidence needs 92 of 100, ..., 1727 of 2000."""
    found = {n: bounds.num_right_needed(n, share=0.85, confidence=0.95) for n in (10, 100, 200, 250, 500, 1000, 2000)}
    assert found == {10: None, 100: 92, 200: 179, 250: 223, 500: 439, 1000: 869, 2000: 1727}
    assert bounds.num_right_needed(1000, share=0.85, confidence=0.99) == 877


@given(st.integers(1, 3000), st.floats(0, 1))
def test_share_bounds_are_those_of_scipy(num_rows: int, fraction: float) -> None:
    """Ours by bisection against theirs by the inverse beta function."""
    num_right = round(fraction * num_rows)
    ours = bounds.share_bounds(num_right, num_rows, confidence=0.95)
    theirs = statistics.share_bounds(num_right, num_rows, confidence=0.95)
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.001, 0.999))
def test_binomial_is_that_of_scipy(count: int, num_trials: int, probability: float) -> None:
    """Both tails, without the loss of digits that one minus the other would bring."""
    from scipy import special

    ours = bounds.binomial_cdf(count, num_trials=num_trials, probability=probability)
    assert ours == pytest.approx(special.bdtr(min(count, num_trials), num_trials, probability), rel=1e-9, abs=1e-13)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantile_bounds_are_those_of_numpy(samples: list[float], quantile: float) -> None:
    """Estimate and both bounds, ours against theirs."""
    ours = bounds.quantile_bounds(samples, quantile=quantile, confidence=0.95)
    theirs = statistics.quantile_bounds(samples, quantile=quantile, confidence=0.95)
    assert ours.value == pytest.approx(theirs.value)
    assert (ours.low, ours.high) == (theirs.low, theirs.high)


def test_quantile_bounds_cover_as_often_as_they_claim() -> None:
    """Of 2000 simulated measurements with a known 90th percentile, at most 5 % and some are wrong on each side."""
    generator = random.Random(7)
    truth, num_below, num_above = 0.9, 0, 0
    for _ in range(2000):
        found = bounds.quantile_bounds([generator.random() for _ in range(100)], quantile=0.9, confidence=0.95)
        num_below += found.high is not None and found.high < truth
        num_above += found.low is not None and found.low > truth
    assert num_below <= 0.06 * 2000
    assert num_above <= 0.06 * 2000
    assert num_below + num_above > 0.04 * 2000  # and they are not merely wide


def test_rate_bounds_cover_as_often_as_they_claim() -> None:
    """Five processes that differ by 2 %: the lower bound lies above the true rate in well under one case of eight."""
    generator = random.Random(11)
    num_wrong = 0
    for _ in range(120):
        processes = [
            [(127.0, 0.25 * level * generator.gauss(1, 0.01)) for _ in range(6)]
            for level in (generator.gauss(1, 0.02) for _ in range(5))
        ]
        found = bounds.rate_bounds(processes, confidence=0.95)
        assert found.low is not None
        num_wrong += found.low > 127 / 0.25
    assert num_wrong <= 0.125 * 120


def test_rate_bounds_agree_with_the_vectorised_ones() -> None:
    """The same bootstrap twice: in plain Python for the gate, in numpy for the record's statistics."""
    generator = random.Random(3)
    processes = [[(127.0, generator.gauss(0.3, 0.02)) for _ in range(8)] for _ in range(5)]
    ours, theirs = bounds.rate_bounds(processes, confidence=0.95), statistics.rate_bounds(processes, confidence=0.95)
    assert ours.value == pytest.approx(theirs.value)
    assert ours.low == pytest.approx(theirs.low, rel=2e-3)
    assert ours.high == pytest.approx(theirs.high, rel=2e-3)


def test_many_episodes_cost_no_more_than_some() -> None:
    """Beyond 64 episodes a process, neighbours are joined: same estimate, and the spread of means stays what it was."""
    generator = random.Random(5)
    many = [[(127.0, generator.gauss(0.3, 0.03)) for _ in range(640)] for _ in range(5)]
    assert [len(bounds._blocks(episodes)) for episodes in (many[0], many[0][:64], many[0][:65], [])] == [64, 64, 64, 0]
    assert sum(seconds for _, seconds in bounds._blocks(many[0])) == pytest.approx(sum(s for _, s in many[0]))
    ours, theirs = bounds.rate_bounds(many, confidence=0.95), statistics.rate_bounds(many, confidence=0.95)
    assert ours.value == pytest.approx(theirs.value)
    assert ours.low == pytest.approx(theirs.low, rel=1e-3)
    assert ours.high == pytest.approx(theirs.high, rel=1e-3)


def test_one_run_bounds_no_rate() -> None:
    """A single figure has no spread, so it proves nothing."""
    assert bounds.rate_bounds([[(127.0, 0.3)]], confidence=0.95) == bounds.Bounds(127.0 / 0.3, None, None)


@given(st.floats(0.0, 1.0), st.sampled_from([0.85, 0.9]))
def test_the_needed_number_of_samples_is_enough(share: float, quantile: float) -> None:
    """So many samples, that share of them within the limit, prove it; a share that cannot prove it asks for none."""
    needed = bounds.num_samples_needed(share, quantile=quantile, confidence=0.95)
    if needed is None:
        assert share <= quantile + 0.01
    else:
        assert bounds.proves_share(int(share * needed), needed, share=quantile, confidence=0.95)


@given(st.integers(1, 500), st.sampled_from([0.5, 0.9, 0.99]))
def test_ranks_never_fall(num_samples: int, quantile: float) -> None:
    """One sample more never lowers the rank that is needed: what makes slower samples unable to pass a limit."""
    smaller = bounds.upper_rank(num_samples, quantile=quantile, confidence=0.95)
    larger = bounds.upper_rank(num_samples + 1, quantile=quantile, confidence=0.95)
    assert smaller is None or (larger is not None and smaller <= larger <= smaller + 1)
