"""Accuracy of an artifact or a base by task, with exact intervals.

An artifact is scored in a fresh child on the very files that ship, as for a record; a base is scored with torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.artifact import MANIFEST
from ..progress import SILENT
from .accuracy import run_accuracy, tasks_to_score
from .bounds import share_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..adapt.tasks.task import Prompt
    from ..progress import Progress

TWO_SIDED = 0.975  # one-sided confidence of each end of a 95 % interval
_CHUNK_ROWS = 256


def evaluate(
    model: str,
    *,
    tasks: Sequence[str] = (),
    num_rows: int | None = None,
    split: str = "gate",
    seed: int = 0,
    max_new_tokens: int | None = None,
    few_shot: int | None = None,
    data_dir: Path | None = None,
    online: bool = False,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """Score `model`, an artifact's folder, a base's folder or a preset; no `tasks` means the domains it can read.

    `seed` makes the built-in rows and their splits, so a recipe's own seed and completion length repeat its scores.
    Returns for each task num_right, num_rows, num_failed (counted as not right), and the 95 % interval low, high.
    """
    source: dict[str, Any] = {
        "num_rows": num_rows,
        "split": split,
        "seed": seed,
        "data_dir": data_dir,
        "online": online,
        "few_shot": few_shot,
    }
    if (Path(model) / MANIFEST).is_file():
        run = run_accuracy(
            Path(model),
            tasks=tasks or None,
            may_be_fewer=True,
            max_new_tokens=max_new_tokens,
            progress=progress,
            **source,
        )
        return {name: _row(found.num_right, found.num_rows, found.num_failed) for name, found in run.tasks.items()}
    return _evaluate_base(model, tasks, max_new_tokens, progress, source)


def _evaluate_base(
    model: str, names: Sequence[str], max_new_tokens: int | None, progress: Progress, source: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    from ..adapt.tasks.evaluation import score
    from ..adapt.tasks.sources import rows
    from ..model.checkpoint import load_base
    from ..model.generation import generate_text

    base = load_base(model)
    picked = {name: source[name] for name in ("data_dir", "online")}
    can_see = base.config.vision is not None
    tasks = tasks_to_score(names, can_see=can_see, few_shot=source["few_shot"], **picked)
    found = {}
    numbers = [source["num_rows"] or task.num_rows for task in tasks]
    with progress.stage("score", sum(numbers), unit="rows") as stage:
        for task, num_rows in zip(tasks, numbers, strict=True):
            longest = max_new_tokens or task.max_new_tokens

            def generate(prompts: Sequence[Prompt], name: str = task.name, longest: int = longest) -> list[str]:
                texts: list[str] = []
                for start in range(0, len(prompts), _CHUNK_ROWS):
                    chunk = prompts[start : start + _CHUNK_ROWS]
                    texts += generate_text(base.model, base.tokenizer, chunk, max_new_tokens=longest)
                    stage.advance(len(chunk), note=name)
                return texts

            some = rows(task, source["split"], num_rows, seed=source["seed"], may_be_fewer=True, **picked)
            scores = score(generate, task, some)
            found[task.name] = _row(sum(scores.right), len(scores.right), scores.failed)
    return found


def _row(num_right: int, num_rows: int, num_failed: int) -> dict[str, Any]:
    share = share_bounds(num_right, num_rows, confidence=TWO_SIDED)
    return {
        "num_right": num_right,
        "num_rows": num_rows,
        "num_failed": num_failed,
        "low": share.low,
        "high": share.high,
    }
