"""Read the public datasets that the tasks are named for: gsm8k, mbpp, ai2_arc ARC-Easy, textvqa.

Which part of a dataset serves which split, and the layout of a local directory, stand in `sources.py`. Nothing is
downloaded unless `online` was asked for, and a folder that happens to be called like a dataset is never taken for it.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HavocError
from ...storage import sha256_json
from .sources import open_image, problem_hash

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .task import Row, Task

_SEARCH_FROM = 0.85
_MBPP_TEST_IDS = range(11, 511)


@dataclass(frozen=True, slots=True)
class _Public:
    """A dataset's folder, the part each split comes from, and the columns that say which problem a row is about.

    Rows that agree in those columns never stand in two splits. `train` and `search` may share a part, cut by hash.
    """

    folder: str
    parts: dict[str, str]
    about: tuple[str, ...]


_PUBLIC = {
    "math": _Public("gsm8k/main", {"train": "train", "search": "train", "gate": "test"}, ("question",)),
    "code": _Public("mbpp/full", {"train": "train", "search": "validation", "gate": "test"}, ("text",)),
    "reasoning": _Public("ai2_arc/ARC-Easy", {"train": "train", "search": "validation", "gate": "test"}, ("question",)),
    "vision": _Public("textvqa/data", {"train": "train", "search": "train", "gate": "validation"}, ("image_id",)),
}


def read(task: Task, split: str, num_rows: int, *, data_dir: Path | None, online: bool, image_side: int) -> list[Row]:
    """Return up to `num_rows` distinct rows of one split, in the dataset's order."""
    if data_dir is not None and online:
        raise HavocError("choose either --data or --online: the rows come from one place")
    source = _PUBLIC[task.domain]
    part = source.parts[split]
    found: dict[str, Row] = {}
    with _reading(task, source, data_dir) as place:
        taken = _problems_of_later_splits(place, source, split)
        for raw in place.rows(part, task.columns):
            if len(found) >= num_rows:
                break
            about = _about(raw, source)
            if about in taken or not _is_in_share(about, source, split):
                continue
            _check_row(task, part, split, raw)
            row = _with_png(raw, image_side)
            found.setdefault(problem_hash(row), row)
    return list(found.values())


def _problems_of_later_splits(place: _Place, source: _Public, split: str) -> set[str]:
    """Problems that a split with precedence holds, of parts other than this split's own."""
    later = {"train": ("search", "gate"), "search": ("gate",), "gate": ()}[split]
    parts = {source.parts[name] for name in later} - {source.parts[split]}
    return {_about(row, source) for part in sorted(parts) if place.has(part) for row in place.rows(part, source.about)}


def _about(row: Row, source: _Public) -> str:
    return sha256_json([row[name] for name in source.about])


def _is_in_share(about: str, source: _Public, split: str) -> bool:
    if source.parts["train"] != source.parts["search"] or split == "gate":
        return True
    is_for_search = int(about[:8], 16) / 2**32 >= _SEARCH_FROM
    return is_for_search == (split == "search")


def _check_row(task: Task, part: str, split: str, row: Row) -> None:
    if task.domain == "code" and (row["task_id"] in _MBPP_TEST_IDS) != (split == "gate"):
        raise HavocError(
            f"mbpp: the {part} part holds task_id {row['task_id']}, but ids 11-510 are the test tasks and only they: "
            "the files are mixed up"
        )


def _with_png(row: Row, image_side: int) -> Row:
    """The row with its picture as PNG bytes of `image_side` squared, proportions kept, the rest black."""
    if "image" not in row:
        return row
    from PIL import Image, ImageOps

    held = row["image"]
    if isinstance(held, dict):
        held = held.get("bytes")
    if held is None:
        raise HavocError("textvqa: a row holds no picture; use parquet files with the pictures inside")
    image = open_image(held)
    if image.size != (image_side, image_side):
        image = ImageOps.pad(image, (image_side, image_side), method=Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    return row | {"image": file.getvalue()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the parts of one dataset lie: a local folder, or the hub when `folder` is None."""

    datasets: Any
    task: Task
    folder: Path | None
    scratch: str

    def has(self, part: str) -> bool:
        return self.folder is None or bool(self._files(part))

    def rows(self, part: str, columns: tuple[str, ...]) -> Iterator[Row]:
        """Rows of one part with these columns, read as they are asked for; nothing is copied to a cache."""
        name = f"{self.folder or self.task.dataset} ({part})"
        files = self._files(part)
        if self.folder is not None and not files:
            raise HavocError(
                f"{self.folder}/{part}-*.parquet: no such files; put there what `hf download {self.task.dataset} "
                f"--repo-type dataset` gets, or use --online to read it from the hub"
            )
        try:
            yield from self._stream(name, part, files, columns)
        except HavocError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise HavocError(f"{name}: cannot be read ({lines[0][:200]})") from error

    def _files(self, part: str) -> list[str]:
        if self.folder is None:
            return []
        return [
            str(file) for name in (f"{part}-*.parquet", f"{part}.parquet") for file in sorted(self.folder.glob(name))
        ]

    def _stream(self, name: str, part: str, files: list[str], columns: tuple[str, ...]) -> Iterator[Row]:
        there = self._open(part, files).column_names
        missing = [column for column in columns if column not in there]
        if missing:
            raise HavocError(
                f"{name}: no column {', '.join(missing)} (there are {', '.join(there)}); expected those of "
                f"{self.task.dataset} {self.task.subset or ''}".rstrip()
            )
        stream = self._open(part, files, columns=list(columns))
        if "image" in columns and isinstance(stream.features["image"], self.datasets.Image):
            stream = stream.cast_column("image", self.datasets.Image(decode=False))
        with contextlib.closing(iter(stream)) as opened:
            yield from opened

    def _open(self, part: str, files: list[str], *, columns: list[str] | None = None) -> Any:  # noqa: ANN401 - untyped
        if self.folder is None:
            return self.datasets.load_dataset(
                self.task.dataset, self.task.subset, split=part, streaming=True, columns=columns
            )
        return self.datasets.load_dataset(
            "parquet", data_files={part: files}, split=part, streaming=True, columns=columns, cache_dir=self.scratch
        )


@contextlib.contextmanager
def _reading(task: Task, source: _Public, data_dir: Path | None) -> Iterator[_Place]:
    """Open the place the rows come from; the hub stays unreachable unless it is that place."""
    folder = data_dir / source.folder if data_dir is not None else None
    if data_dir is not None and not data_dir.is_dir():
        raise HavocError(f"{data_dir}: no such directory; give the one that holds {source.folder}, or use --online")
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise HavocError('the public datasets need the lab: pip install "havoc-core[lab]"') from error
    was_offline = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if folder is None and any(was_offline):
        raise HavocError(f"--online cannot reach {task.dataset}: HF_HUB_OFFLINE is set; unset it or give --data DIR")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told once, by the error
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = folder is not None
    try:
        with tempfile.TemporaryDirectory(prefix="havoc-datasets-") as scratch:
            yield _Place(datasets, task, folder, scratch)
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)
