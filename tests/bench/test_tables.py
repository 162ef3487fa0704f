"""Tables: aligned and plain in a pipe, coloured on a terminal, and nothing in a cell steers either."""

from __future__ import annotations

import re
import sys
from typing import get_args

import pytest

from havoc_core.bench.judge.verdicts import VERDICTS, Verdict
from havoc_core.bench.report.tables import STYLES, emphasis, table

COLUMNS, ROWS = ("limit", "measured", "verdict"), [["prefill", "6.3 ms", "pass"], ["peak", "1,234 MB", "fail"]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stdout a terminal of 60 columns."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_pipe_gets_plain_columns() -> None:
    """Numbers end where their column ends, nothing trails, no colour is written."""
    lines = table(COLUMNS, ROWS, numbers=(1,)).splitlines()
    assert lines == ["limit    measured  verdict", "prefill    6.3 ms  pass", "peak     1,234 MB  fail"]
    assert emphasis("PASS", "pass") == "PASS"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_colours_and_the_same_words() -> None:
    """Verdicts bear their colours; without them the words are those of the plain table."""
    drawn = table(COLUMNS, ROWS, numbers=(1,))
    assert re.search(r"\x1b\[[\d;]*32mpass", drawn)
    assert re.search(r"\x1b\[[\d;]*31mfail", drawn)
    found = [line.split() for line in bare(drawn).splitlines()]
    assert [row[0:1] + row[1].split() + row[2:] for row in ROWS] == [
        line for line in found if line[-1:] in (["pass"], ["fail"])
    ]
    assert emphasis("PASS", "pass") != "PASS"
    assert bare(emphasis("PASS", "pass")) == "PASS"
    assert bare(emphasis("", "pass")) == ""


@pytest.mark.usefixtures("terminal")
def test_a_narrow_terminal_folds_long_cells_and_loses_nothing() -> None:
    """A reason longer than the window goes on in the next line."""
    reason = " ".join(f"word{place}" for place in range(30))
    drawn = bare(table(("limit", "because"), [["prefill", reason]]))
    assert all(len(line) <= 60 for line in drawn.splitlines())
    assert all(word in drawn for word in reason.split())


def test_no_cell_steers_the_terminal() -> None:
    """Names come from files of others: an escape sequence or a line end in one is shown, not obeyed."""
    drawn = table(("device",), [["\x1b[2J\x1b[31mGTX\r\n1660\x07"]])
    assert "\x1b" not in drawn
    assert drawn.count("\n") == 1
    assert "GTX" in drawn


def test_every_word_of_a_verdict_has_a_style() -> None:
    """No verdict, outlook, change or answer is left without a colour."""
    assert VERDICTS.keys() == set(get_args(Verdict)) <= STYLES.keys()
    assert [STYLES[verdict] for verdict in VERDICTS] == [shown.terminal for shown in VERDICTS.values()]
    assert {
        "possible",
        "unlikely",
        "impossible",
        "better",
        "worse",
        "equal",
        "undecided",
        "yes",
        "partly",
        "no",
    } <= STYLES.keys()
