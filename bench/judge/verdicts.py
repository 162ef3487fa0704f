"""The five verdicts, and how each is shown: at a terminal, on a page, on a badge, in JUnit and in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "fail", "inconclusive", "invalid", "not_measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictStyle:
    """How a verdict is shown.

    `title` is the heading of a page, `word` is used in a sentence about limits, `terminal` is a style of rich, `badge`
    a colour of shields.io, and `junit` the element below a test case; None if a case has none.
    """

    title: str
    word: str
    terminal: str
    badge: str
    junit: Literal["failure", "error"] | None


VERDICTS: dict[Verdict, VerdictStyle] = {
    "pass": VerdictStyle(title="Pass", word="met", terminal="bold green", badge="brightgreen", junit=None),
    "fail": VerdictStyle(title="Fail", word="missed", terminal="bold red", badge="red", junit="failure"),
    "inconclusive": VerdictStyle(
        title="Undecided", word="undecided", terminal="bold yellow", badge="yellow", junit="error"
    ),
    "invalid": VerdictStyle(title="Invalid", word="invalid", terminal="bold yellow", badge="orange", junit="error"),
    "not_measured": VerdictStyle(
        title="Not measured", word="not measured", terminal="bold bright_black", badge="lightgrey", junit="error"
    ),
}


def spelled(verdict: Verdict) -> str:
    """Return the verdict as text: `not measured`."""
    return verdict.replace("_", " ")
