"""Accuracy of the exported artifact by task, scored in a fresh child process on the shipped files.

    run = run_accuracy(Path("artifact"), Scoring(num_rows=1000))
    record = add_accuracy(record, run)              # refused if the record is of another artifact

The gate counts a row that the judge could not decide as wrong, so such rows stay in `num_rows`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapt.tasks.evaluation import Scoring, evaluate
from ..adapt.tasks.names import DOMAINS
from ..adapt.tasks.sources import data_hash, rows_hash
from ..cores import num_physical_cores
from ..errors import HavocError, IdentityError
from ..export.runtime.artifact import asked_alpha
from ..export.runtime.child import run_worker
from ..export.runtime.held import hold
from ..export.runtime.serving import serve, served
from ..export.runtime.session import DecoderSession
from ..messages import ChildJob, plain, read
from ..model.config_file import read_config
from ..progress import SILENT
from .device import default_provider
from .judge.schema import DomainAccuracy, MetricCounts, row_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..adapt.tasks.evaluation import Scorer
    from ..adapt.tasks.task import Task
    from ..progress import Progress
    from .judge.record import Record

_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """The request for the scoring child."""

    artifact: Path
    provider: str
    num_threads: int
    scoring: Scoring
    alpha: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class RowsDone:
    """Number of rows of a task that were scored since the last message."""

    task: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Scores by task: counts for a record, and which rows were right, for paired comparison.

    `right[task]` is in the order of the rows that `rows_sha256` names; `num_cut[task]` prompts lost their beginning
    because they were longer than the model's context.
    """

    tasks: dict[str, DomainAccuracy]
    right: dict[str, tuple[bool, ...]]
    num_cut: dict[str, int] = field(default_factory=dict)

    def notes(self, num_asked: int | None) -> list[str]:
        """Say which data sets have fewer rows than were asked for, and how many prompts lost their beginning."""
        there = {task: counts.num_rows for task, counts in self.tasks.items()}
        return [
            *(f"{task}: {num} rows, {num_asked} asked" for task, num in there.items() if num < (num_asked or 0)),
            *(
                f"{task}: {num} prompts were longer than the model's context and lost their beginning"
                for task, num in self.num_cut.items()
                if num
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class AccuracyRun(TaskScores):
    """The scores of one artifact, with the hashes of its files and of its manifest.

    `alpha` is the mixture that answered, None without experts.
    """

    files: dict[str, str]
    manifest_sha256: str
    alpha: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the verdict of each row as 0 or 1."""
        marks = {task: "".join("01"[is_right] for is_right in rows) for task, rows in self.right.items()}
        return plain(self) | {"right": marks}  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> AccuracyRun:
        """Read the result of `to_json`; other input is a `KeyError`, `TypeError` or `ValueError`."""
        right = {task: [mark == "1" for mark in marks] for task, marks in document["right"].items()}
        return read(cls, {"alpha": None, **document, "right": right})


SCORE = ChildJob(module="havoc_core.bench.accuracy", name="score", asked=ScoreRequest, told=RowsDone, answer=TaskScores)


def run_accuracy(
    artifact: Path | str,
    scoring: Scoring,
    *,
    alpha: Mapping[str, float] | None = None,
    provider: str | None = None,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> AccuracyRun:
    """Score an artifact in a fresh process.

    `alpha` is the mixture of a live artifact, None for the manifest's. Raises `HavocError` if the folder is not an
    artifact or rows are missing, `IdentityError` for a changed artifact, `MeasurementError` if the scoring process
    dies.
    """
    require_text(Path(artifact))
    provider = provider or default_provider()
    with hold(Path(artifact)) as held:
        weights = asked_alpha(held.manifest, alpha, where=str(artifact))
        request = ScoreRequest(
            artifact=held.place,
            provider=provider,
            num_threads=num_threads or num_physical_cores(),
            scoring=_found_from_anywhere(scoring),
            alpha=None if alpha is None else dict(alpha),
        )
        num_rows = (scoring.num_rows or 1000) * len(scoring.tasks or DOMAINS)
        with progress.stage("score", num_rows, unit="rows") as stage:
            found = run_worker(
                SCORE, request, timeout_s=_TIMEOUT_S, listen=lambda rows: stage.advance(rows.num_rows, note=rows.task)
            )
        held.require_unchanged()
    return AccuracyRun(
        **vars(found), files=held.hashes, manifest_sha256=held.manifest.sha256, alpha=dict(weights) or None
    )


def _found_from_anywhere(scoring: Scoring) -> Scoring:
    """Return the scoring with absolute paths."""
    tasks = scoring.tasks and tuple(
        str(Path(task).absolute()) if task.endswith(".toml") else task for task in scoring.tasks
    )
    return replace(scoring, tasks=tasks, data_dir=scoring.data_dir and scoring.data_dir.absolute())


def require_rows(artifact: Path, scoring: Scoring) -> None:
    """Refuse, before minutes of measuring, what cannot be scored: no tokenizer, no data, pictures for a text model."""
    require_text(artifact)
    for task in scoring.load(read_config(artifact)):
        if task.generator is None:
            scoring.rows(task)


def require_text(artifact: Path) -> None:
    """Refuse an artifact without a tokenizer before anything is measured."""
    if not (artifact / "tokenizer.json").is_file():
        raise HavocError(
            f"{artifact} has no tokenizer.json (its base had none), so its answers cannot be scored: "
            "export it from a base that has one, or measure without accuracy (--n 0)"
        )


def add_accuracy(record: Record, run: AccuracyRun) -> Record:
    """Return the record with the run's accuracy, sealed again; `IdentityError` if they are of different artifacts."""
    if (record.subject.files, record.subject.manifest_sha256) != (run.files, run.manifest_sha256):
        raise IdentityError("the accuracy was scored on another artifact than the record was measured on")
    if run.alpha is not None and record.subject.alpha != run.alpha:
        raise IdentityError(f"the accuracy was scored at alpha {run.alpha}, the record measured {record.subject.alpha}")
    scored = {
        name: counts.model_copy(update={"right_rows": row_bits(run.right[name])}) if run.right.get(name) else counts
        for name, counts in run.tasks.items()
    }
    return record.model_copy(update={"accuracy": {**record.accuracy, **scored}}).sealed()


def score_tasks(
    scorer: Scorer,
    tasks: Sequence[Task],
    scoring: Scoring,
    *,
    has_template: bool,
    tell: Callable[[RowsDone], None],
) -> TaskScores:
    """Score an open model, task by task; `has_template` says whether it was asked through its chat template."""
    found = TaskScores(tasks={}, right={})
    for task in tasks:

        def advance(num_rows: int, name: str = task.name) -> None:
            tell(RowsDone(task=name, num_rows=num_rows))

        rows, scores = evaluate(scorer, task, scoring, advance=advance)
        found.tasks[task.name] = DomainAccuracy(
            num_right=sum(scores.right),
            num_rows=len(rows),
            num_failed=scores.failed,
            split=scoring.split,  # type: ignore[arg-type] # pydantic checks it
            rows_sha256=rows_hash(rows),
            source=source_of(task, scoring.split, scoring.data_dir),
            seed=scoring.seed,
            metric=task.metric,
            metrics={
                name: MetricCounts(num_right=sum(right), num_rows=len(rows)) for name, right in scores.right_by.items()
            },
            few_shot=task.num_few_shot,
            chat=has_template,
            task_sha256=task.sha256,
            data_sha256=data_hash(task, scoring.split, data_dir=scoring.data_dir, online=scoring.online),
        )
        found.right[task.name], found.num_cut[task.name] = scores.right, scores.num_cut
    return found


def source_of(task: Task, split: str, data_dir: Path | None) -> str:
    """The name of the rows: that of a published data set only if its files have the hash that the task pins."""
    is_pinned = split in task.definition.data.data_sha256
    if task.generator is not None or data_dir is None or is_pinned:
        return task.dataset
    return f"{task.dataset} as folder {data_dir.name} has it"


def score_here(request: ScoreRequest, tell: Callable[[RowsDone], None]) -> TaskScores:
    """Do the scoring in this process, which is the child."""
    scoring = request.scoring
    session = DecoderSession.open(
        request.artifact, provider=request.provider, num_threads=request.num_threads, is_chat=scoring.is_chat
    )
    has_template = session.tokenizer is not None and session.tokenizer.chat is not None
    tasks = scoring.load(session.config)
    return score_tasks(session, tasks, scoring, has_template=has_template, tell=tell)


if __name__ == "__main__":
    sys.exit(serve([served(SCORE, score_here)]))
