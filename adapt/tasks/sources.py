"""Where rows come from, and the three splits that never share one: train, search, gate.

Built-in rows (the default) are made by the task's generator and fall into a split by the SHA-256 of the problem they
ask, 70 / 15 / 15 out of a hundred; so the splits are disjoint whatever the seeds, and the first n of n + 1 rows are the
n rows.

Real rows are read through `datasets` from parquet files in `data_dir`, or with `online` from the hub, in the dataset's
own order (a seed chooses nothing there). Layout of `data_dir`, which is what `hf download` of each dataset leaves:

    gsm8k/main/{train,test}-*.parquet
        train and search: 85 and 15 percent of the train part, by hash; gate: test
    mbpp/full/{train,validation,test}-*.parquet
        train: train (374 rows, ids 601-974); search: validation (90, ids 511-600); gate: test (500, ids 11-510)
    ai2_arc/ARC-Easy/{train,validation,test}-*.parquet
        train: train; search: validation; gate: test
    textvqa/data/{train,validation}-*.parquet
        train and search: 85 and 15 percent of the train part, by picture; gate: validation (test has no answers)

A problem that occurs in two parts stays in the last of them (train, search, gate) and is left out of the others.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError
from ...storage import sha256_json
from .task import Row, Task, task_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

SPLITS = ("train", "search", "gate")
Split = Literal["train", "search", "gate"]

_ENDS = {"train": 0.70, "search": 0.85, "gate": 1.0}
_MAX_MISSES = 5_000
"""So many rows in a row without a new one for the split mean that the generator has hardly any left."""
_IDS = ("id", "task_id", "question_id", "image_id", "set_name", "flickr_original_url", "flickr_300k_url")
"""Columns that name a row and do not change it."""
_MAX_IMAGE_PIXELS = 50_000_000


def rows(
    domain: str,
    split: str,
    num_rows: int,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
    image_side: int = 32,
    may_be_fewer: bool = False,
) -> list[Row]:
    """Return `num_rows` distinct rows of one split, always the same ones.

    Real pictures are fitted into `image_side` x `image_side` pixels, the size of the built-in ones. Raises `HavocError`
    when there are fewer rows, with their number, or when the data is missing, unreadable or lacks a column. With
    `may_be_fewer` a real data set gives all it has, as mbpp its 500 test rows of 1000 asked; none is an error.
    """
    task = task_for(domain)
    if split not in SPLITS:
        raise HavocError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if num_rows < 0:
        raise HavocError(f"{num_rows} rows were asked for: give 0 or more")
    if data_dir is None and not online:
        return list(itertools.islice(_built_in(task, split, seed), num_rows))
    from . import public

    found = public.read(task, split, num_rows, data_dir=data_dir, online=online, image_side=image_side)
    if len(found) < num_rows and not (may_be_fewer and found):
        raise HavocError(
            f"{domain}: {task.dataset} has {len(found)} rows for the {split} split and {num_rows} were asked for: "
            f"ask for at most {len(found)}"
        )
    return found


def _built_in(task: Task, split: str, seed: int) -> Iterator[Row]:
    seen: set[str] = set()
    num_misses = 0
    for index in itertools.count():
        row = task.make_row(random.Random(f"havoc {task.domain} {seed} {index}"), index)
        key = problem_hash(row)
        if split_of(key) != split or key in seen:
            num_misses += 1
            if num_misses > _MAX_MISSES:
                raise HavocError(
                    f"{task.domain}: the generator has hardly more than {len(seen)} rows for the {split} split: "
                    "ask for fewer"
                )
            continue
        num_misses = 0
        seen.add(key)
        yield row


def split_of(key: str) -> Split:
    """Split of a built-in row by its `problem_hash`: the first four bytes as a fraction of their range."""
    place = int(key[:8], 16) / 2**32
    if place < _ENDS["train"]:
        return "train"
    return "search" if place < _ENDS["search"] else "gate"


def content_hash(row: Row) -> str:
    """SHA-256 over all that a row says: ids left out, a picture by its pixels and not by how its PNG was written."""
    return sha256_json({name: _canonical(value) for name, value in row.items() if name not in _IDS})


def problem_hash(row: Row) -> str:
    """SHA-256 over what a row asks, whatever its answer, its ids and its choices.

    Of a code row's tests only the first counts, because the prompt shows only the first.
    """
    if "image" in row:
        asked: list[object] = [row["question"], _canonical(row["image"])]
    elif "test_list" in row:
        asked = [row["text"], list(row["test_list"][:1])]
    else:
        asked = [row["question"]]
    return sha256_json(asked)


def rows_hash(some_rows: Sequence[Row]) -> str:
    """SHA-256 that names these rows in this order, for a record."""
    return sha256_json([content_hash(row) for row in some_rows])


def assert_disjoint(splits: Mapping[str, Sequence[Row]]) -> None:
    """Raise `HavocError` when a problem occurs in two of the splits, or twice in one."""
    where: dict[str, str] = {}
    for split, some_rows in splits.items():
        keys = Counter(problem_hash(row) for row in some_rows)
        for key, num_times in keys.items():
            if num_times > 1:
                raise HavocError(f"the {split} split holds one problem {num_times} times (hash {key[:12]})")
            if key in where:
                raise HavocError(f"the {where[key]} and {split} splits share a problem (hash {key[:12]})")
        where.update(dict.fromkeys(keys, split))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """The right to read some splits and no others; the search holds one (`search_reader`) that cannot open the gate."""

    splits: tuple[str, ...]
    seed: int = 0
    data_dir: Path | None = None
    online: bool = False
    image_side: int = 32

    def rows(self, domain: str, split: str, num_rows: int) -> list[Row]:
        """As `rows` above; another split than those of this reader is a `HavocError`."""
        if split not in self.splits:
            raise HavocError(f"this reader opens {', '.join(self.splits)}; the {split} split stays closed to it")
        return rows(
            domain,
            split,
            num_rows,
            seed=self.seed,
            data_dir=self.data_dir,
            online=self.online,
            image_side=self.image_side,
        )


def search_reader(
    *, seed: int = 0, data_dir: Path | None = None, online: bool = False, image_side: int = 32
) -> RowReader:
    """Give a reader for training and search; it refuses the gate split."""
    return RowReader(splits=SPLITS[:2], seed=seed, data_dir=data_dir, online=online, image_side=image_side)


def _canonical(value: Any) -> object:  # noqa: ANN401 - a row holds JSON values, PNG bytes or a PIL image
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        image = open_image(value)
        return [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    return value


def open_image(data: Any) -> Any:  # noqa: ANN401 - bytes or a PIL image in, an RGB PIL image out
    """Decode a picture to RGB; broken bytes and more than 50 million pixels are a `HavocError`."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        if image.width * image.height > _MAX_IMAGE_PIXELS:
            raise HavocError(f"a picture of {image.width} x {image.height} pixels is larger than {_MAX_IMAGE_PIXELS}")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise HavocError(f"a picture cannot be decoded ({error})") from error
