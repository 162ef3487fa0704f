"""All runs of a folder in one place: `history.jsonl`, one line per run, and `index.html` with each metric over time.

The index also shows the targets' limits, and the cuts and alarms of `judge/history.py`. Both files are built from the
records every time, so they are right after a run was removed or measured again. A folder whose record cannot be read is
listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import storage
from ...errors import HavocError
from ..judge.figures import structure_of
from ..judge.history import MARGIN, history_of, past_record, why_left_out
from ..judge.metrics import METRICS
from ..judge.record import load_record
from ..judge.targets import load_target
from . import page
from .folder import refuse_links, write_report
from .run import RECORD

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..judge.gate import Judgement
    from ..judge.record import Record

HISTORY, INDEX = "history.jsonl", "index.html"


def write_index(directory: Path, *, targets: Sequence[str]) -> Path:
    """Write every run's pages, then the history and the index in the folder above; return the index."""
    refuse_links(directory, (HISTORY, INDEX))
    runs, unread, past, left_out = [], [], [], []
    limits = [(target.name, limit) for target in map(load_target, targets) for limit in target.limits]
    for folder in sorted(path.parent for path in directory.glob(f"*/{RECORD}")):
        try:
            record = _load(folder / RECORD)
            _, judgements = write_report(folder, targets=targets)
        except HavocError as error:
            unread.append({"folder": folder.name, "reason": str(error)})
            continue
        runs.append(entry(folder.name, record, judgements))
        if (reason := why_left_out(record)) is None:
            past.append(past_record(folder.name, record))
        else:
            left_out.append((folder.name, reason))
    runs.sort(key=lambda run: (run["created_utc"], run["folder"]))
    lines = b"".join(storage.canonical_json(run) + b"\n" for run in runs)
    storage.write_bytes(directory / HISTORY, lines)
    storage.write_text(directory / INDEX, page.index(runs, unread, history_of(past, left_out, margin=MARGIN), limits))
    return directory / INDEX


def _load(path: Path) -> Record:
    if path.parent.is_symlink():
        raise HavocError("a link to another folder: give that folder to `havoc report`")
    if not path.is_file():
        raise HavocError(f"{path}: not a file but a folder, pipe or device")
    return load_record(path)


def entry(folder: str, record: Record, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """One line of the history: time, artifact, device, figures and verdicts; null if not measured."""
    gate = {name: item for name, item in record.accuracy.items() if item.split == "gate"}
    return {
        "folder": folder,
        "run_id": record.run_id,
        "record_sha256": record.sha256,
        "created_utc": record.created_utc,
        "subject": record.subject.name,
        "weight_format": record.subject.weight_format,
        "structure": str(structure_of(record.subject.structure) or record.subject.weight_format),
        "device": record.device.name,
        "fingerprint": record.device.fingerprint,
        "evidence": record.evidence,
        "verdicts": {judgement.target: judgement.verdict for judgement in judgements},
        "metrics": {
            **{name: metric.trend.read(record) for name, metric in METRICS.items() if metric.trend},
            **{f"accuracy/{name}": item.num_right / item.num_rows for name, item in sorted(gate.items())},
        },
    }
