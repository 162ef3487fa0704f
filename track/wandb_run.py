"""A run in Weights & Biases: offline by default, with the names of seed 003 for project, run and metrics.

Every metric is defined with its step axis and, by the catalogue's better direction, its minimum or maximum as summary.
Offline runs stay in `wandb/` of the results' folder until `wandb sync` sends them. Nothing about the machine, the
command line or the environment's variables is sent.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .catalogue import logged_metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import wandb

    from .tracker import About

_SUMMARY = {"higher": "max", "lower": "min", "neither": "last"}


def open_run(about: About, run_id: str) -> WandbRun:
    """Open the run, or continue it. Online, a missing or wrong key is an error; the user is not asked for a key."""
    own = about.folder.resolve() / "wandb"
    for name, value in {
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_DATA_DIR": str(own / "data"),
        "WANDB_CACHE_DIR": str(own / "cache"),
    }.items():
        os.environ.setdefault(name, value)
    import wandb

    if about.online and not wandb.login(verify=True, prompt=False):
        raise wandb.errors.AuthenticationError("not logged in: set WANDB_API_KEY, or leave track.online false")
    run = wandb.init(
        project=about.project,
        name=about.name,
        id=run_id,
        resume="allow" if about.online else None,
        group=about.group,
        job_type=about.job,
        config=dict(about.config),
        mode="online" if about.online else "offline",
        dir=str(about.folder),
        settings=wandb.Settings(
            host="-",
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        ),
    )
    return WandbRun(run)


class WandbRun:
    """A `Tracker` around a run of the package wandb."""

    def __init__(self, run: wandb.Run) -> None:
        """Wrap the run; each metric is defined at its first value."""
        self._run = run
        self._defined: set[str] = set()

    def log(self, axis: str | None, step: int | None, values: Mapping[str, float]) -> None:
        """See `Tracker.log`; the axis is logged with its values."""
        if axis is not None:
            self._define(axis, None)
        for name in values:
            self._define(name, axis)
        self._run.log(dict(values) if axis is None else {axis: step, **values})

    def _define(self, name: str, axis: str | None) -> None:
        if name in self._defined:
            return
        self._defined.add(name)
        metric = logged_metric(name)
        if metric is None or name == axis:
            self._run.define_metric(name, hidden=metric is None)
        else:
            self._run.define_metric(name, step_metric=axis, summary=_SUMMARY[metric.better])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `Tracker.table`."""
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def reference(self, name: str, kind: str, path: Path) -> None:
        """See `Tracker.reference`: an artifact of references; the content is not copied."""
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        artifact.add_reference(path.resolve().as_uri())
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self._run.finish()
