"""Accuracy of an artifact or a base by task, with exact intervals.

An artifact is scored in a fresh child on the shipped files, as for a record; a base is scored with torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

from ..adapt.tasks.evaluation import Accuracy
from ..cores import limit_threads, threads_for
from ..export.runtime.artifact import MANIFEST
from ..export.runtime.devices import DEVICE_KINDS
from ..export.runtime.live_table import refuse_alpha
from ..progress import SILENT
from .accuracy import run_accuracy, score_tasks
from .device import default_provider, identify_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..adapt.tasks.evaluation import Scoring
    from ..cores import TorchDevice
    from ..progress import Progress
    from .accuracy import TaskScores
    from .judge.schema import DomainAccuracy


@dataclass(frozen=True, kw_only=True)
class EvaluatedTasks:
    """Accuracy by task; the device that answered, with its name and software; and notes for the reader."""

    tasks: dict[str, DomainAccuracy]
    made_on: dict[str, Any]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values: counts and hashes of each task, and 95 % intervals for each of its metrics."""
        return {name: _document(name, found) for name, found in self.tasks.items()}


def evaluate(
    model: str,
    scoring: Scoring,
    *,
    alpha: Mapping[str, float] | None = None,
    device: TorchDevice | None = None,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> EvaluatedTasks:
    """Score `model`, an artifact's folder, a base's folder or a preset; see `adapt.tasks.evaluation.evaluate`.

    With a recipe's seed and completion length its scores are repeated. `device` None means the CPU for a base; for an
    artifact it means a card if there is one. A missing device is an `IdentityError`. `num_threads` None chooses by the
    size of the model; `alpha` is the mixture of a live artifact, and a `HavocError` for a base.
    """
    if (Path(model) / MANIFEST).is_file():
        provider = default_provider() if device is None else DEVICE_KINDS[device].provider
        run = run_accuracy(
            Path(model), scoring, alpha=alpha, provider=provider, num_threads=num_threads, progress=progress
        )
        found: TaskScores = run
        where = _ran_on(provider)
        mixture = ", ".join(f"{domain} {weight:g}" for domain, weight in (run.alpha or {}).items())
    else:
        refuse_alpha(alpha, model)
        found, where = _score_base(model, scoring, device or "cpu", num_threads, progress)
    notes = found.notes(scoring.num_rows)
    if scoring.tasks is None and "vision" not in found.tasks:
        notes.append("vision is left out: the model reads text only")
    if alpha is not None:
        notes.append(f"answered at alpha {mixture}")
    notes.append(f"answered on {where['name']} ({where['device']})")
    return EvaluatedTasks(tasks=found.tasks, made_on=where, notes=tuple(notes))


def _ran_on(provider: str) -> dict[str, Any]:
    """The device on which an artifact answered; the artifact defines its own number formats."""
    device = identify_device(provider)
    return {"device": device.kind, "name": device.name, "onnxruntime": onnxruntime.__version__}


def _score_base(
    model: str, scoring: Scoring, device: TorchDevice, num_threads: int | None, progress: Progress
) -> tuple[TaskScores, dict[str, Any]]:
    from ..model.checkpoint import load_base
    from ..model.device import made_on
    from ..model.scorer import TorchScorer

    base = load_base(model, is_chat=scoring.is_chat, device=device)
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    tasks = scoring.load(base.config)
    with progress.stage("score", sum(scoring.num_rows or task.num_rows for task in tasks), unit="rows") as stage:
        found = score_tasks(
            TorchScorer(base.model, base.tokenizer),
            tasks,
            scoring,
            has_template=base.tokenizer.chat is not None,
            tell=lambda rows: stage.advance(rows.num_rows, note=rows.task),
        )
    return found, made_on(base.model.device)


def pooled(tasks: Mapping[str, DomainAccuracy]) -> dict[str, Any]:
    """Counts and the exact 95 % interval over the rows of all tasks together."""
    num_right = sum(found.num_right for found in tasks.values())
    return Accuracy("all", num_right, sum(found.num_rows for found in tasks.values())).document()


def _document(task: str, found: DomainAccuracy) -> dict[str, Any]:
    document = found.model_dump(mode="json") | Accuracy(task, found.num_right, found.num_rows).document()
    for name, counts in found.metrics.items():
        document["metrics"][name] = Accuracy(task, counts.num_right, counts.num_rows).document()
    return document
