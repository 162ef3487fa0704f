"""A measured folder, read and judged: every page is written from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import HavocError
from ...export.runtime.verification import load_verified
from ..device import identify_cpu
from ..judge.gate import Judgement, hash_measured, judge
from ..judge.record import Record, load_record
from ..judge.targets import Target, load_target, require_known_tasks, require_pinned
from .search_files import Front, ScoreFile, read_front, read_scores, why_not_its_front, why_not_its_scores

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

RECORD, SCORES, FRONT = "record.json", "scores.json", "front.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measured folder, read and judged: the only input of every page.

    `left_out` says which files are not used, and why.
    `target_names` are the targets as given to `--target`. `is_rebuilt_elsewhere` is true if a verification of this
    artifact built its graphs again.
    """

    record: Record
    judged: tuple[tuple[Target, Judgement], ...]
    scores: ScoreFile | None = None
    front: Front | None = None
    previous: Record | None = None
    command: str | None = None
    left_out: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    is_rebuilt_elsewhere: bool = False


def read_run(
    directory: Path,
    *,
    targets: Sequence[str],
    command: str | None = None,
    artifact: Path | None = None,
    verified: Path | None = None,
) -> Run:
    """Read a folder and judge its record, with `artifact` if given; `HavocError` without a valid record."""
    if not (directory / RECORD).is_file():
        raise HavocError(f"{directory}: no {RECORD} in it; `havoc bench ARTIFACT --out {directory}` writes one")
    record = load_record(directory / RECORD)
    cpu, files = identify_cpu(), None if artifact is None else hash_measured(artifact, record.subject)
    found = None if verified is None else load_verified(verified)
    loaded = [load_target(name) for name in targets]
    for target in loaded:
        require_known_tasks(target, list(record.accuracy))
        require_pinned(target, [record])
    scores, front = read_scores(directory / SCORES), read_front(directory / FRONT)
    no_scores = None if scores is None else why_not_its_scores(scores, record)
    no_front = None if front is None else why_not_its_front(front, record)
    return Run(
        record=record,
        judged=tuple(
            (target, judge([record], target, artifact_files=files, this_cpu=cpu, verified=found)) for target in loaded
        ),
        scores=None if no_scores else scores,
        front=None if no_front else front,
        previous=_previous(directory, record),
        command=command,
        target_names=tuple(targets),
        is_rebuilt_elsewhere=found is not None
        and found.is_rebuilt
        and found.manifest_sha256 == record.subject.manifest_sha256,
        left_out=tuple(
            f"{what} is left out: {why}."
            for what, why in ((f"{SCORES} (accuracy by domain)", no_scores), (f"{FRONT} (the search)", no_front))
            if why
        ),
    )


def _previous(directory: Path, record: Record) -> Record | None:
    """Find the record that this one names as its predecessor among the neighbouring runs."""
    wanted = record.provenance.previous_record_sha256
    if wanted is None:
        return None
    for path in sorted(path for path in directory.resolve().parent.glob(f"*/{RECORD}") if path.is_file()):
        try:
            candidate = load_record(path)
        except HavocError:
            continue
        if candidate.sha256 == wanted:
            return candidate
    return None
