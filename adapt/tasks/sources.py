"""The sources of rows, and the three splits, which never share a row: train, search, gate.

The split of a generated row depends on the SHA-256 of its problem, 70 / 15 / 15 out of a hundred. So the splits are
disjoint for all seeds, and the first n of n + 1 rows are the n rows.

Rows that are read come in the order of the data (a seed has no effect there), from the part and the share that the task
file gives each split. A problem that occurs in two parts stays in the last of them (train, search, gate) and is left
out of the others. Every row is checked: one that cannot be asked or judged is refused with its file and row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import HavocError
from ...model.picture import fitted_png, open_picture
from .readers import LocalFiles, Place, opened
from .splits import (
    SPLITS,
    assert_disjoint,
    content_hash,
    generated_rows,
    group_hash,
    groups_of_later_splits,
    groups_of_part,
    is_in_share,
    problem_hash,
    row_columns,
    rows_hash,
    split_of,
    split_rule,
)
from .task import Row, Task, load_task

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "SPLITS",
    "RowReader",
    "assert_disjoint",
    "content_hash",
    "data_hash",
    "gate_rows_among",
    "problem_hash",
    "rows",
    "rows_hash",
    "rows_of_file",
    "search_reader",
    "split_of",
]


def rows(
    task: Task | str,
    split: str,
    num_rows: int,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
    may_be_fewer: bool = False,
) -> list[Row]:
    """Return `num_rows` distinct rows of one split, always the same rows.

    `task` is a task, or an argument of `load_task`. Pictures become upright PNG of `Task.image_side` squared. Raises
    `HavocError` if there are fewer rows (with their number), if the data is missing, unreadable or without a column, if
    a row cannot be asked or judged, and if the data is not the one that the task file pins. With `may_be_fewer` a data
    set gives all its rows, such as the 500 test rows of mbpp if 1000 are asked for; no row at all is an error.
    """
    if isinstance(task, str):
        task = load_task(task, is_public=data_dir is not None or online)
    if split not in SPLITS:
        raise HavocError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num_rows < 0:
        raise HavocError(f"num_rows is {num_rows}: give 0 or more")
    if task.generator is not None:
        return list(itertools.islice(generated_rows(task, split, seed), num_rows))
    with opened(task, data_dir=data_dir, online=online) as place:
        _require_pinned(task, split, place)
        found = _read(task, split, num_rows, place)
    if len(found) < num_rows and not (may_be_fewer and found):
        raise HavocError(
            f"{task.name}: {task.dataset} has {len(found)} rows for the {split} split, but {num_rows} were asked for: "
            f"ask for at most {len(found)}"
        )
    return found


def rows_of_file(task: Task, path: Path) -> list[Row]:
    """Every row of a file of solved rows with the task's columns, in the file's order: jsonl, json, csv or parquet.

    Raises `HavocError` for a file that is missing or unreadable, and for a row that cannot be asked or judged.
    """
    found = []
    for where, raw in LocalFiles(path, task.definition.data, "").rows("", row_columns(task)):
        try:
            row = _with_png(task, raw)
            task.check(row)
        except HavocError as error:
            raise HavocError(f"{where}: {error}") from error
        found.append(row)
    return found


def gate_rows_among(task: Task, some_rows: Sequence[Row], *, data_dir: Path | None = None, online: bool = False) -> int:
    """Number of `some_rows` in the gate split, by their problem; for data that is read, by their group."""
    if task.generator is not None:
        return sum(split_of(problem_hash(row, task)) == "gate" for row in some_rows)
    rule = split_rule(task, "gate")
    with opened(task, data_dir=data_dir, online=online) as place:
        held = groups_of_part(task, place, rule.part)
    groups = [group_hash(task, row) for row in some_rows]
    return sum(group in held and is_in_share(group, rule) for group in groups)


def data_hash(task: Task, split: str, *, data_dir: Path | None = None, online: bool = False) -> str | None:
    """Hex SHA-256 of the bytes of the files that a split is read from; None for generated rows and for the hub."""
    if task.generator is not None:
        return None
    with opened(task, data_dir=data_dir, online=online) as place:
        return place.sha256(split_rule(task, split).part)


def _require_pinned(task: Task, split: str, place: Place) -> None:
    pinned = task.definition.data.data_sha256.get(split)  # type: ignore[call-overload] # another name finds nothing
    if pinned is None:
        return
    found = place.sha256(split_rule(task, split).part)
    if found != pinned:
        is_found = "the hub gives none" if found is None else f"this is {found}"
        raise HavocError(f"{task.name}: data_sha256 pins the {split} split to {pinned}, but {is_found}: use that data")


def _read(task: Task, split: str, num_rows: int, place: Place) -> list[Row]:
    rule, found = split_rule(task, split), dict[str, Row]()
    taken = groups_of_later_splits(task, split, place) if num_rows else set()
    leaked = {group_hash(task, example) for example in task.examples} if split == "gate" else set()
    for where, raw in place.rows(rule.part, row_columns(task)):
        if len(found) >= num_rows:
            break
        try:
            group = group_hash(task, raw)
            if group in taken or not is_in_share(group, rule):
                continue
            row = _checked(task, split, raw, is_leaked=group in leaked)
        except HavocError as error:
            raise HavocError(f"{where}: {error}") from error
        found.setdefault(problem_hash(row, task), row)
    return list(found.values())


def _checked(task: Task, split: str, raw: Row, *, is_leaked: bool) -> Row:
    """Return the row as a model gets it; a row that does not belong here, or cannot be judged, is refused."""
    if is_leaked:
        raise HavocError("is a row of the gate split that every prompt shows solved (few_shot.rows): a leak")
    if (condition := task.must(split, raw)) is not None:
        raise HavocError(f"`{condition}` is not true for {_named(task, raw)}: check that these are the right files")
    row = _with_png(task, raw)
    task.check(row)
    return row


def _named(task: Task, row: Row) -> str:
    return ", ".join(f"{name} {row[name]}" for name in task.definition.data.ids if name in row) or "it"


def _with_png(task: Task, row: Row) -> Row:
    """Return the row with its picture, upright and in RGB, as PNG bytes of `task.image_side` squared."""
    column = task.definition.prompt.image
    if column is None:
        return row
    held = row.get(column)
    if isinstance(held, dict):
        held = held.get("bytes")
    if not isinstance(held, bytes):
        raise HavocError(f"{column} has no picture; use files that contain the pictures")
    return row | {column: fitted_png(open_picture(held), task.image_side)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """A reader that can open only some splits; the search has one (`search_reader`) that cannot open the gate split."""

    splits: tuple[str, ...]
    seed: int = 0
    data_dir: Path | None = None
    online: bool = False

    def rows(self, task: Task | str, split: str, num_rows: int, *, may_be_fewer: bool = False) -> list[Row]:
        """As `rows` above; a split that this reader cannot open is a `HavocError`."""
        if split not in self.splits:
            raise HavocError(f"this reader can open only {', '.join(self.splits)}, not the {split} split")
        return rows(
            task,
            split,
            num_rows,
            seed=self.seed,
            data_dir=self.data_dir,
            online=self.online,
            may_be_fewer=may_be_fewer,
        )


def search_reader(*, seed: int = 0, data_dir: Path | None = None, online: bool = False) -> RowReader:
    """Return a reader for training and search; it refuses the gate split."""
    return RowReader(splits=SPLITS[:2], seed=seed, data_dir=data_dir, online=online)
