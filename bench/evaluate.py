"""Accuracy of an artifact or a base by task, with exact intervals.

An artifact is scored in a fresh child on the very files that ship, as for a record; a base is scored with torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapt.tasks.evaluation import Accuracy
from ..cores import limit_threads, threads_for
from ..export.runtime.artifact import MANIFEST
from ..export.runtime.live_table import refuse_alpha
from ..progress import SILENT
from .accuracy import run_accuracy, score_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..adapt.tasks.evaluation import Scoring
    from ..progress import Progress
    from .accuracy import TaskScores
    from .judge.schema import DomainAccuracy


@dataclass(frozen=True, kw_only=True)
class EvaluatedTasks:
    """Accuracy by task, and what a reader should know of it."""

    tasks: dict[str, DomainAccuracy]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values: counts and hashes of each task, and 95 % intervals of it and of each of its metrics."""
        return {name: _document(name, found) for name, found in self.tasks.items()}


def evaluate(
    model: str,
    scoring: Scoring,
    *,
    alpha: Mapping[str, float] | None = None,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> EvaluatedTasks:
    """Score `model`, an artifact's folder, a base's folder or a preset; see `adapt.tasks.evaluation.evaluate`.

    A recipe's own seed and completion length repeat its scores. `num_threads` None is what the size is worth, `alpha`
    the mixture of a live artifact; for a base it is a `HavocError`.
    """
    if (Path(model) / MANIFEST).is_file():
        run = run_accuracy(Path(model), scoring, alpha=alpha, num_threads=num_threads, progress=progress)
        found: TaskScores = run
        mixture = ", ".join(f"{domain} {weight:g}" for domain, weight in (run.alpha or {}).items())
    else:
        refuse_alpha(alpha, model)
        found = _score_base(model, scoring, num_threads, progress)
    notes = found.notes(scoring.num_rows)
    if scoring.tasks is None and "vision" not in found.tasks:
        notes.append("vision is left out: the model reads text only")
    if alpha is not None:
        notes.append(f"answered at alpha {mixture}")
    return EvaluatedTasks(tasks=found.tasks, notes=tuple(notes))


def _score_base(model: str, scoring: Scoring, num_threads: int | None, progress: Progress) -> TaskScores:
    from ..model.checkpoint import load_base
    from ..model.scorer import TorchScorer

    base = load_base(model, is_chat=scoring.is_chat)
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    tasks = scoring.load(can_see=base.config.vision is not None)
    with progress.stage("score", sum(scoring.num_rows or task.num_rows for task in tasks), unit="rows") as stage:
        return score_tasks(
            TorchScorer(base.model, base.tokenizer),
            tasks,
            scoring,
            has_template=base.tokenizer.chat is not None,
            tell=lambda rows: stage.advance(rows.num_rows, note=rows.task),
        )


def pooled(tasks: Mapping[str, DomainAccuracy]) -> dict[str, Any]:
    """Counts and the exact 95 % interval over the rows of all tasks together."""
    num_right = sum(found.num_right for found in tasks.values())
    return Accuracy("all", num_right, sum(found.num_rows for found in tasks.values())).document()


def _document(task: str, found: DomainAccuracy) -> dict[str, Any]:
    document = found.model_dump(mode="json") | Accuracy(task, found.num_right, found.num_rows).document()
    for name, counts in found.metrics.items():
        document["metrics"][name] = Accuracy(task, counts.num_right, counts.num_rows).document()
    return document
