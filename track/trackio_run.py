"""A run in trackio: a local SQLite store in `trackio/` of the results' folder; `trackio show` opens it.

The store is that of the environment's TRACKIO_DIR where it is set. Online it is the one that TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL names; offline these two are taken out of the environment.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import trackio

    from .tracker import About

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def open_run(about: About, run_id: str) -> TrackioRun:
    """Open the run, or go on with it: its name ends in `run_id`, since trackio knows runs by their names."""
    os.environ.setdefault("TRACKIO_DIR", str(about.folder.resolve() / "trackio"))
    if not about.online:
        for name in _ELSEWHERE:
            os.environ.pop(name, None)
    with _quiet():
        import trackio

        run = trackio.init(
            project=about.project,
            name=f"{about.name}-{run_id}",
            group=about.group,
            config={**about.config, "job": about.job},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    return TrackioRun(run)


class TrackioRun:
    """A `Tracker` around a run of the package trackio."""

    def __init__(self, run: trackio.Run) -> None:
        """Take the run over."""
        self._run = run

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker.log`; the axis is logged beside its values, and its step is trackio's own."""
        with _quiet():
            self._run.log(dict(values) if axis is None else {axis: step, **values}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `Tracker.table`."""
        import trackio

        with _quiet():
            self._run.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def reference(self, name: str, kind: str, path: Path) -> None:
        """See `Tracker.reference`: an artifact of references, whose content stays where it is."""
        import trackio

        artifact = trackio.Artifact(name, type=kind)
        artifact.add_reference(path.resolve().as_uri())
        with _quiet():
            self._run.log_artifact(artifact)

    def finish(self) -> None:
        """See `Tracker.finish`."""
        import trackio

        with _quiet():
            trackio.finish()  # the run's own method leaves it to be finished again at the end of the process


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Keep what trackio prints off stdout, which is for scripts."""
    return contextlib.redirect_stdout(io.StringIO())
