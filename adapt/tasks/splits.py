"""The split of a row, by the hash of its problem; and the solved rows at the beginning of a prompt.

The `problem_hash` of a generated row chooses its split, 70 / 15 / 15 out of a hundred. A row that is read belongs to
the split of its part and share, unless a split with precedence (gate, search, train) also holds its group.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError
from ...storage import sha256_json
from .readers import Place, opened
from .template import Expression

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from .asked import Task
    from .definition import Split
    from .reward import Row

SPLITS = ("train", "search", "gate")
SplitName = Literal["train", "search", "gate"]

_ENDS = {"train": 0.70, "search": 0.85, "gate": 1.0}
_MAX_MISSES = 5_000
"""If this many rows in sequence bring no new row for the split, the generator has almost none left."""
_IDS = ("id", "task_id", "question_id", "image_id", "set_name", "flickr_original_url", "flickr_300k_url")
"""Columns that identify a row and do not change it."""


def split_of(key: str) -> SplitName:
    """Split of a built-in row by the first four bytes of its `problem_hash`, as a fraction of their range."""
    place = int(key[:8], 16) / 2**32
    if place < _ENDS["train"]:
        return "train"
    return "search" if place < _ENDS["search"] else "gate"


def split_rule(task: Task, split: str) -> Split:
    """The task file's rule for a split; a split without rows is a `HavocError`."""
    splits = task.definition.data.splits
    if split not in splits:
        raise HavocError(f"{task.name}: its file has rows only for the splits {', '.join(splits)}, not for {split}")
    return splits[split]


def row_columns(task: Task) -> tuple[str, ...]:
    """Columns to read: those that the task names, and its ids if they exist."""
    return tuple(dict.fromkeys([*task.definition.data.ids, *task.columns]))


def group_hash(task: Task, row: Row) -> str:
    """SHA-256 over the part of a row that may be in only one split."""
    return sha256_json(_canonical(task.group(row)))


def groups_of_later_splits(task: Task, split: str, place: Place) -> set[str]:
    """Groups of splits with precedence, in parts other than this split's own."""
    splits = dict(task.definition.data.splits)
    names = SPLITS[SPLITS.index(split) + 1 :]
    parts = {rule.part for name, rule in splits.items() if name in names} - {split_rule(task, split).part}
    return _groups(task, place, parts)


def groups_of_part(task: Task, place: Place, part: str) -> set[str]:
    """Groups in a part of the data."""
    return _groups(task, place, {part})


def _groups(task: Task, place: Place, parts: set[str]) -> set[str]:
    names = sorted({name for source in task.group_sources for name in Expression(source).columns})
    return {group_hash(task, row) for part in sorted(parts) if place.has(part) for _, row in place.rows(part, names)}


def is_in_share(group: str, rule: Split) -> bool:
    """Whether the group's hash, as a fraction of its range, is in the split's share of the part."""
    return rule.start <= int(group[:8], 16) / 2**32 < rule.end


def examples(task: Task, *, data_dir: Path | None = None, online: bool = False) -> tuple[Row, ...]:
    """Return the solved rows at the beginning of a task's prompts, and one more if possible.

    They are rows written in the file, or rows of the split `few_shot.split`: in the order of the data (as
    lm-evaluation-harness's sampler "first_n") or sampled from all of it; never rows of the gate split.
    """
    rule, wanted = task.definition.few_shot, task.num_few_shot + 1
    if rule.rows:
        for number, row in enumerate(rule.rows, start=1):
            try:
                task.check(row)
            except HavocError as error:
                raise HavocError(f"{task.name}: few_shot.rows, row {number}: {error}") from error
        return rule.rows[:wanted]
    if task.generator is not None:
        return tuple(itertools.islice(generated_rows(task, rule.split, rule.seed), wanted))
    splits, part = task.definition.data.splits, split_rule(task, rule.split).part
    gate = splits.get("gate")
    found: list[Row] = []
    with opened(task, data_dir=data_dir, online=online) as place:
        taken = set() if gate is None or gate.part == part else _groups(task, place, {gate.part})
        for where, row in place.rows(part, row_columns(task)):
            if len(found) >= wanted and rule.choose == "first":
                break
            group = group_hash(task, row)
            if group in taken or (gate is not None and gate.part == part and is_in_share(group, gate)):
                continue
            try:
                task.check(row)
            except HavocError as error:
                raise HavocError(f"{where}: {error}") from error
            found.append(row)
    if rule.choose == "sample" and len(found) > wanted:
        found = random.Random(f"havoc few-shot {rule.seed}").sample(found, wanted)
    return tuple(found)


def generated_rows(task: Task, split: str, seed: int) -> Iterator[Row]:
    """Rows of one split from a task's generator, without end."""
    seen: set[str] = set()
    num_misses = 0
    for index in itertools.count():
        row = task.make_row(random.Random(f"havoc {task.definition.data.generator} {seed} {index}"), index)
        key = problem_hash(row, task)
        if split_of(key) != split or key in seen:
            num_misses += 1
            if num_misses > _MAX_MISSES:
                raise HavocError(
                    f"{task.name}: the generator has only about {len(seen)} different rows for the {split} split: "
                    "ask for fewer"
                )
            continue
        num_misses = 0
        seen.add(key)
        yield row


def content_hash(row: Row) -> str:
    """SHA-256 over the content of a row: without ids, and with the pixels of a picture instead of its PNG bytes."""
    return sha256_json({name: _canonical(value) for name, value in row.items() if name not in _IDS})


def problem_hash(row: Row, task: Task) -> str:
    """SHA-256 over the problem of a row, as the task's file defines it, without answer and ids."""
    return sha256_json(_canonical(task.problem(row)))


def rows_hash(some_rows: Sequence[Row]) -> str:
    """SHA-256 that identifies these rows in this order, for a record."""
    return sha256_json([content_hash(row) for row in some_rows])


def assert_disjoint(splits: Mapping[str, Sequence[Row]], task: Task) -> None:
    """Raise `HavocError` if a problem occurs in two of the splits, or twice in one."""
    where: dict[str, str] = {}
    for split, some_rows in splits.items():
        keys = Counter(problem_hash(row, task) for row in some_rows)
        for key, num_times in keys.items():
            if num_times > 1:
                raise HavocError(f"the {split} split has the same problem {num_times} times (hash {key[:12]})")
            if key in where:
                raise HavocError(f"the {where[key]} and {split} splits share a problem (hash {key[:12]})")
        where.update(dict.fromkeys(keys, split))


def _canonical(value: Any) -> Any:  # noqa: ANN401 - a row holds JSON values, PNG bytes or a PIL image
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        from ...model.picture import open_picture  # so that a task without pictures needs neither numpy nor pillow

        image = open_picture(value)
        return [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    return value
