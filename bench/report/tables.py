"""Tables for a person at a terminal, and the same columns as plain text for a pipe or a log."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from ..judge.figures import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

STYLES = {
    "pass": "bold green",
    "yes": "green",
    "possible": "green",
    "better": "green",
    "equal": "green",
    "fail": "bold red",
    "no": "red",
    "impossible": "bold red",
    "worse": "red",
    "inconclusive": "bold yellow",
    "undecided": "yellow",
    "unlikely": "yellow",
    "partly": "yellow",
    "invalid": "bold yellow",
    "not_measured": "bold bright_black",
    "–": "bright_black",  # noqa: RUF001 - the dash of figures.py
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Lay rows out under `columns`, those in `numbers` aligned right; plain text where no terminal is."""
    safe = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        return _rich(columns, safe, numbers)
    return _plain(columns, safe, numbers)


def emphasis(text: str, word: str) -> str:
    """Return `text` in the colour of a verdict word on a terminal, and unchanged elsewhere."""
    if not sys.stdout.isatty():
        return text
    from rich.console import Console
    from rich.text import Text

    console = Console(width=max(len(text), 1) + 1, force_terminal=True)
    with console.capture() as capture:
        console.print(Text(text, style=STYLES.get(word, "")), end="")
    return capture.get()


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    lines = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bright_black")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console = Console(width=shutil.get_terminal_size((100, 24)).columns, force_terminal=True)
    with console.capture() as capture:
        console.print(drawn)
    return capture.get().strip("\n")
