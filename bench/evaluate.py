"""Accuracy of an artifact or a base by task, with exact intervals.

An artifact is scored in a fresh child on the very files that ship, as for a record; a base is scored with torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bounds import TWO_SIDED, share_bounds
from ..cores import limit_threads, threads_for
from ..export.runtime.artifact import MANIFEST
from ..progress import SILENT
from .accuracy import cut_prompts, fewer_rows, run_accuracy, score_task, tasks_asked
from .judge.schema import DomainAccuracy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..progress import Progress


@dataclass(frozen=True, kw_only=True)
class EvaluatedTasks:
    """Accuracy by task, and what a reader should know of it."""

    tasks: dict[str, DomainAccuracy]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, dict[str, Any]]:
        """Plain JSON values: counts and hashes of each task, and 95 % intervals of it and of each of its metrics."""
        return {name: _document(found) for name, found in self.tasks.items()}


def evaluate(
    model: str,
    *,
    tasks: Sequence[str] = (),
    num_rows: int | None = None,
    split: str = "gate",
    seed: int = 0,
    max_new_tokens: int | None = None,
    few_shot: int | None = None,
    is_chat: bool = True,
    data_dir: Path | None = None,
    online: bool = False,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> EvaluatedTasks:
    """Score `model`, an artifact's folder, a base's folder or a preset; no `tasks` means the domains it can read.

    `seed` makes the built-in rows and their splits, so a recipe's own seed and completion length repeat its scores.
    A data set with fewer rows than `num_rows` is scored on all of them. `num_threads` None is what the size is worth.
    """
    asked: dict[str, Any] = {
        "tasks": tuple(tasks) or None,
        "num_rows": num_rows,
        "split": split,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "few_shot": few_shot,
        "data_dir": data_dir,
        "online": online,
        "may_be_fewer": True,
        "is_chat": is_chat,
    }
    if (Path(model) / MANIFEST).is_file():
        run = run_accuracy(Path(model), num_threads=num_threads, progress=progress, **asked)
        return EvaluatedTasks(tasks=run.tasks, notes=_notes(run.tasks, run.num_cut, asked))
    return _evaluate_base(model, asked, num_threads, progress)


def _evaluate_base(model: str, asked: dict[str, Any], num_threads: int | None, progress: Progress) -> EvaluatedTasks:
    from ..model.checkpoint import load_base
    from ..model.scorer import TorchScorer

    base = load_base(model, is_chat=asked["is_chat"])
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    asked = {**asked, "has_template": base.tokenizer.chat is not None}
    scorer = TorchScorer(base.model, base.tokenizer)
    tasks = tasks_asked(asked, can_see=base.config.vision is not None)
    found, num_cut = {}, {}
    with progress.stage("score", sum(asked["num_rows"] or task.num_rows for task in tasks), unit="rows") as stage:
        for task in tasks:
            counts, scores = score_task(scorer, task, asked, partial(stage.advance, note=task.name))
            found[task.name] = DomainAccuracy.model_validate(counts, strict=False)
            num_cut[task.name] = scores.num_cut
    return EvaluatedTasks(tasks=found, notes=_notes(found, num_cut, asked))


def pooled(tasks: Mapping[str, DomainAccuracy]) -> dict[str, Any]:
    """Counts and the exact 95 % interval over the rows of all tasks together."""
    num_right = sum(found.num_right for found in tasks.values())
    num_rows = sum(found.num_rows for found in tasks.values())
    return {"num_right": num_right, "num_rows": num_rows, **_ends(num_right, num_rows)}


def _notes(
    found: Mapping[str, DomainAccuracy], num_cut: Mapping[str, int], asked: Mapping[str, Any]
) -> tuple[str, ...]:
    notes = fewer_rows({name: item.num_rows for name, item in found.items()}, asked["num_rows"] or 0)
    notes += cut_prompts(num_cut)
    if asked["tasks"] is None and "vision" not in found:
        notes.append("vision is left out: the model reads text only")
    return tuple(notes)


def _document(found: DomainAccuracy) -> dict[str, Any]:
    document = found.model_dump(mode="json")
    document |= _ends(found.num_right, found.num_rows)
    for name, counts in found.metrics.items():
        document["metrics"][name] |= _ends(counts.num_right, counts.num_rows)
    return document


def _ends(num_right: int, num_rows: int) -> dict[str, float | None]:
    share = share_bounds(num_right, num_rows, confidence=TWO_SIDED)
    return {"low": share.low, "high": share.high}
