"""The folder of a record: the meaning of a path, the record before, and where to save a finished measurement.

If the folder cannot be written, the record goes into the system's temporary folder: minutes of measuring are not lost
because of a full disk, and no empty folder remains.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HavocError

if TYPE_CHECKING:
    from .judge.record import Record


DERIVED = ("record.dsse.json", "report.html", "report.md", "junit.xml", "badge.json", "telemetry.csv", "SHA256SUMS")
"""Files that `havoc report` and `havoc bench --sign` write beside a record."""


def record_path(path: Path) -> Path:
    """Return the record of a path: the file itself, or record.json of a measured folder."""
    if not path.is_dir():
        return path
    if not (path / "record.json").is_file():
        raise HavocError(f"{path} has no record.json: give a folder that `havoc bench` or `havoc run` wrote")
    return path / "record.json"


def records_below(directory: Path) -> list[tuple[str, Path]]:
    """Every `record.json` in or below a folder with the name of its folder, sorted by name; hidden folders are skipped.

    A folder without its own `record.json` may also contain records with any name, such as `nightly-7.json`.
    """
    if not directory.is_dir():
        raise HavocError(f"{directory}: no such folder; give the folder above those that `havoc bench` wrote")
    found = {
        (path.parent.relative_to(directory).as_posix() if path.parent != directory else directory.resolve().name): path
        for path in directory.rglob("record.json")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    if not (directory / "record.json").is_file():
        loose = (path for path in directory.glob("*.json") if path.is_file())
        found |= {path.name: path for path in loose if not path.name.startswith(".")}
    return sorted(found.items())


def previous_record(out: Path) -> Record | None:
    """Return the newest valid record of an earlier run: the record to replace, or one of a neighbouring folder."""
    from .judge.record import load_record

    places = [out / "record.json", *out.resolve().parent.glob("*/record.json")]
    found = [path for path in places if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(HavocError):  # a damaged record beside it must not prevent the measurement
            return load_record(path)
    return None


def keep(record: Record, path: Path) -> None:
    """Save a record at `path`; if that fails, save it elsewhere and raise a `HavocError` with the place."""
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
        return "the measurement could not be saved anywhere"
    return f"the measurement is saved: move {spare} to {path}"
