"""Where a finished measurement goes: into its folder, or where that cannot be written, into the system's temporary one.

Minutes of measuring are not lost to a full disk, and no folder is left that holds nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HavocError

if TYPE_CHECKING:
    from .judge.record import Record


def keep(record: Record, path: Path) -> None:
    """Save a record at `path`; where that fails, keep it elsewhere and raise a `HavocError` that says where."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        record.save(path)
    except HavocError as error:
        for folder in made:
            with contextlib.suppress(OSError):  # never made
                folder.rmdir()
        raise HavocError(f"{error}; {_kept_elsewhere(record, path)}") from error


def _kept_elsewhere(record: Record, path: Path) -> str:
    spare = Path(tempfile.gettempdir()) / f"havoc-{record.run_id}.json"
    try:
        record.save(spare)
    except HavocError:
        return "the measurement could not be kept anywhere"
    return f"the measurement is kept: move {spare} to {path}"
