"""Progress of long work: bars on a terminal, plain lines elsewhere, nothing in tests.

    with progress.stage("train math", 40) as stage:
        for step in range(40):
            ...
            stage.advance(note=f"reward {reward:.2f}")

`stage.tell` shows named figures: a table below the bars of a terminal, part of the next line elsewhere. Stages may be
nested; a stage that ends with an exception is shown as stopped at its last count. Everything goes to stderr, so that
scripts can read stdout; if stderr cannot be written, the work continues.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

_LINE_EVERY_S = 10.0
_LINE_AT_MOST_EVERY_S = 1.0
_LINE_EVERY_SHARE = 0.1
_BYTES_PER_MB = 1_000_000


class Stage(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Say that `n` more units are done; `note` is a few words shown beside the count until the next note."""

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        """Show the status of the work, as names and values; `left_s` is a better estimate than that from the units."""


class Progress(Protocol):
    """Where stages are announced."""

    def stage(self, name: str, total: int | None, *, unit: str = "") -> AbstractContextManager[Stage]:
        """Open a stage of `total` units (None: unknown); `unit` is "bytes" (shown as MB) or a word."""


class _Silent:
    """Shows nothing; a Progress and its own Stage."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Stage]:  # noqa: ARG002
        """Do nothing but run the body."""
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Do nothing."""

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        """Do nothing."""


SILENT: Final[Progress] = _Silent()


def make_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Progress:
    """Bars where `stream` (default: stderr) is a terminal that moves its cursor, lines elsewhere, none if `quiet`."""
    if quiet:
        return SILENT
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "") not in {"", "dumb"}:
        return BarProgress(stream)
    return LineProgress(stream)


class LineProgress:
    """One line at the start of a stage, one about every 10 % or 10 s, one at its end."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to `stream`; `clock` counts seconds."""
        self._stream = stream
        self._clock = clock

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Stage]:
        """See `Progress.stage`."""
        stage = _LineStage(self._stream, self._clock, name, total, unit)
        stage.write(f"{name}: 0 of {_count(total, unit)}" if total else f"{name}: started")
        outcome = "stopped at"
        try:
            yield stage
            outcome = "done,"
        finally:
            stage.write(f"{name}: {outcome} {_count(stage.num_done, unit)} in {duration(stage.elapsed_s)}{stage.said}")


class _LineStage:
    def __init__(self, stream: TextIO, clock: Callable[[], float], name: str, total: int | None, unit: str) -> None:
        self._stream, self._clock = stream, clock
        self._name, self._total, self._unit = name, total, unit
        self._started_s = self._written_s = clock()
        self._written_at = 0
        self.num_done = 0
        self.note = ""
        self._figures: dict[str, str] = {}
        self._left_s: float | None = None

    @property
    def said(self) -> str:
        figures = "".join(f", {name} {value}" for name, value in self._figures.items())
        return f"{self.note}{figures}"

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the work does not depend on the display
            print(line, file=self._stream, flush=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.num_done += n
        self.note = f", {note}" if note else self.note
        if self._is_due():
            self._written_s, self._written_at = self._clock(), self.num_done
            self.write(self._line())

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        self._figures, self._left_s = dict(figures), left_s

    def _is_due(self) -> bool:
        if self.num_done == self._total:
            return False  # the closing line follows
        since_s = self._clock() - self._written_s
        num_since = self.num_done - self._written_at
        has_moved = bool(self._total) and num_since >= _LINE_EVERY_SHARE * (self._total or 0)
        return since_s >= _LINE_EVERY_S or (has_moved and since_s >= _LINE_AT_MOST_EVERY_S)

    def _line(self) -> str:
        elapsed = duration(self.elapsed_s)
        if not self._total:
            return f"{self._name}: {_count(self.num_done, self._unit)}, {elapsed}{self.said}"
        left_s = self._left_s
        if left_s is None:
            left_s = self.elapsed_s / max(self.num_done, 1) * max(self._total - self.num_done, 0)
        of = _of(self.num_done, self._total, self._unit, " of ")
        share = f"{self.num_done / self._total:.0%}"
        return f"{self._name}: {of} ({share}), {elapsed}, about {duration(left_s)} left{self.said}"


class BarProgress:
    """One bar per outermost stage, kept on the screen when it ends; inner stages appear beneath it while they run."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`, a terminal."""
        self._stream = stream
        self._bars: Bars | None = None
        self._depth = 0

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Stage]:
        """See `Progress.stage`."""
        bars = self._bars = self._bars or _new_bars(self._stream)
        if self._depth == 0:
            bars.start()
        task = bars.add_task("  " * self._depth + name, total=total, count=_of(0, total, unit), note="", left_s=None)
        self._depth += 1
        try:
            yield _BarStage(bars, task, total, unit)
        except BaseException:
            bars.update(task, note="[red]stopped[/red]")
            raise
        finally:
            self._depth -= 1
            bars.stop_task(task)
            if self._depth == 0:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)


class _BarStage:
    def __init__(self, bars: Bars, task: TaskID, total: int | None, unit: str) -> None:
        self._bars, self._task, self._total, self._unit = bars, task, total, unit
        self._num_done = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        from rich.markup import escape

        self._num_done += n
        fields: dict[str, Any] = {"count": _of(self._num_done, self._total, self._unit)}
        if note:
            fields["note"] = escape(note)
        self._bars.update(self._task, advance=n, **fields)

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        self._bars.update(self._task, figures=dict(figures), left_s=left_s)


def _new_bars(stream: TextIO) -> Bars:
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Left(TimeRemainingColumn):
        """The work's own estimate of the remaining time, if it has one."""

        def render(self, task: Task) -> Text:
            left_s = task.fields["left_s"]
            if left_s is None or task.finished:
                return super().render(task)
            return Text(duration(left_s), style="progress.remaining")

    class BarsAndFigures(Bars):
        """Bars, and below them the figures of the stages."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield from (figure_table(task.fields["figures"]) for task in self.tasks if "figures" in task.fields)

    return BarsAndFigures(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Left(compact=True),
        TextColumn("[dim]{task.fields[note]}[/dim]"),
        console=Console(file=stream),
        redirect_stdout=sys.stdout.isatty(),  # a redirected stdout must not end up on the terminal
    )


def figure_table(figures: Mapping[str, str]) -> Table:
    """Return named figures as a table for a terminal, one per row, so that it fits any width."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim")
    for name, value in figures.items():
        table.add_row(escape(name), escape(value))
    return table


def _of(num_done: int, total: int | None, unit: str, separator: str = "/") -> str:
    if not total:
        return _count(num_done, unit)
    return f"{_count(num_done, unit if unit == 'bytes' else '')}{separator}{_count(total, unit)}"


def _count(number: int, unit: str) -> str:
    return f"{number / _BYTES_PER_MB:,.1f} MB" if unit == "bytes" else f"{number} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Write seconds for a person: "12.3 s", "4 min 05 s", "2 h 10 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
