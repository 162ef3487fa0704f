"""The configuration of a base, read from where people keep it: a Hugging Face directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HavocError
from ..storage import read_json
from .hf_config import from_hf, with_generation

if TYPE_CHECKING:
    from .config import HavocConfig


def is_gguf(path: str | Path) -> bool:
    """Whether a base is a GGUF file, by its name."""
    path = Path(path)
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def read_config(path: str | Path) -> HavocConfig:
    """Read `config.json` of a Hugging Face directory, and the ends of text in its `generation_config.json`.

    Of a GGUF file: its metadata. What cannot be read or is not supported is a `HavocError` that names the file.
    """
    if is_gguf(path):
        from .gguf_config import read_gguf_config  # an artifact is never one, and is charged for what its child imports

        return read_gguf_config(path)
    file, other = Path(path) / "config.json", Path(path) / "generation_config.json"
    fields = _read_object(file)
    try:
        config = from_hf(fields)
    except HavocError as error:
        raise HavocError(f"{file}: {error}") from error
    if not other.exists():
        return config
    fields = _read_object(other)
    try:
        return with_generation(config, fields)
    except HavocError as error:
        raise HavocError(f"{other}: {error}") from error


def _read_object(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # reading a pipe would wait for ever
        raise HavocError(f"{file}: not a regular file")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise HavocError(f"{file}: must be a JSON object")
    return fields
