"""Answers row by row: the exact test is scipy's, and less accurate is said where it is proven."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from havoc_core.bench.duel import DuelOutcome
from havoc_core.bench.judge.paired import Paired
from havoc_core.bench.judge.paired_rows import PairedRows, joined, judge_rows, mcnemar
from havoc_core.bench.report.markdown import duel_markdown

MARGIN = 0.02


def judged(old: list[bool], new: list[bool], *, margin: float = MARGIN) -> PairedRows:
    (found,) = judge_rows({"math": old}, {"math": new}, {"math": "a" * 64}, margin=margin)
    return found


@pytest.mark.parametrize("apart", [(0, 0), (1, 0), (3, 3), (2, 9), (40, 61), (0, 12)])
def test_the_p_value_is_exact(apart: tuple[int, int]) -> None:
    """Twice the smaller tail of a fair coin, at most 1."""
    total = sum(apart)
    wanted = stats.binomtest(apart[0], total).pvalue if total else 1.0
    assert mcnemar(*apart) == pytest.approx(wanted)


def test_rows_are_counted_in_pairs() -> None:
    """What both had right, and what one alone had, in the order of the rows."""
    found = judged([True, True, False, False, True], [True, False, True, False, True])
    assert (found.num_both, found.num_old_only, found.num_new_only, found.num_rows) == (2, 1, 1, 5)
    assert (found.old_right, found.new_right, found.difference) == ("11001", "10101", 0.0)


@pytest.mark.parametrize(
    ("lost", "won", "word"),
    [(0, 0, "equal"), (100, 20, "worse"), (20, 100, "better"), (25, 20, "undecided"), (4, 3, "equal")],
)
def test_the_margin_decides(lost: int, won: int, word: str) -> None:
    """Of 1000 rows, so many were lost and won: fewer by more than two points, no fewer, or neither is proven."""
    both = 1000 - lost - won
    old = [True] * (both + lost) + [False] * won
    new = [True] * both + [False] * lost + [True] * won
    assert judged(old, new).shift == word


def test_few_rows_prove_nothing() -> None:
    """Twenty rows alike are no proof of two points."""
    assert judged([True] * 20, [True] * 20).shift == "undecided"


def test_worse_by_just_the_margin_is_seldom_called_worse() -> None:
    """Of 500 simulated pairs that lose exactly the margin, at most 1 % and what so few draws scatter."""
    generator, num_worse, num_equal = random.Random(5), 0, 0
    for _ in range(500):
        lost = sum(generator.random() < 0.06 for _ in range(400))
        won = sum(generator.random() < 0.04 / 0.94 for _ in range(400 - lost))
        old = [True] * (400 - won) + [False] * won
        new = [False] * lost + [True] * (400 - lost)
        word = judged(old, new).shift
        num_worse, num_equal = num_worse + (word == "worse"), num_equal + (word in {"equal", "better"})
    assert num_worse <= 11
    assert num_equal <= 11


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["equal", "equal"], "equal"),
        (["better", "equal"], "better"),
        (["better", "worse"], "worse"),
        (["equal", "undecided"], "undecided"),
        (["undecided", "worse"], "worse"),
    ],
)
def test_one_word_for_speed_and_answers(words: list[str], word: str) -> None:
    """A faster side that answers worse is worse."""
    assert joined(words) == word


def test_a_comment_shows_times_and_answers() -> None:
    """Both tables, each with its change; what was only measured says so, and names do not become markup."""
    answers = judge_rows({"sums": [True] * 100}, {"sums": [True] * 60 + [False] * 40}, {"sums": "5" * 64}, margin=0.02)
    times = {"old": 10.0, "new": 10.1, "ratio": 1.01, "low": 0.99, "high": 1.03}
    rows = [
        Paired(quantity="prefill", witness="wall time", num_blocks=8, shift="equal", **times),
        Paired(quantity="memory", witness="wall time", num_blocks=8, unit="MB", old=90.0, new=99.0, decides=False),
    ]
    outcome = DuelOutcome(verdict="equal", rows=rows, num_blocks=8)
    text = duel_markdown(outcome, 0.05, ("old`x", "new"), ["<b>"], answers=answers, answer_margin=0.02)
    assert text.startswith("**equal**: `new` against `old'x`, the same within 5%")
    assert "| prefill, wall time | 10.000 ms | 10.100 ms | 1.010 |" in text
    assert "shown only" in text
    assert "| sums | 100.0 % | 60.0 % | -40.0 |" in text
    assert "- \\<b\\>" in text
