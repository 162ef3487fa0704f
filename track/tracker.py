"""What is told to Weights & Biases and trackio, through one interface, from what `metrics.jsonl` holds.

A `Tracking` belongs to a folder of results. What is logged goes into `metrics.jsonl`; the trackers read it there, so
that they are told of worker processes too, and of what was logged while one of them could not be reached.
`tracking.json` keeps how far each has read, and the id of its run: a run that goes on goes on there. A tracker that
fails is named in one line and left alone; the work goes on, and the same command later tells it the rest.
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
"""Names of the trackers; each is also the package that it needs and the extra that brings it."""
_FOLLOW_EVERY_S = 1.0
_LINE_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a tracker is told of a run beside its metrics.

    `job` is the verb that made it; runs of one `group` belong together. `config` holds plain JSON values. Offline
    nothing leaves the machine: `folder` receives what is to be sent later.
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
        """Take the values of one step of an axis, or of the whole run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table; cells are numbers, texts, booleans or None."""

    def reference(self, name: str, kind: str, path: Path) -> None:
        """Take note of a file or folder by where it lies and what its content hashes to, without a copy."""

    def finish(self) -> None:
        """Write out what is held back."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not known or not installed, before any work."""
    for name in names:
        if name not in TRACKERS:
            raise HavocError(f"unknown tracker {printable(name)!r}; known are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise HavocError(f'the tracker {name} is not installed: pip install "havoc-core[{name}]"')


class Tracking:
    """The metrics of one folder of results, and the trackers that are told of them; use it in `with`."""

    def __init__(
        self, about: About, trackers: Sequence[str] = (), *, warn: Callable[[str], None] | None = None
    ) -> None:
        """Read what the folder holds. `trackers` are names out of `TRACKERS`; `warn` takes a line for the user."""
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
        """Log values of one step of an axis, or with neither of the whole run; see `MetricsFile.log`."""
        self.metrics.log(axis, step, values)
        self.follow()

    def follow(self) -> None:
        """Tell the trackers what is new in the file, at most once a second."""
        if self._followers and time.monotonic() - self._followed_s >= _FOLLOW_EVERY_S:
            self._catch_up()

    def forget(self, prefix: str) -> None:
        """Take values out of the file whose names begin with `prefix`; what trackers were told stays with them."""
        if not self.metrics.holds(prefix):
            return
        self._catch_up()
        self.metrics.forget(prefix)
        size = _size(self.metrics.path)
        self._each(lambda follower: follower.begin_at(size))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Tell the trackers a table, once for each content."""
        self._catch_up()
        digest = storage.sha256_json([list(columns), [list(row) for row in rows]])
        self._each(lambda follower: follower.once(name, digest, lambda it: it.table(name, columns, rows)))

    def reference(self, name: str, kind: str, path: Path, digest: str) -> None:
        """Tell the trackers where a result lies, once for each `digest` of its content."""
        self._catch_up()
        self._each(lambda follower: follower.once(name, digest, lambda it: it.reference(name, kind, path)))

    def finish(self) -> None:
        """Write and tell the rest, and end the trackers' runs."""
        self.metrics.flush()
        if self.metrics.num_waiting:
            self._warn(f"{self.metrics.path}: {self.metrics.num_waiting} lines of metrics could not be written")
        self._catch_up()
        self._each(lambda follower: follower.finish())

    def _catch_up(self) -> None:
        self._followed_s = time.monotonic()
        self._each(lambda follower: follower.catch_up(self.metrics.path))

    def _each(self, tell: Callable[[_Follower], None]) -> None:
        """Let each tracker be told; one that fails is named and told no more."""
        for follower in list(self._followers):
            try:
                tell(follower)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the work goes on
                self._followers.remove(follower)
                follower.abandon()
                reason = printable(" ".join(str(error).split()))[:_LINE_CHARS] or type(error).__name__
                self._warn(
                    f"{follower.name} failed and is told no more ({reason}); the work goes on and {FILE_NAME} holds "
                    "everything: mend it and run the same command again, which tells it the rest"
                )


class _State:
    """`tracking.json`: for each tracker the id of its run, the bytes it has read, and what it was told once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trackers: dict[str, dict[str, Any]] = {}
        # missing or damaged: everything is told again
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
    """One tracker: opened when there is something to tell, told what is behind its place in the file."""

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
        """End the run as well as it can be, so that its package says nothing of its own when the process ends."""
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.finish()

    def _opened(self) -> Tracker:
        if self._tracker is None:
            module = importlib.import_module(f".{self.name}_run", __package__)
            self._tracker = module.open_run(self._about, self._state["run_id"])
        return self._tracker


def _read_from(path: Path, num_bytes: int) -> tuple[list[Point], int]:
    """Points behind a place of the file, and the place behind its last whole line; a shorter file is read anew."""
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
    with contextlib.suppress(OSError):  # whether anybody can read it decides nothing
        sys.stderr.write(f"havoc: warning: {text}\n")
        sys.stderr.flush()
