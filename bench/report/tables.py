"""Tables for a person at a terminal, and the same columns as plain text for a pipe or a log."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from ..judge.figures import DASH, count, printable, show
from ..judge.metrics import measured
from ..judge.verdicts import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine_table import EngineRow
    from ..judge.paired import Paired, Shift
    from ..judge.paired_rows import PairedRows

STYLES: dict[str, str] = {
    **{verdict: shown.terminal for verdict, shown in VERDICTS.items()},
    "yes": "green",
    "possible": "green",
    "better": "green",
    "equal": "green",
    "no": "red",
    "impossible": "bold red",
    "worse": "red",
    "undecided": "yellow",
    "unlikely": "yellow",
    "partly": "yellow",
    "–": "bright_black",  # noqa: RUF001 - the dash of figures.py
}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Write rows under `columns`, those in `numbers` aligned right; plain text if stdout is not a terminal."""
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


def paired_table(word: Shift, rows: Sequence[Paired], margin: float, *, names: tuple[str, str] = ("old", "new")) -> str:
    """Return the table of a comparison under one line with the result."""
    head = f"{emphasis(word.upper(), word)}: {paired_sentence(word, rows, margin)}"
    return f"{head}\n\n{table(paired_columns(names), paired_cells(rows), numbers=(1, 2, 3, 4))}"


def paired_sentence(word: Shift, rows: Sequence[Paired], margin: float) -> str:
    """Say what a comparison proves."""
    allowed = f"{100 * margin:g}%"
    is_time = all(row.unit == "ms" for row in rows if row.decides)
    slower, faster = ("slower", "faster") if is_time else ("worse", "better")
    return {
        "worse": f"{slower} by more than {allowed} is proven",
        "better": f"{faster} by more than {allowed} is proven, and nothing is {slower}",
        "equal": f"the same within {allowed}",
        "undecided": f"{slower} by more than {allowed} is not proven, nor is the opposite",
    }[word]


def paired_columns(names: tuple[str, str] = ("old", "new")) -> tuple[str, ...]:
    """Return the head of `paired_cells`."""
    return ("median of processes", *names, "ratio", "interval", "change", "from", "")


def paired_cells(rows: Sequence[Paired]) -> list[list[str]]:
    """Return one line of cells per quantity and witness of a comparison."""
    return [
        [
            f"{row.quantity}, {row.witness}",
            *(DASH if value is None else f"{value:.3f} {row.unit}" for value in (row.old, row.new)),
            DASH if row.ratio is None else f"{row.ratio:.3f}",
            DASH if row.low is None or row.high is None else f"{row.low:.3f} {DASH} {row.high:.3f}",
            row.shift,
            count(row.num_blocks, "block"),
            "" if row.decides else "shown only",
        ]
        for row in rows
    ]


def paired_rows_table(rows: Sequence[PairedRows], margin: float) -> str:
    """Return the table of tasks that both sides answered, row by row."""
    lines = table(PAIRED_ROWS_COLUMNS, paired_rows_cells(rows), numbers=(1, 2, 3, 4, 5, 6))
    return f"{lines}\n{paired_rows_sentence(margin)}"


PAIRED_ROWS_COLUMNS = (
    "right", "old", "new", "difference", "interval", "old / new alone", "p, McNemar", "change", "from"
)  # fmt: skip
"""The head of `paired_rows_cells`."""


def paired_rows_sentence(margin: float) -> str:
    """Say what "equal" means for answers."""
    return f"equal: no fewer right by more than {100 * margin:g} points is proven"


def paired_rows_cells(rows: Sequence[PairedRows]) -> list[list[str]]:
    """Return one line of cells for each task."""
    return [
        [
            row.task,
            *(f"{100 * (row.num_both + alone) / row.num_rows:.1f} %" for alone in (row.num_old_only, row.num_new_only)),
            f"{100 * row.difference:+.1f}",
            f"{100 * row.low:+.1f} {DASH} {100 * row.high:+.1f}",
            f"{row.num_old_only} / {row.num_new_only}",
            f"{row.p_value:.3g}",
            row.shift,
            count(row.num_rows, "row"),
        ]
        for row in rows
    ]


def engines_table(rows: Sequence[EngineRow]) -> str:
    """Return one row per engine and model, with medians and peaks as in `havoc bench`; errors below the table."""
    cells = [[row.engine, row.version, row.model, *_engine_figures(row), _word_of(row)] for row in rows]
    head = ("engine", "version", "model", "weights", "prefill", "prompt", "decode", "peak RSS", "load", "")
    wrong = [printable(f"{row.engine}: {row.reason}") for row in rows if row.reason]
    return "\n".join([table(head, cells, numbers=(3, 4, 5, 6, 7, 8)), *([""] if wrong else []), *wrong])


def _word_of(row: EngineRow) -> str:
    if row.record is None:
        return "not measured"
    return "invalid" if row.reason else ""


def _engine_figures(row: EngineRow) -> list[str]:
    if row.record is None:
        return [DASH] * 6
    found = measured(row.record)
    prefill_ms = found["prefill_ms"]
    prompt = row.record.workload.prompt_tokens / prefill_ms * 1e3 if prefill_ms else None
    return [
        show(row.record.subject.weight_bytes, "bytes"),
        show(prefill_ms, "ms"),
        show(prompt, "tok/s"),
        show(found["decode_tok_per_s"], "tok/s"),
        show(found["peak_rss_bytes"], "bytes"),
        show(found["load_s"], "s"),
    ]
