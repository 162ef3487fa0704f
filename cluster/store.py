"""A worker's cache of files, named by the hash of their content: each content is sent to a worker once.

    files/SHA256            contents; each is checked against its name before it is stored
    trees/HASH-KIND/...     folders built from these files: base, basis, experts and artifacts are opened there

Several workers of a machine may share a store: files and folders appear only when they are complete. The store may be
deleted when no worker uses it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HavocError, MeasurementError
from ..storage import explained, sha256_file
from .worker_requests import StoredFile, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PIECE_BYTES = 4_000_000


def default_store() -> Path:
    """The cache folder of this user: `$XDG_CACHE_HOME/havoc/worker`, else `~/.cache/havoc/worker`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "havoc" / "worker"


def tree_of(parts: Mapping[str, Path]) -> tuple[Tree, dict[str, Path]]:
    """Return the tree of files and folders under the given names, and the path of each content by its hash."""
    files: dict[str, StoredFile] = {}
    sources: dict[str, Path] = {}
    for name, root in parts.items():
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_dir() or any(part.startswith(".") for part in path.relative_to(root).parts):
                continue
            stored = StoredFile(sha256=sha256_file(path), num_bytes=path.stat().st_size)
            files[(Path(name) / path.relative_to(root)).as_posix()] = stored
            sources[stored.sha256] = path
    return Tree(files), sources


def pieces_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Cut a file into pieces: the offset and the bytes of each. An empty file is one empty piece."""
    start = 0
    with path.open("rb") as file:
        while (data := file.read(_PIECE_BYTES)) or not start:
            yield start, data
            start += len(data)
            if not data:
                return


class Store:
    """The contents that a worker has, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = secrets.token_hex(4)
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            (folder / "trees").mkdir(exist_ok=True)
        except OSError as error:
            raise explained(error, folder) from error

    def lacking(self, tree: Tree) -> list[str]:
        """Hashes of the tree's contents that this store lacks, each once."""
        return sorted({file.sha256 for file in tree.files.values() if not self._file(file.sha256).exists()})

    def keep(self, file: StoredFile, start: int, data: bytes) -> None:
        """Add a piece; after the last piece, check the file's hash and store the file."""
        partial = self._folder / "files" / f".{_digest(file.sha256)}.{self._mark}"
        try:
            with partial.open("r+b" if start else "wb") as opened:
                opened.seek(start)
                opened.write(data)
            if start + len(data) < file.num_bytes:
                return
            with partial.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
                os.fsync(opened.fileno())
            if found != file.sha256:
                partial.unlink()
                raise MeasurementError(
                    f"a file changed while it was sent: its SHA-256 was {file.sha256[:12]} and is {found[:12]} now; "
                    "run the search again"
                )
            partial.replace(self._file(file.sha256))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise explained(error, self._folder) from error

    def folder_of(self, tree: Tree, *, is_linked: bool) -> Path:
        """Return the folder of a tree; build it first if it is not there yet.

        `is_linked` makes hard links to the stored files. An artifact needs copies: an artifact with files that can be
        changed under another name is refused when it is measured.
        """
        folder = self._folder / "trees" / f"{tree.hash}-{'linked' if is_linked else 'copied'}"
        if folder.is_dir():
            return folder
        building = folder.with_name(f".{folder.name}.{self._mark}")
        try:
            for name, file in tree.files.items():
                path = building / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (os.link if is_linked else shutil.copyfile)(self._file(file.sha256), path)
            try:
                building.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another worker of this machine built it first
                    raise
        except OSError as error:
            raise explained(error, folder) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return folder

    def _file(self, sha256: str) -> Path:
        return self._folder / "files" / _digest(sha256)


def _digest(text: str) -> str:
    if len(text) != hashlib.sha256().digest_size * 2 or not set(text) <= set("0123456789abcdef"):
        raise HavocError(f"{text[:80]!r} is not a SHA-256; nothing was stored")
    return text
