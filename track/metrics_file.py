"""`metrics.jsonl`: every metric of a run, one line per step of an axis, with or without trackers.

    {"axis": "svf/math/step", "step": 3, "values": {"svf/math/loss": 0.41, ...}}
    {"axis": null, "step": null, "values": {"final/accuracy": 0.87}}

Several processes of a run may append. A value that the file already has for a step is not written again, so work that
is repeated after an interruption is in the file once. Each line is one write after whole lines: a process that is
killed during the write leaves an incomplete line, which the next writer cuts off. A file that cannot be written never
stops the work: the lines are kept and tried again with the next one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from .. import storage
from ..errors import HavocError
from .catalogue import logged_metric

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME: Final = "metrics.jsonl"
MAX_BYTES: Final = 2_000_000_000
_TAIL_BYTES = 1 << 20

Record = Callable[[str, int, Mapping[str, float | None]], None]
"""The function that code logs with: axis, step, and values by name, as in `MetricsFile.log`."""
Point = tuple[str | None, int | None, dict[str, float]]
"""Axis, step and values of a line."""


def record_nothing(_axis: str, _step: int, _values: Mapping[str, float | None]) -> None:
    """A `Record` that discards everything."""


class MetricsFile:
    """The file in `folder`; `warn` gets one line, once, if the file cannot be written or read."""

    def __init__(self, folder: Path, *, warn: Callable[[str], None]) -> None:
        """Read the file if it exists; nothing is written yet."""
        self.path = folder / FILE_NAME
        self._warn, self._has_warned = warn, False
        self._waiting: list[bytes] = []
        self._steps: set[tuple[str, int]] = set()
        self._once: dict[str, float] = {}
        for _, step, values in self._points():
            self._note(step, values)

    @property
    def num_waiting(self) -> int:
        """Number of lines that could not be written so far."""
        return len(self._waiting)

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float | None]) -> None:
        """Append the values that the file does not have for this step; None and non-finite values are left out.

        Without an axis a value is written if it differs from the last one. A name that is not in the catalogue, or
        belongs to another axis, is an error of the caller: `ValueError`.
        """
        for name in values:
            _require_catalogued(name, axis)
        new = {
            name: value
            for name, value in values.items()
            if value is not None and math.isfinite(value) and not self._has(name, step, value)
        }
        if new:
            self._note(step, new)
            self._waiting.append(_line(axis, step, new))
        self.flush()

    def flush(self) -> None:
        """Write the waiting lines; if that fails, they keep waiting."""
        if not self._waiting:
            return
        try:
            with _held(self.path) as file:
                _append(file, b"".join(self._waiting))
        except OSError as error:
            self._tell(f"{storage.explained(error, self.path)}; the work continues, and its metrics are kept in memory")
        else:
            self._waiting.clear()

    def holds(self, prefix: str) -> bool:
        """Whether any name in the file begins with `prefix`."""
        return any(name.startswith(prefix) for name in (*self._once, *(name for name, _ in self._steps)))

    def forget(self, prefix: str) -> None:
        """Remove every value whose name begins with `prefix`: the work that it describes is repeated."""
        try:
            with _held(self.path) as file:
                storage.write_bytes(self.path, b"".join(_lines_without(prefix, file.read())))
        except (OSError, HavocError) as error:
            self._tell(str(error if isinstance(error, HavocError) else storage.explained(error, self.path)))
            return
        self._steps = {(name, step) for name, step in self._steps if not name.startswith(prefix)}
        self._once = {name: value for name, value in self._once.items() if not name.startswith(prefix)}

    def _has(self, name: str, step: int | None, value: float) -> bool:
        return self._once.get(name) == value if step is None else (name, step) in self._steps

    def _note(self, step: int | None, values: Mapping[str, float]) -> None:
        if step is None:
            self._once |= values
        else:
            self._steps |= {(name, step) for name in values}

    def _points(self) -> Iterator[Point]:
        try:
            yield from points_of(storage.read_bounded(self.path, max_bytes=MAX_BYTES))
        except FileNotFoundError:
            return
        except (OSError, HavocError) as error:
            reason = error if isinstance(error, HavocError) else storage.unreadable(error, self.path)
            self._tell(f"{reason}; remove the file to begin a new one")

    def _tell(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(text)


def points_of(data: bytes) -> Iterator[Point]:
    """Read the whole lines of a metrics file; an incomplete line, or one that is not a point of a run, is skipped."""
    for line in data.split(b"\n")[:-1]:
        point = _parsed(line)
        if point is not None:
            yield point


def _parsed(line: bytes) -> Point | None:
    try:
        entry: Any = json.loads(line)
        axis, step, values = entry["axis"], entry["step"], entry["values"]
        is_point = isinstance(axis, str | None) and isinstance(step, int | None) and (axis is None) == (step is None)
        return (axis, step, {str(name): float(value) for name, value in values.items()}) if is_point else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _require_catalogued(name: str, axis: str | None) -> None:
    metric = logged_metric(name)
    if metric is None:
        raise ValueError(f"the metric {name!r} is not in track/catalogue.py")
    if metric.axis_of(name) != (axis or ""):
        raise ValueError(f"the metric {name!r} belongs to the axis {metric.axis_of(name)!r}, not {axis!r}")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """Open or create the file for reading and writing, and lock it against other writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b", 0) as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                    continue  # another writer has put a new file in its place
            yield file
            return


def _lines_without(prefix: str, data: bytes) -> Iterator[bytes]:
    for axis, step, values in points_of(data):
        rest = {name: value for name, value in values.items() if not name.startswith(prefix)}
        if rest:
            yield _line(axis, step, rest)


def _line(axis: str | None, step: int | None, values: Mapping[str, float]) -> bytes:
    return json.dumps({"axis": axis, "step": step, "values": values}).encode() + b"\n"


def _append(file: BinaryIO, lines: bytes) -> None:
    """Write after the last whole line; on any error the file stays as it was, without an incomplete line."""
    end = _end_of_whole_lines(file)
    file.truncate(end)
    file.seek(end)
    rest = memoryview(lines)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:
        file.truncate(end)
        raise


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Position after the last newline, 0 if there is none; it is searched in steps of 1 MiB."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
