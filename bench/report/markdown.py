"""Text for a pull request: make quoted text safe, and write a duel as a comment."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..judge.figures import count, printable
from .tables import (
    PAIRED_ROWS_COLUMNS,
    paired_cells,
    paired_columns,
    paired_rows_cells,
    paired_rows_sentence,
    paired_sentence,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..duel import DuelOutcome
    from ..judge.paired_rows import PairedRows


def markdown_cell(text: str) -> str:
    """Make a text safe inside a Markdown table: no cell border, line end, markup, mention of a user, or link."""
    flat = " ".join(str(text).split()).replace("\\", "\\\\")
    for mark in "|`*_<>[]":
        flat = flat.replace(mark, f"\\{mark}")
    flat = re.sub(r"\bwww\.", r"www\\.", flat.replace("://", "\\://"), flags=re.IGNORECASE)
    return flat.replace("@", "@<!-- -->")


def markdown_code(text: str) -> str:
    """Make a text safe between backticks."""
    return " ".join(str(text).split()).replace("`", "'")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write rows as a table; every cell is text."""
    lines = [columns, ["---"] * len(columns), *([markdown_cell(printable(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duel_markdown(
    outcome: DuelOutcome,
    margin: float,
    names: tuple[str, str],
    notes: Sequence[str],
    *,
    answers: Sequence[PairedRows] = (),
    answer_margin: float = 0.0,
) -> str:
    """Return a duel as a comment: the verdict, a table of every quantity, and what a reader should know."""
    old, new = (markdown_code(printable(name)) for name in names)
    sentence = paired_sentence(outcome.verdict, outcome.rows, margin)
    told = [*notes, *([outcome.agreement.sentence()] if outcome.agreement and outcome.agreement.num_prompts else [])]
    parts = [
        f"**{outcome.verdict}**: `{new}` against `{old}`, {sentence} ({count(outcome.num_blocks, 'block')} in turns).",
        markdown_table(paired_columns(), paired_cells(outcome.rows)),
        *(f"- {markdown_cell(printable(note))}" for note in told),
    ]
    if answers:
        parts += [markdown_table(PAIRED_ROWS_COLUMNS, paired_rows_cells(answers)), paired_rows_sentence(answer_margin)]
    return "\n\n".join(parts)
