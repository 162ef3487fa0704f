"""What becomes a comment in a pull request: the answer first, a table that holds, and nothing but text in it."""

from __future__ import annotations

import dataclasses

import pytest

from havoc_core.bench.duel import Agreement, DuelOutcome
from havoc_core.bench.judge.history import RecordHistory
from havoc_core.bench.judge.paired import Paired
from havoc_core.bench.report.history_text import history_markdown
from havoc_core.bench.report.markdown import duel_markdown, markdown_table

EVIL = "a`|*x*\n<b>@team http://evil.example"
ROW = Paired(quantity="prefill", witness="CPU time", num_blocks=5, old=2.0, new=2.2, ratio=1.1, low=1.06, high=1.14)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("worse", "slower by more than 5% is proven"),
        ("better", "faster by more than 5% is proven, and nothing is slower"),
        ("equal", "the same within 5%"),
        ("undecided", "slower by more than 5% is not proven, nor is the opposite"),
    ],
)
def test_a_duel_as_a_comment(word: str, said: str) -> None:
    """The first word is the verdict, which the action reads; the figures follow, then what to know of them."""
    rows = [dataclasses.replace(ROW, shift=word), Paired(quantity="load", witness="CPU time", num_blocks=0)]
    outcome = DuelOutcome(verdict=word, rows=rows, num_blocks=5, agreement=Agreement(2, 2, 16, 12))
    lines = duel_markdown(outcome, 0.05, ("old", "new"), ["they differ"]).splitlines()
    assert lines[0] == f"**{word}**: `new` against `old`, {said} (5 blocks in turns)."
    assert f"| prefill, CPU time | 2.000 ms | 2.200 ms | 1.100 | 1.060 \u2013 1.140 | {word} | 5 blocks |  |" in lines
    assert "- they differ" in lines
    assert any("12 of 16 come before" in line for line in lines)


def test_what_is_quoted_stays_text() -> None:
    """Names of folders, notes and reasons call nobody, link nowhere and end no cell."""
    outcome = DuelOutcome(verdict="equal", rows=[dataclasses.replace(ROW, quantity=EVIL)], num_blocks=5)
    history = RecordHistory(margin=0.01, works=(), left_out=((EVIL, EVIL),))
    for text in (duel_markdown(outcome, 0.05, (EVIL, EVIL), [EVIL]), history_markdown(history)):
        outside = "".join(text.split("`")[::2])
        assert "@team" not in outside
        assert "<b>" not in outside.replace("\\<", "")
        assert "http://" not in outside
    head, _, row = markdown_table(("one", "two"), [[EVIL, "x"]]).splitlines()
    assert head == "| one | two |"
    assert row.replace("\\|", "").count("|") == 3
