"""Text for a pull request: what is quoted stays text, and a duel becomes a comment."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..judge.figures import DASH, count, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..duel import DuelOutcome


def markdown_cell(text: str) -> str:
    """Make a text safe inside a Markdown table: no cell border, no line end, no markup, nobody called, no link."""
    flat = " ".join(str(text).split()).replace("\\", "\\\\")
    for mark in "|`*_<>[]":
        flat = flat.replace(mark, f"\\{mark}")
    flat = re.sub(r"\bwww\.", r"www\\.", flat.replace("://", "\\://"), flags=re.IGNORECASE)
    return flat.replace("@", "@<!-- -->")


def markdown_code(text: str) -> str:
    """Make a text safe between backticks."""
    return " ".join(str(text).split()).replace("`", "'")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as a table; every cell is text."""
    lines = [columns, ["---"] * len(columns), *([markdown_cell(printable(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_SENTENCES = {
    "worse": "slower by more than {} is proven",
    "better": "faster by more than {} is proven, and nothing is slower",
    "equal": "the same within {}",
    "undecided": "neither slower by more than {} nor the same is proven",
}


def duel_markdown(outcome: DuelOutcome, margin: float, names: tuple[str, str], notes: Sequence[str]) -> str:
    """Return a duel as a comment: the verdict, a table of every quantity, and what a reader should know."""
    old, new = (markdown_code(printable(name)) for name in names)
    sentence = _SENTENCES[outcome.verdict].format(f"{100 * margin:g} %")
    rows = [
        [
            f"{row.quantity}, {row.witness}",
            *(DASH if value is None else f"{value:.3f} ms" for value in (row.old_ms, row.new_ms)),
            DASH if row.ratio is None else f"{row.ratio:.3f}",
            DASH if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}",
            row.shift,
        ]
        for row in outcome.rows
    ]
    told = [*notes, *([outcome.agreement.sentence()] if outcome.agreement and outcome.agreement.num_prompts else [])]
    parts = [
        f"**{outcome.verdict}**: `{new}` against `{old}`, {sentence} ({count(outcome.num_blocks, 'block')} in turns).",
        markdown_table(("median of processes", "old", "new", "ratio", "interval", "change"), rows),
        *(f"- {markdown_cell(printable(note))}" for note in told),
    ]
    return "\n\n".join(parts)
