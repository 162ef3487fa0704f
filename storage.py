"""The only module that writes user data: atomic files and folders, content hashes, the append-only journal.

A file is written to a temporary name in the same folder, fsynced, renamed, and the folder fsynced, so a reader sees the
old content or the new, never a part. A folder is built under a temporary name and moved whole; its manifest is written
last and is the commit mark. Disk-full and permission errors become one-line `HavocError`s.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .children import TOO_MANY_FILES
from .errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from io import FileIO

if sys.platform != "win32":
    import fcntl

MAX_JSON_BYTES = 64_000_000
"""More than any JSON document that HAVOC reads: a tokenizer's is the largest."""

MAX_JOURNAL_BYTES = 1_000_000_000
"""A million evaluations."""

_LEFT_BEHIND_S = 60.0
"""The least age of a temporary file without an owner before it counts as left by a killed process."""
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


def read_bounded(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole regular file of at most `max_bytes`.

    A larger file, a pipe and a device are a `HavocError`, without waiting for them; a missing or unreadable file raises
    the system's `OSError`.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise HavocError(f"{path}: a pipe or device, not a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise HavocError(f"{path}: more than {max_bytes} bytes; no valid document is that large")
    return data


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:  # noqa: ANN401 - JSON is any of six types
    """Parse a JSON file; a missing, unreadable, malformed or too deep one is refused; so are NaN and repeated keys.

    At most `max_bytes` are read, even if the file is endless; a larger file is refused.
    """
    try:
        data = read_bounded(path, max_bytes=max_bytes)
    except FileNotFoundError:
        raise HavocError(f"{path}: no such file") from None
    except OSError as error:
        raise unreadable(error, path) from error
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> Any:  # noqa: ANN401 - JSON is any of six types
    """Parse text from `path`, as strictly as `read_json`."""
    try:
        text = _decoded(data)
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_a_key_twice
        )
    except (ValueError, RecursionError) as error:
        raise HavocError(f"{path}: not valid JSON ({str(error) or 'nested too deep'})") from error


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it starts with a byte order mark: save it as UTF-8 without one")
    return data.decode("utf-8")


def _refuse_a_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys: readers disagree about which value counts, so the document has no clear meaning."""
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in document if names.count(name) > 1)[:60]!r} occurs twice in one object"
        )
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:60]} is too large for a number of 64 bits")
    return number


def require_writable(folder: Path) -> None:
    """Raise a `HavocError` if `folder` could not be written, before long work is done for it.

    Nothing is created or changed: only the rights of the folder, or of the nearest existing one above it, are checked.
    """
    nearest = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link at the end
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise HavocError(f"{nearest}: a file, not a folder; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise HavocError(f"{nearest}: no permission to write into it; choose another --out or change the rights")


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
    path = _named(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"))
        with temporary.open("wb") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)  # so that others see that its writer lives
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        raise _blamed(error, path, temporary) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """A private folder in the system's temporary one, removed afterwards; leftovers of killed processes go first."""
    home = Path(tempfile.gettempdir())
    _remove_left_behind(home.glob(f"{glob.escape(prefix)}*"))
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, _locked(Path(folder), Path(folder)):
        yield Path(folder)


def _remove_left_behind(paths: Iterable[Path]) -> None:
    """Remove files and folders that no process holds: their writers were killed. Those of others are not touched."""
    if sys.platform == "win32":
        return
    for path in paths:
        with contextlib.suppress(OSError):  # another process was quicker, or it is not ours to remove
            status = path.lstat()
            is_ours = status.st_uid == os.geteuid() and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
            if not is_ours or time.time() - status.st_mtime < _LEFT_BEHIND_S:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(status.st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def new_directory(path: Path, *, marker: str) -> Iterator[Path]:
    """Build a folder under a temporary name and move it to `path` on success; on any error nothing is left.

    An existing `path` is replaced only if it is empty or contains the file `marker` (so HAVOC wrote it before);
    otherwise, or while another process builds the same `path`, a `HavocError` is raised before anything is written. The
    old folder stays whole until the new one is complete. Leftovers of a killed process are removed first.
    """
    path = _named(path)
    building = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _refuse_foreign(path, marker)
        _remove_abandoned(path)
        building.mkdir(parents=True)
        with _locked(building, path):
            yield building
            _fsync_tree(building)
            _refuse_foreign(path, marker)
            _put_in_place(building, path)
            _fsync(path.parent)
    except OSError as error:
        raise _blamed(error, path, building) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it while its files are written one after another; a second writer is refused.

    A folder made here is removed again if nothing was written into it.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder) from error
    try:
        with _locked(folder, folder):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


