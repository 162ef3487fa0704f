"""Read the rows of one part of a data set: local parquet, jsonl, json or csv files, or the hub.

    with opened(task, data_dir=Path("data"), online=False) as place:
        for where, row in place.rows("test", ("question", "answer")):      # where: "data/test.jsonl, row 3"

Rows come in the order of the files and are read one after another when needed; nothing is copied to a cache. Values are
plain JSON values, and bytes for pictures. jsonl, json and csv need no library; parquet needs pyarrow (the extra
`data`), the hub needs `datasets` (the lab). In csv every value is text; a column that the task declares as a number or
as texts is read as JSON.
"""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import decimal
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HavocError
from ...storage import sha256_file
from .definition import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from .asked import Task
    from .definition import Data
    from .reward import Row

_MAX_JSON_BYTES = 1 << 29
_MAX_LINE_CHARS = 1 << 24
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """A folder with the parts of a data set, or a single file that serves as every part."""

    root: Path
    data: Data
    hint: str

    def has(self, part: str) -> bool:
        """Whether there are files of `part`."""
        return bool(self.files(part))

    def files(self, part: str) -> list[Path]:
        """Files of `part`: the root itself, a file with this name, or PART-*.EXT and PART.EXT in one format."""
        if self.root.is_file():
            return [self.root]
        if (self.root / part).is_file():
            return [self.root / part]
        for ending in FORMATS:
            patterns = (f"{part}-*.{ending}", f"{part}.{ending}")
            if found := [path for pattern in patterns for path in sorted(self.root.glob(pattern)) if path.is_file()]:
                return found
        return []

    def sha256(self, part: str) -> str:
        """Hex SHA-256 over the content hashes of the part's files, in their order; names do not count."""
        return hashlib.sha256("".join(sha256_file(path) for path in self._required(part)).encode()).hexdigest()

    def rows(self, part: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Rows of one part with these columns, each with its place."""
        optional = frozenset(self.data.ids)
        for path in self._required(part):
            try:
                for number, row in enumerate(_rows_of(path, self.data, columns, optional), start=1):
                    yield f"{path}, row {number}", row
            except HavocError:
                raise
            except Exception as error:  # libraries raise many types for a broken file
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise HavocError(f"{path}: cannot be read ({lines[0][:200]})") from error

    def _required(self, part: str) -> list[Path]:
        if found := self.files(part):
            return found
        if self.root.suffix.lstrip(".") in FORMATS:
            raise HavocError(f"{self.root}: no such file{self.hint}")
        raise HavocError(f"{self.root}/{part}-*.{{{','.join(FORMATS)}}}: no such files{self.hint}")


def _rows_of(path: Path, data: Data, columns: Sequence[str], optional: frozenset[str]) -> Iterator[Row]:
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise HavocError(
            f"{path}: rows are read from {', '.join(FORMATS)}, not from .{kind or 'a file without ending'}"
        )
    read = {"parquet": _parquet, "jsonl": _jsonl, "json": _json, "csv": _csv}[kind]
    for row in read(path, columns, optional):
        yield _typed(row, data) if kind == "csv" else {name: _plain(value) for name, value in row.items()}


def _parquet(path: Path, columns: Sequence[str], optional: frozenset[str]) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise HavocError(f'{path}: parquet files need pyarrow: pip install "havoc-core[data]"') from error
    with pyarrow.parquet.ParquetFile(path) as file:
        there = file.schema_arrow.names
        wanted = _present(path, columns, optional, there)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            yield from batch.to_pylist()


def _jsonl(path: Path, columns: Sequence[str], optional: frozenset[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(_MAX_LINE_CHARS + 1):
            if len(line) > _MAX_LINE_CHARS:
                raise HavocError(f"{path}, row {number + 1}: a line of more than {_MAX_LINE_CHARS} characters")
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise HavocError(f"{path}, row {number}: not valid JSON ({error})") from error
            yield _chosen(f"{path}, row {number}", row, columns, optional)


def _json(path: Path, columns: Sequence[str], optional: frozenset[str]) -> Iterator[Row]:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise HavocError(f"{path}: {size} bytes of JSON; write more than {_MAX_JSON_BYTES} as jsonl")
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise HavocError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(table, list):
        raise HavocError(f"{path}: holds {type(table).__name__}, expected a list of rows")
    for number, row in enumerate(table, start=1):
        yield _chosen(f"{path}, row {number}", row, columns, optional)


def _csv(path: Path, columns: Sequence[str], optional: frozenset[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        wanted = _present(path, columns, optional, list(reader.fieldnames or ()))
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise HavocError(f"{path}, row {number}: its number of fields differs from that of the first line")
            yield {name: row[name] for name in wanted}


def _present(path: Path, columns: Sequence[str], optional: frozenset[str], there: Sequence[str]) -> list[str]:
    if missing := [column for column in columns if column not in there and column not in optional]:
        raise HavocError(f"{path}: no column {', '.join(missing)} (there are {', '.join(there) or 'none'})")
    return [column for column in columns if column in there]


def _chosen(where: str, row: object, columns: Sequence[str], optional: frozenset[str]) -> Row:
    if not isinstance(row, dict):
        raise HavocError(f"{where}: holds {type(row).__name__}, expected an object with the columns as keys")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HavocError(f"{where}: has half of a surrogate pair (such as \\ud800), which is not text") from error
    if missing := [column for column in columns if column not in row and column not in optional]:
        there = ", ".join(map(str, row))[:200] or "none"
        raise HavocError(f"{where}: no column {', '.join(missing)} (there are {there})")
    return {column: row[column] for column in columns if column in row}


def _typed(row: Row, data: Data) -> Row:
    typed: Row = {}
    for name, value in row.items():
        typed[name] = value
        if data.columns.get(name) in {"number", "texts"}:
            with contextlib.suppress(ValueError):  # it stays text, which the check of the row reports
                typed[name] = _plain(json.loads(value))
    return typed


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of a file in, JSON values and bytes out
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dt.date | dt.time | dt.timedelta | decimal.Decimal):
        return str(value)
    return value


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the hub, read as a stream."""

    datasets: Any
    data: Data

    def has(self, part: str) -> bool:
        """Whether a part is named; the hub is asked only when the part is read."""
        return bool(part)

    def sha256(self, part: str) -> None:
        """None: a stream has no files to hash."""

    def rows(self, part: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Rows of one part with these columns, each with its place."""
        name = f"{self.data.hub} ({part})"
        try:
            for number, row in enumerate(self._stream(name, part, columns), start=1):
                yield f"{name}, row {number}", {column: _plain(value) for column, value in row.items()}
        except HavocError:
            raise
        except Exception as error:  # as above
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise HavocError(f"{name}: cannot be read ({lines[0][:200]})") from error

    def _stream(self, name: str, part: str, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        stream = self.datasets.load_dataset(self.data.hub, self.data.subset, split=part, streaming=True)
        there = list(stream.column_names or columns)
        missing = [column for column in columns if column not in there and column not in self.data.ids]
        if missing:
            raise HavocError(f"{name}: no column {', '.join(missing)} (there are {', '.join(there)})")
        stream = stream.select_columns([column for column in columns if column in there])
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, self.datasets.Image):
                stream = stream.cast_column(column, self.datasets.Image(decode=False))
        with contextlib.closing(iter(stream)) as opened_stream:
            yield from opened_stream


Place = LocalFiles | Hub


@contextlib.contextmanager
def opened(task: Task, *, data_dir: Path | None, online: bool) -> Iterator[Place]:
    """Open the source of a task's rows; the hub is never asked unless it is the source."""
    if data_dir is not None and online:
        raise HavocError("give either --data or --online, not both")
    data = task.definition.data
    if not online:
        yield _local(task, data_dir)
        return
    if data.hub is None:
        raise HavocError(f"{task.name}: its file names no data set on the hub (data.hub): leave out --online")
    with _hub(data) as place:
        yield place


def _local(task: Task, data_dir: Path | None) -> LocalFiles:
    data = task.definition.data
    if data_dir is not None and not data_dir.is_dir():
        raise HavocError(
            f"{data_dir}: no such directory; give the directory with {data.path or 'the data'}, or use --online"
        )
    if data.path is None:
        raise HavocError(
            f"{task.name}: its rows come from {data.hub}: use --online, or give data.path in the task file"
        )
    roots = [folder / data.path for folder in (data_dir, task.folder) if folder is not None]
    if not roots:
        hint = " or --online" if data.hub else ""
        raise HavocError(f"{task.name}: its rows are read from {data.path}: give --data DIR{hint}")
    hint = ""
    if data.hub:
        hint = f"; download the data with `hf download {data.hub} --repo-type dataset`, or read it with --online"
    return LocalFiles(next((root for root in roots if root.exists()), roots[0]), data, hint)


@contextlib.contextmanager
def _hub(data: Data) -> Iterator[Hub]:
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise HavocError('data sets from the hub need the lab: pip install "havoc-core[lab]"') from error
    if datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE:
        raise HavocError(f"--online cannot reach {data.hub}: HF_HUB_OFFLINE is set; unset it or give --data DIR")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # problems are reported once, by the error
    try:
        yield Hub(datasets, data)
    finally:
        datasets.logging.set_verbosity(verbosity)
