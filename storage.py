"""The only module that writes user data: atomic files and folders, content hashes, the append-only journal.

A file is written to a temporary name in the same folder, fsynced, renamed, and the folder fsynced, so a reader sees the
old content or the new, never a part. A folder is built under a temporary name and renamed whole; its manifest is written
last and is the commit mark. Disk-full and permission errors become one-line `HavocError`s.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HASH_CHUNK_BYTES = 1 << 20


def canonical_json(value: object) -> bytes:
    """Serialise to the one JSON form that is hashed: sorted keys, no spaces, UTF-8; NaN and Infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: object) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON is any of six types
    """Parse a JSON file; a missing, unreadable, non-UTF-8, too deep or malformed one, or one with NaN, is a `HavocError`."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        msg = f"{path}: no such file"
        raise HavocError(msg) from None
    except OSError as error:
        raise explained(error, path) from error
    except (ValueError, RecursionError) as error:
        msg = f"{path}: not valid JSON ({str(error) or 'nested too deep'})"
        raise HavocError(msg) from error


def _refuse_constant(name: str) -> float:
    msg = f"{name} is not a JSON number"
    raise ValueError(msg)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically; missing parent folders are made."""
    with open_atomic(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Replace `path` by indented JSON atomically; NaN and Infinity are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` for binary writing; on success fsync and rename it, on any error remove it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str) -> Iterator[Path]:
    """Build a folder under a temporary name and rename it to `path` on success; on any error nothing is left.

    An existing `path` is replaced only when it is empty or holds the file `marker` (so it was written by HAVOC before);
    otherwise a `HavocError` is raised before anything is written. The old folder stays untouched until the new is whole.
    """
    if path.exists() and not _is_replaceable(path, marker):
        msg = (
            f"{path} exists and was not written by this command (no {marker} in it): choose another --out or remove it"
        )
        raise HavocError(msg)
    building = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    retired = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        building.mkdir(parents=True)
        yield building
        for file in sorted(building.rglob("*")):
            if file.is_file():
                _fsync(file)
        _fsync_directory(building)
        if path.exists():
            path.rename(retired)
        building.rename(path)
        _fsync_directory(path.parent)
    except OSError as error:
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise explained(error, path) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _is_replaceable(path: Path, marker: str) -> bool:
    return path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))


class Journal:
    """An append-only file of JSON documents, one a line, each behind its CRC-32 and fsynced.

    A torn last line (the writer was killed) is cut off on opening. A damaged line in the middle is an error: data that was
    once committed has changed, and going on would hide it.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path` and read what it holds into `entries`."""
        self.path = path
        self.entries: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            whole = self._read(data)
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)
                    os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, path) from error

    def _read(self, data: bytes) -> int:
        """Fill `entries`; return the number of leading bytes that are whole lines."""
        position = 0
        while position < len(data):
            end = data.find(b"\n", position)
            line = data[position:] if end < 0 else data[position:end]
            entry = _parse_journal_line(line) if end >= 0 else None
            if entry is None:
                is_last = end < 0 or end == len(data) - 1
                if is_last:
                    return position
                msg = f"{self.path}: line {len(self.entries) + 1} is damaged; restore the file or start with another --out"
                raise HavocError(msg)
            self.entries.append(entry)
            position = end + 1
        return position

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry and return when it is on disk."""
        body = canonical_json(entry)
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        try:
            is_new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                _fsync_directory(self.path.parent)
        except OSError as error:
            raise explained(error, self.path) from error
        self.entries.append(entry)


def _parse_journal_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    entry = json.loads(body)
    return entry if isinstance(entry, dict) else None


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path | str) -> HavocError:
    """What went wrong with `path`, in one line that says what to do."""
    if error.errno == errno.ENOSPC:
        return HavocError(f"{path}: the disk is full; free some space and run the same command again")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return HavocError(f"{path}: no permission ({error.strerror}); choose another --out or change the rights")
    return HavocError(f"{path}: {error.strerror or error}")
