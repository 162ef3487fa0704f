"""Send the content of `metrics.jsonl` to Weights & Biases and trackio, through one interface.

A `Tracking` belongs to a folder of results. Metrics are logged into `metrics.jsonl`, and the trackers get them from
there: so they also get the metrics of worker processes, and those logged while a tracker could not be reached.
`tracking.json` keeps for each tracker how much it has received, and the id of its run, so that a continued run
continues there. A tracker that fails is named in one line and not used again; the work continues, and the same command
sends the rest later.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import secrets
import sys
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from .. import storage
from ..errors import HavocError, printable
from .metrics_file import FILE_NAME, MAX_BYTES, MetricsFile, points_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from .metrics_file import Point

PROJECT: Final = "agent-forge-v2"
NAME: Final = "phase7_transformer2_adas"
STATE_NAME: Final = "tracking.json"
TRACKERS: Final = ("wandb", "trackio")
"""Names of the trackers; each is also the name of the package that it needs, and of the extra that installs it."""
_FOLLOW_EVERY_S = 1.0
_LINE_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """The description of a run for a tracker, besides its metrics.

    `job` is the command that made the run; runs of one `group` belong together. `config` holds plain JSON values.
    Offline, nothing leaves the machine: the data to send later is written into `folder`.
    """

    folder: Path
    config: Mapping[str, Any]
    job: str
    group: str
    project: str = PROJECT
    name: str = NAME
    online: bool = False


class Tracker(Protocol):
    """One run in one tracker. Any exception of a method means that it failed."""

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float]) -> None:
        """Receive the values of one step of an axis, or of the whole run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Receive a table; cells are numbers, texts, booleans or None."""

    def reference(self, name: str, kind: str, path: Path) -> None:
        """Receive a reference to a file or folder: its path and the hash of its content, without a copy."""

    def finish(self) -> None:
        """Write everything that is still in memory."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse an unknown or missing tracker before any work."""
    for name in names:
        if name not in TRACKERS:
            raise HavocError(f"unknown tracker {printable(name)!r}; known are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise HavocError(f'the tracker {name} is not installed: pip install "havoc-core[{name}]"')


class Tracking:
    """The metrics of one folder of results, and the trackers that receive them; use it in `with`."""

    def __init__(
        self, about: About, trackers: Sequence[str] = (), *, warn: Callable[[str], None] | None = None
    ) -> None:
        """Read the folder. `trackers` are names from `TRACKERS`; `warn` takes a line for the user."""
        self._warn = _say if warn is None else warn
        self.metrics = MetricsFile(about.folder, warn=self._warn)
        self._state = _State(about.folder / STATE_NAME)
        self._followers = [_Follower(name, about, self._state) for name in trackers]
        self._followed_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float | None]) -> None:
        """Log values of one step of an axis, or of the whole run if both are None; see `MetricsFile.log`."""
        self.metrics.log(axis, step, values)
        self.follow()

    def follow(self) -> None:
        """Send the new lines of the file to the trackers, at most once per second."""
        if self._followers and time.monotonic() - self._followed_s >= _FOLLOW_EVERY_S:
            self._catch_up()

    def forget(self, prefix: str) -> None:
        """Remove values from the file whose names begin with `prefix`; trackers keep what they received."""
        if not self.metrics.holds(prefix):
            return
        self._catch_up()
        self.metrics.forget(prefix)
        size = _size(self.metrics.path)
        self._each(lambda follower: follower.begin_at(size))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table to the trackers, once for each content."""
        self._catch_up()
        digest = storage.sha256_json([list(columns), [list(row) for row in rows]])
        self._each(lambda follower: follower.once(name, digest, lambda it: it.table(name, columns, rows)))

    def reference(self, name: str, kind: str, path: Path, digest: str) -> None:
        """Send a reference to a result to the trackers, once for each `digest` of its content."""
        self._catch_up()
        self._each(lambda follower: follower.once(name, digest, lambda it: it.reference(name, kind, path)))

    def finish(self) -> None:
        """Write and send the rest, and end the trackers' runs."""
        self.metrics.flush()
        if self.metrics.num_waiting:
            self._warn(f"{self.metrics.path}: {self.metrics.num_waiting} lines of metrics could not be written")
        self._catch_up()
        self._each(lambda follower: follower.finish())

    def _catch_up(self) -> None:
        self._followed_s = time.monotonic()
        self._each(lambda follower: follower.catch_up(self.metrics.path))

    def _each(self, tell: Callable[[_Follower], None]) -> None:
        """Send to each tracker; one that fails is named and not used again."""
        for follower in list(self._followers):
            try:
                tell(follower)
            except Exception as error:  # noqa: BLE001 - the work continues after any error of a tracker
                self._followers.remove(follower)
                follower.abandon()
                reason = printable(" ".join(str(error).split()))[:_LINE_CHARS] or type(error).__name__
                self._warn(
                    f"{follower.name} failed and gets no more metrics ({reason}); the work continues and {FILE_NAME} "
                    "has everything: fix the tracker and run the same command again, which sends the rest"
                )


class _State:
    """`tracking.json`: for each tracker the id of its run, the bytes it has read, and what it received once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trackers: dict[str, dict[str, Any]] = {}
        # missing or damaged: everything is sent again
        with contextlib.suppress(OSError, HavocError, ValueError, KeyError, TypeError, AttributeError):
            self._trackers = _checked(storage.read_json(path))

    def of(self, name: str) -> dict[str, Any]:
        return self._trackers.setdefault(name, {"run_id": secrets.token_hex(4), "num_bytes": 0, "told": {}})

    def save(self) -> None:
        storage.write_json(self._path, self._trackers)


def _checked(document: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 - JSON of a file
    return {
        str(name): {
            "run_id": str(entry["run_id"]),
            "num_bytes": int(entry["num_bytes"]),
            "told": dict(entry["told"]),
        }
        for name, entry in document.items()
    }


class _Follower:
    """One tracker: opened when there is something to send; it gets the lines after its position in the file."""

    def __init__(self, name: str, about: About, state: _State) -> None:
        self.name, self._about, self._all = name, about, state
        self._state = state.of(name)
        self._tracker: Tracker | None = None

    def catch_up(self, path: Path) -> None:
        points, size = _read_from(path, self._state["num_bytes"])
        if not points:
            return
        tracker = self._opened()
        for axis, step, values in points:
            tracker.log(axis, step, values)
        self.begin_at(size)

    def begin_at(self, num_bytes: int) -> None:
        self._state["num_bytes"] = num_bytes
        self._all.save()

    def once(self, name: str, digest: str, tell: Callable[[Tracker], None]) -> None:
        if self._state["told"].get(name) != digest:
            tell(self._opened())
            self._state["told"][name] = digest
            self._all.save()

    def finish(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    def abandon(self) -> None:
        """End the run as far as possible, so that its package prints nothing when the process ends."""
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.finish()

    def _opened(self) -> Tracker:
        if self._tracker is None:
            module = importlib.import_module(f".{self.name}_run", __package__)
            self._tracker = module.open_run(self._about, self._state["run_id"])
        return self._tracker


def _read_from(path: Path, num_bytes: int) -> tuple[list[Point], int]:
    """Points after a position of the file, and the position after its last whole line; a shorter file is read again."""
    size = _size(path)
    if size == num_bytes:
        return [], size
    start = num_bytes if num_bytes < size else 0
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(MAX_BYTES)
    whole = data[: data.rfind(b"\n") + 1]
    return list(points_of(whole)), start + len(whole)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the result does not depend on it
        sys.stderr.write(f"havoc: warning: {text}\n")
        sys.stderr.flush()
