"""Read and check the document of the phase before: seed 003's "Input from Phase 6".

    {"model": "baked_model", "metrics": {"tool_success_rate": 0.94, "persona_consistency": 0.89}}

`model` is a model directory or a .gguf file, relative to the folder of this file. The two metrics are shares that phase
6 measured on its model. HAVOC measures neither of them: it copies them and says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ... import storage
from ...errors import HavocError
from ...mistakes import mistakes

if TYPE_CHECKING:
    from typing import Final

FILE_NAME: Final = "phase6.json"
"""The copy of the file in the folder of a run."""
_MAX_BYTES = 1_000_000

Rate = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Phase6Metrics(_Strict):
    """The measurements of phase 6 on its model."""

    tool_success_rate: Rate = Field(description="share of tool calls that succeeded")
    persona_consistency: Rate = Field(description="share of answers that stayed in their persona")


class Phase6(_Strict):
    """The file that `havoc run --handoff` takes."""

    model: str = Field(min_length=1, description="a model directory or a .gguf file, relative to this file's folder")
    metrics: Phase6Metrics = Field(description="copied to `handoff.json` unchanged")


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A file of phase 6: its path, its bytes, and its content."""

    path: Path
    data: bytes
    content: Phase6

    @property
    def model(self) -> Path:
        """The model's path: absolute, so that it does not depend on the working directory."""
        return (self.path.resolve().parent / self.content.model).resolve()

    def to_json(self) -> dict[str, Any]:
        """Return the part of `handoff.json` about it: the metrics, their model, and who measured them."""
        return {
            "metrics": self.content.metrics.model_dump(),
            "measured_by": "phase 6",
            "is_measured_by_havoc": False,
            "model": self.content.model,
            "file": self.path.name,
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }


def read_handed_over(path: Path) -> HandedOver:
    """Read the file of phase 6; a mistake in it, or a missing model, is a `HavocError`."""
    handed = _read(path)
    if not handed.model.exists():
        raise HavocError(f"{path}: model {handed.content.model!r} is missing: {handed.model} does not exist")
    return handed


def read_kept(folder: Path) -> HandedOver | None:
    """Read the copy in the folder of a run; None if the run began without one."""
    path = folder / FILE_NAME
    return _read(path) if path.exists() else None


def keep(handed: HandedOver, folder: Path) -> None:
    """Copy the file into the folder of a run, byte for byte; a different file in its place is a `HavocError`."""
    kept = read_kept(folder)
    if kept is None:
        storage.write_bytes(folder / FILE_NAME, handed.data)
    elif kept.data != handed.data:
        raise HavocError(
            f"{folder} was started with another handoff (see {folder / FILE_NAME}): give that one, or another --out"
        )


def _read(path: Path) -> HandedOver:
    try:
        data = storage.read_bounded(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise HavocError(f"{path}: no such file") from None
    except OSError as error:
        raise storage.unreadable(error, path) from error
    document = storage.parse_json(data, path)
    if not isinstance(document, dict) or not isinstance(document.get("metrics", {}), dict):
        where = "metrics" if isinstance(document, dict) else "it"
        raise HavocError(f"{path}: not what phase 6 hands over: {where} is not an object of keys and values")
    try:
        return HandedOver(path, data, Phase6.model_validate(document))
    except ValidationError as error:
        raise HavocError(f"{path}: not what phase 6 hands over: {mistakes(error, Phase6)}") from error
