"""A run in trackio: a local SQLite store in `trackio/` of the results' folder; `trackio show` opens it.

If TRACKIO_DIR is set in the environment, the store is there. Online it is the one that TRACKIO_SPACE_ID or
TRACKIO_SERVER_URL names; offline these two are removed from the environment.
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
    """Open the run, or continue it: its name ends in `run_id`, because trackio identifies runs by their names."""
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
        """Wrap the run."""
        self._run = run

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker.log`; the axis is logged with its values, and its step is trackio's step."""
        with _quiet():
            self._run.log(dict(values) if axis is None else {axis: step, **values}, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `Tracker.table`."""
        import trackio

        with _quiet():
            self._run.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def reference(self, name: str, kind: str, path: Path) -> None:
        """See `Tracker.reference`: an artifact of references; the content is not copied."""
        import trackio

        artifact = trackio.Artifact(name, type=kind)
        artifact.add_reference(path.resolve().as_uri())
        with _quiet():
            self._run.log_artifact(artifact)

    def finish(self) -> None:
        """See `Tracker.finish`."""
        import trackio

        with _quiet():
            trackio.finish()  # after the run's own method, trackio would finish it again at the end of the process


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Keep the output of trackio off stdout, which is for scripts."""
    return contextlib.redirect_stdout(io.StringIO())