@contextlib.contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """Make `folder` and lock `name` in it, for work that only one process may do; other names are independent."""
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_file(path)
    except BlockingIOError as error:
        raise HavocError(f"{folder}: {name} is being made by another process; wait until it ends") from error
    except OSError as error:
        raise explained(error, folder) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked, so that no process waits for a removed file
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    """Open and lock the file of that name; one that its holder removed in the meantime does not count."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if sys.platform == "win32":
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _named(path: Path) -> Path:
    if path.is_symlink():
        link, path = path, Path(os.path.realpath(path))  # the link's target is written; the link stays
        if path.is_symlink():
            raise HavocError(f"{link}: a link that leads to itself; choose another --out")
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() gives up on a loop of links
    if not absolute.name:
        raise HavocError(f"{path}: cannot be written; name a folder or file inside it")
    return path if path.name and path.name != ".." else absolute


def _refuse_foreign(path: Path, marker: str) -> None:
    if not path.exists() or (path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))):
        return
    raise HavocError(f"{path} exists and is not a result of this command (no {marker} in it): choose another --out")


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of `path`; refuse when one is still building it."""
    for building in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        if building.is_dir():
            with _locked(building, path):
                shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _locked(building: Path, path: Path) -> Iterator[None]:
    """Hold the lock of the folder that becomes `path`; the system frees it when the process ends. None on Windows."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(building, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HavocError(f"{path} is being written by another process; wait until it ends") from error
        yield
    finally:
        os.close(descriptor)


def _put_in_place(building: Path, path: Path) -> None:
    """Move the folder to `path`; the folder that was there, if any, is afterwards `building`."""
    if not path.exists():
        building.rename(path)
    elif not _exchange(building, path):
        retired = building.with_suffix(".old")
        path.rename(retired)
        try:
            building.rename(path)
        except BaseException:
            retired.rename(path)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, so a killed process leaves the old or the new; False if the system cannot."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


class Journal:
    """An append-only file of JSON documents, one per line, each after its CRC-32 and fsynced.

    An incomplete last line (the writer was killed) is cut off on opening. A damaged line in the middle is an error:
    committed data has changed, and continuing would hide it.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path` and read its content into `entries`."""
        self.path = path
        self.entries: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = read_bounded(path, max_bytes=MAX_JOURNAL_BYTES) if path.exists() else b""
            self.entries, whole = _whole_entries(data, path)
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)
                    os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, path) from error

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry and return when it is on disk; when that fails the file is as before."""
        body = canonical_json(entry)
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        try:
            is_new = not self.path.exists()
            with self.path.open("ab", buffering=0) as file:
                _append_whole(file, line)
            if is_new:
                _fsync(self.path.parent)
        except OSError as error:
            raise explained(error, self.path) from error
        self.entries.append(entry)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read a journal without changing it, while another process may be writing: a half-written end is left out.

    A missing or unreadable file, or a damaged line in the middle, is a `HavocError`.
    """
    try:
        return _whole_entries(read_bounded(path, max_bytes=MAX_JOURNAL_BYTES), path)[0]
    except FileNotFoundError:
        raise HavocError(f"{path}: no such file") from None
    except OSError as error:
        raise unreadable(error, path) from error


def _whole_entries(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal's bytes, and how many leading bytes are whole lines."""
    entries: list[dict[str, Any]] = []
    position = 0
    while position < len(data):
        end = data.find(b"\n", position)
        line = data[position:] if end < 0 else data[position:end]
        entry = _parse_journal_line(line) if end >= 0 else None
        if entry is None:
            if end < 0 or end == len(data) - 1:
                break
            raise HavocError(f"{path}: line {len(entries) + 1} is damaged; restore it or choose another --out")
        entries.append(entry)
        position = end + 1
    return entries, position


def _append_whole(file: FileIO, line: bytes) -> None:
    """Append all of `line` and fsync; on any error cut the written part off again, so later entries stay readable."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        raise


def _parse_journal_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        return None
    try:
        entry = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _fsync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    if sys.platform == "win32":
        return  # it cannot open a folder, and syncs no file opened for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blamed(error: OSError, path: Path, temporary: Path) -> HavocError:
    """Explain the error with the name that the user knows: `path`, unless the error is about another file."""
    other = error.filename if isinstance(error.filename, str) else ""
    is_ours = not other or temporary.name in other
    return explained(error, path if is_ours else other)


def unreadable(error: OSError, path: Path | str) -> HavocError:
    """Why `path`, or the file inside it that the system names, could not be read, in one line."""
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return HavocError(TOO_MANY_FILES)
    if error.errno == errno.EISDIR:
        return HavocError(f"{error.filename or path}: not a regular file")
    return HavocError(f"{error.filename or path}: cannot be read ({error.strerror or error})")


def explained(error: OSError, path: Path | str) -> HavocError:
    """The problem with `path`, in one line that says what to do."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return HavocError(f"{path}: the disk is full; free some space and run the same command again")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return HavocError(TOO_MANY_FILES)
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return HavocError(f"{path}: no permission ({error.strerror}); choose another --out or change the rights")
    return HavocError(f"{path}: {error.strerror or error}")
