"""The records below a folder, read and joined into their history."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import HavocError, IdentityError, MeasurementError
from .judge.figures import count
from .judge.history import history_of, past_record, why_left_out, why_not_the_targets
from .judge.record import load_record
from .record_folder import records_below
from .tool_version import commits_that_added

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .judge.history import RecordHistory
    from .judge.record import Cpu
    from .judge.targets import Target


def read_history(directory: Path, *, target: Target | None, margin: float) -> RecordHistory:
    """Read every record below a folder, or those of a target's device and work, and look for changes.

    Damaged records, and records that do not count, are named in `left_out`. Raises `HavocError` (exit 2) if no record
    can be read, `MeasurementError` (4) if all are invalid, `IdentityError` (5) if none is of the target.
    """
    unread, strangers, invalid, sound = [], [], [], []
    added_by = commits_that_added(directory)
    this_cpu = None if target is None else _this_cpu()
    for name, path in records_below(directory):
        try:
            record = load_record(path)
        except HavocError as error:
            unread.append((name, str(error)))
            continue
        other = None if target is None else why_not_the_targets(record, target, this_cpu=this_cpu)
        if other is not None:
            strangers.append((name, other))
        elif (reason := why_left_out(record)) is not None:
            invalid.append((name, reason))
        else:
            commit = added_by.get(path.relative_to(directory).as_posix())
            sound.append(past_record(name, record, added_by=commit))
    if sound:
        return history_of(sound, [*unread, *strangers, *invalid], margin=margin)
    if invalid:
        raise MeasurementError(f"{directory}: none of {_counted(invalid)} is valid ({_last(invalid)}): measure again")
    if strangers and target is not None:
        told = f"{directory}: none of {_counted(strangers)} is of the target {target.name}"
        raise IdentityError(f"{told} ({_last(strangers)}): name another --target, or none")
    beside = f" ({count(len(unread), 'file')} could not be read; {_last(unread)})" if unread else ""
    raise HavocError(f"{directory}: contains no record{beside}; `havoc bench ARTIFACT --out {directory}/1` adds one")


def _counted(left_out: Sequence[tuple[str, str]]) -> str:
    return count(len(left_out), "record")


def _last(left_out: Sequence[tuple[str, str]]) -> str:
    return ": ".join(left_out[-1])


def _this_cpu() -> Cpu:
    from .device import identify_cpu

    return identify_cpu()
