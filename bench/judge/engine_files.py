"""The files of another engine's model: their names, which of them hold weights, and their SHA-256.

    files_of(Path("model.gguf"))       {"model.gguf": Path("model.gguf")}
    files_of(Path("genai-folder"))     every file in it that is not hidden, by relative name

Hidden files (`.git`, `.cache` of a download) are not part of the model, because no engine reads them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ...errors import HavocError
from ...storage import sha256_file, unreadable

if TYPE_CHECKING:
    from pathlib import Path

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_WEIGHTS: Final = (".gguf", ".safetensors", ".data", ".onnx", ".bin", ".pt")
_NO_WEIGHTS: Final = ("tokenizer", "detokenizer", "vocab")


def files_of(path: Path) -> dict[str, Path]:
    """The files of a model by their names in a record; a `HavocError` for a name that a record cannot hold."""
    if path.is_file():
        return {_named(path, path.name): path}
    try:
        found = sorted(file for file in path.rglob("*") if file.is_file())
    except OSError as error:
        raise unreadable(error, path) from error
    inside = {file.relative_to(path): file for file in found}
    visible = {name.as_posix(): file for name, file in inside.items() if not any(p.startswith(".") for p in name.parts)}
    return {_named(path, name): file for name, file in visible.items()}


def _named(path: Path, name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > 200:  # noqa: PLR2004 - as the record's schema
        raise HavocError(f"{path}: a record cannot hold a file named {name!r:.220}: use letters, digits, _ . and -")
    return name


def is_weights(file: Path) -> bool:
    """Whether a file of a model holds weights, by its name."""
    return file.suffix in _WEIGHTS and not any(word in file.name for word in _NO_WEIGHTS)


def hash_files(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a model, by name; every file is read. A missing or unreadable one is a `HavocError`."""
    if not path.exists():
        raise HavocError(f"{path}: no such model")
    return {name: sha256_file(file) for name, file in files_of(path).items()}
