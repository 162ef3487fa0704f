from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.evaluation import Accuracy, score
from havoc_core.adapt.tasks.task import DOMAINS, load_task
from havoc_core.errors import HavocError, MeasurementError


def test_869_of_1000_prove_85_percent_and_868_do_not():
    """The design's example, one-sided at 95 %."""
    assert Accuracy("math", 869, 1000).proves_above(0.85)
    assert not Accuracy("math", 868, 1000).proves_above(0.85)


@pytest.mark.parametrize(
    ("num_right", "num_rows", "low", "high"),
    [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
        (20, 20, 0.8316, 1),
    ],
)
def test_intervals_are_clopper_and_pearsons(num_right, num_rows, low, high):
    """The exact intervals that Newcombe (Statistics in Medicine 17, 1998, 857-872, table I) gives."""
    assert Accuracy("math", num_right, num_rows).interval() == pytest.approx((low, high), abs=6e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_bounds_are_where_the_binomial_tail_is_what_is_allowed(counts, confidence):
    """At the lower bound, so many right or more happen with exactly the allowed probability; the upper likewise."""
    from scipy.stats import binom

    num_right, num_rows = counts
    accuracy = Accuracy("code", num_right, num_rows)
    low, high = accuracy.lower_bound(confidence), accuracy.upper_bound(confidence)
    if num_right:
        assert binom.sf(num_right - 1, num_rows, low) == pytest.approx(1 - confidence, rel=1e-6)
    if num_right < num_rows:
        assert binom.cdf(num_right, num_rows, high) == pytest.approx(1 - confidence, rel=1e-6)
    assert low <= accuracy.share <= high


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.sampled_from([0.5, 0.9, 0.95]))
def test_one_more_right_row_never_lowers_a_bound(num_right, confidence):
    """Bounds rise with the number of right rows, and narrow with confidence."""
    fewer, more = Accuracy("code", num_right, 51), Accuracy("code", num_right + 1, 51)
    assert fewer.lower_bound(confidence) < more.lower_bound(confidence)
    assert fewer.upper_bound(confidence) <= more.upper_bound(confidence)
    assert fewer.lower_bound(confidence) >= fewer.lower_bound(0.99)


def test_no_rows_prove_nothing():
    """Without rows the interval is everything and the share an error."""
    assert Accuracy("code", 0, 0).interval() == (0.0, 1.0)
    assert not Accuracy("code", 0, 0).proves_above(0.01)
    with pytest.raises(MeasurementError, match="no row was judged"):
        _ = Accuracy("code", 0, 0).share


@pytest.mark.parametrize("counts", [(2, 1), (-1, 3)])
def test_impossible_counts_are_refused(counts):
    """More right rows than rows is a mistake, not a share above one."""
    with pytest.raises(HavocError, match="cannot be"):
        Accuracy("code", *counts)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_is_a_fraction(confidence):
    """95 instead of 0.95 is refused."""
    with pytest.raises(HavocError, match="between 0 and 1"):
        Accuracy("code", 1, 2).lower_bound(confidence)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_references_score_all_and_silence_scores_none(domain):
    """A model that writes every reference has 100 %, one that writes nothing has 0 %, with a reason for each row."""
    rows = sources.rows(domain, "search", 25)
    task = load_task(domain)
    perfect = score(lambda prompts: [task.reference(row) for row in rows], task, rows)
    assert perfect.accuracy == Accuracy(domain, 25, 25)
    silent = score(lambda prompts: [""] * len(prompts), task, rows)
    assert (silent.accuracy.num_right, silent.failed) == (0, 0)
    assert all(silent.reasons)


def test_prompts_reach_the_model_in_the_order_of_the_rows():
    """Row i is judged by completion i."""
    rows = sources.rows("math", "search", 10)
    task = load_task("math")
    answers = {task.prompt(row).text: task.reference(row) for row in rows[:5]}
    scores = score(lambda prompts: [answers.get(prompt.text, "####") for prompt in prompts], task, rows)
    assert scores.right == (True,) * 5 + (False,) * 5


def test_a_failed_judgement_is_left_out_of_the_share_and_reported():
    """A row whose own test is broken is neither right nor wrong."""
    rows = sources.rows("code", "search", 4)
    rows[1] = rows[1] | {"test_list": ["this is no test"]}
    scores = score(lambda prompts: [row["code"] for row in rows], load_task("code"), rows)
    assert scores.right == (True, False, True, True)
    assert (scores.failed, scores.failed_rows) == (1, (1,))
    assert scores.accuracy == Accuracy("code", 3, 3)


def test_a_model_that_loses_prompts_is_an_error():
    """Fewer completions than prompts are not paired up by chance."""
    with pytest.raises(MeasurementError, match="3 prompts gave 2"):
        score(lambda prompts: ["", ""], load_task("math"), sources.rows("math", "search", 3))
