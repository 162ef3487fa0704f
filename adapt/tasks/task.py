"""Load a task: a bundled one by name, or a user's own TOML file.

task = load_task("arc-easy")
task.prompt(row), task.choices(row), task.reference(row), task.judge([(row, completion)])
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import HavocError
from .asked import Task
from .definition import read_definition
from .names import BUNDLED, bundled_tasks, require_name
from .reward import RIGHT, Prompt, Reward, Row, wrong
from .splits import examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .definition import Definition

__all__ = [
    "RIGHT",
    "Prompt",
    "Reward",
    "Row",
    "Task",
    "load_task",
    "load_tasks",
    "wrong",
]


def load_task(
    name_or_path: str | Path,
    *,
    is_public: bool = False,
    data_dir: Path | None = None,
    online: bool = False,
    few_shot: int | None = None,
) -> Task:
    """Return a bundled task by name, or one of a user's TOML file.

    With `is_public` (or with `data_dir` or `online`), each of the four domains means the public task that it replaces;
    the name stays. `few_shot` sets the number of solved rows before a question; rows that are not in the file are read
    from `data_dir`, from beside the file, or `online`.

    Raises `HavocError` for an unknown name, for a file that is not exactly in the documented form, and for solved rows
    that cannot be read or that are rows of the gate split.
    """
    task = _named(str(name_or_path))
    public = task.definition.data.public
    if public is not None and (is_public or data_dir is not None or online):
        task = replace(_named(public), name=task.name)
    if few_shot is not None:
        task = replace(task, definition=_with_few_shot(task.definition, few_shot))
    if not task.num_few_shot:
        return task
    return replace(task, examples=examples(task, data_dir=data_dir, online=online))


def load_tasks(
    names: Sequence[str],
    *,
    data_dir: Path | None = None,
    online: bool = False,
    few_shot: int | None = None,
) -> tuple[Task, ...]:
    """Load several tasks, see `load_task`; two tasks with the same name are refused."""
    tasks = tuple(load_task(name, data_dir=data_dir, online=online, few_shot=few_shot) for name in names)
    called = [task.name for task in tasks]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise HavocError(f"two tasks have the name {', '.join(twice)}: give each task once, or change one `name`")
    return tasks


def _named(name: str) -> Task:
    require_name(name)
    if name in bundled_tasks():
        return _bundled(name)
    path = Path(name)
    definition = read_definition(path)
    return Task(definition.name, definition, folder=path.absolute().parent)


@functools.cache
def _bundled(name: str) -> Task:
    return Task(name, read_definition(BUNDLED / f"{name}.toml"))


def _with_few_shot(definition: Definition, number: int) -> Definition:
    rule = definition.few_shot
    if rule.rows and number > len(rule.rows):
        raise HavocError(f"{definition.name}: {number} solved rows are asked for, but its file has {len(rule.rows)}")
    if number and definition.prompt.image is not None:
        raise HavocError(f"{definition.name}: a prompt can have only one picture, so it cannot show solved rows")
    return definition.model_copy(update={"few_shot": rule.model_copy(update={"number": number})})
