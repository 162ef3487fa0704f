"""All records of the same work in order of time: changes of the environment, and lasting changes of a figure.

Records are of the same work if they measured a model of one name and structure in the same way. A segment holds the
records of one environment: device, driver, runtime, kernel. Levels are compared only within a segment
(`change_points.py`). A record with a new environment is a cut, reported with the old and the new values. Records that
cannot decide anything (simulated, invalid) and copies are left out and listed.

A change to the worse, by the metric's direction, is an alarm. It stands until a later change in the newest segment
makes up for it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from .case import Case
from .change_points import FEWEST_RECORDS, least_step, level_changes
from .figures import structure_of
from .gate import why_invalid
from .levels import readings
from .metrics import metric_of
from .rules import RULES
from .validity import workload_is_the_targets

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .change_points import LevelChange
    from .levels import Reading
    from .metrics import Metric
    from .record import Cpu, Record
    from .targets import Target

MARGIN = 0.01
_ABSENT = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRecord:
    """What a history keeps from one record: its path, its identity, its environment and its levels."""

    name: str
    run_id: str
    sha256: str
    created_utc: str
    commit: str | None
    is_dirty: bool | None
    added_by: str | None
    work: str
    environment: Mapping[str, str]
    readings: Mapping[str, Reading]

    @property
    def age(self) -> tuple[str, str, str]:
        """The sort key of records: the time when they were made, not the names of their folders."""
        return self.created_utc, self.run_id, self.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCut:
    """A record whose environment, or kind of one metric, differs from the one before; each change is `old -> new`."""

    record: str
    created_utc: str
    metric: str
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrendChange:
    """A metric that changed its level within a segment.

    The new level is `ratio` times the old one; the interval of `ratio` is `low` to `high`. `first` is the first record
    on the new level, `last_before` the record before it, `seen` the record that proved the change. `commit` is the
    commit of HAVOC's checkout when `first` was measured; `added_by` is the commit that added its file, if records are
    kept in git. `stands` says that the change is to the worse and no later change made up for it.
    """

    metric: str
    direction: Literal["worse", "better"]
    ratio: float
    low: float
    high: float
    first: str
    first_run_id: str
    created_utc: str
    commit: str | None
    is_dirty: bool | None
    added_by: str | None
    last_before: str
    seen: str
    stands: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricHistory:
    """One metric over all records of a work: its changes, and the smallest step that five more records would show.

    `least_step` is a share; None if the newest segment is too short to look for a change; `note` then says so.
    """

    metric: str
    title: str
    unit: str
    num_records: int
    changes: tuple[TrendChange, ...]
    least_step: float | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkHistory:
    """All records of one work, oldest first."""

    work: str
    records: tuple[str, ...]
    first_utc: str
    last_utc: str
    cuts: tuple[SegmentCut, ...]
    metrics: tuple[MetricHistory, ...]

    @property
    def alarms(self) -> tuple[TrendChange, ...]:
        """Changes to the worse."""
        return tuple(change for item in self.metrics for change in item.changes if change.direction == "worse")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHistory:
    """The history of all records of a folder; `left_out` names the records that do not count, and why."""

    margin: float
    works: tuple[WorkHistory, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def alarms(self) -> tuple[TrendChange, ...]:
        """The alarms of all works."""
        return tuple(alarm for work in self.works for alarm in work.alarms)

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        standing = sum(alarm.stands for alarm in self.alarms)
        return {"num_alarms": len(self.alarms), "num_standing": standing, **asdict(self)}


def why_not_the_targets(record: Record, target: Target, *, this_cpu: Cpu | None) -> str | None:
    """Why a record's device or work differs from the target's; None if they are the same."""
    case = Case(record=record, target=target, this_cpu=this_cpu)
    asked = (*(rule for rule in RULES if rule.blocks == "not_measured" and rule.id != "I02"), workload_is_the_targets)
    return next((reason for rule in asked if (reason := rule(case)) is not None), None)


def why_left_out(record: Record) -> str | None:
    """Why a record may not be compared with others; None if it may."""
    if record.evidence != "measured" or record.device.is_simulated:
        return f"{record.evidence if record.evidence != 'measured' else 'simulated'}, not measured"
    return why_invalid(record)


def past_record(name: str, record: Record, *, added_by: str | None = None) -> PastRecord:
    """Return what a history needs of the record `name`, whose file was added by the commit `added_by`."""
    return PastRecord(
        name=name,
        run_id=record.run_id,
        sha256=record.sha256 or "",
        created_utc=record.created_utc,
        commit=record.tool.git_commit,
        is_dirty=record.tool.is_git_dirty,
        added_by=added_by,
        work=work_of(record),
        environment=environment_of(record),
        readings=readings(record),
    )


def work_of(record: Record) -> str:
    """Name what was measured and how; records that differ in it are not compared."""
    subject, workload, protocol = record.subject, record.workload, record.protocol
    beside = {
        "batch": (workload.batch_size, 1),
        "passes": (workload.passes, 1),
        "context": (workload.context_tokens, workload.prompt_tokens),
    }
    threads = protocol.num_threads
    parts = [
        subject.name,
        str(structure_of(subject.structure) or subject.weight_format),
        f"{workload.prompt_tokens} + {workload.decode_tokens} tokens from {workload.ttft_from}",
        *(f"{name} {value}" for name, (value, usual) in beside.items() if value != usual),
        f"{threads} thread{'s' if threads != 1 else ''} of {protocol.provider}",
        *([] if protocol.kv_cache is None else [f"{protocol.kv_cache} cache"]),
    ]
    return ", ".join(parts)


def environment_of(record: Record) -> dict[str, str]:
    """Name the environment of the model: device, drivers, kernel, versions and the provider's options."""
    host, gpu = record.host, record.device.gpu
    found = {
        "driver": None if gpu is None else gpu.driver_version,
        "CUDA driver": None if gpu is None else gpu.cuda_driver_version,
        "kernel": f"{host.os} {host.kernel}",
        "libc": host.libc,
        "container": host.container,
        "CPU governor": host.cpu_governor,
        "CPU quota, cores": None if host.cpu_quota_cores is None else f"{host.cpu_quota_cores:g}",
        "device fingerprint": record.device.fingerprint[:12],
        **{f"{name} version": version for name, version in sorted(host.versions.items())},
        **{f"provider option {name}": value for name, value in sorted(record.protocol.provider_options.items())},
    }
    return {"device": record.device.name} | {name: value for name, value in found.items() if value}


def history_of(records: Iterable[PastRecord], left_out: Sequence[tuple[str, str]], *, margin: float) -> RecordHistory:
    """Put records in order of time and look for changes; of several copies of a record only one counts."""
    kept: dict[str, PastRecord] = {}
    copies = []
    for record in sorted(records, key=lambda record: (*record.age, record.name)):
        if record.sha256 in kept:
            copies.append((record.name, f"a copy of {kept[record.sha256].name}"))
        else:
            kept[record.sha256] = record
    works: dict[str, list[PastRecord]] = {}
    for record in kept.values():
        works.setdefault(record.work, []).append(record)
    return RecordHistory(
        margin=margin,
        works=tuple(_work_history(work, found, margin) for work, found in works.items()),
        left_out=(*left_out, *copies),
    )


def _work_history(work: str, records: Sequence[PastRecord], margin: float) -> WorkHistory:
    names = dict.fromkeys(name for record in records for name in record.readings)
    measured = {name: [record for record in records if name in record.readings] for name in names}
    return WorkHistory(
        work=work,
        records=tuple(record.name for record in records),
        first_utc=records[0].created_utc,
        last_utc=records[-1].created_utc,
        cuts=(*_cuts(records), *(cut for name, found in measured.items() for cut in _kind_cuts(name, found))),
        metrics=tuple(_metric_history(metric_of(name), found, margin) for name, found in measured.items()),
    )


def _cuts(records: Sequence[PastRecord]) -> list[SegmentCut]:
    """Every record with a new environment, with what changed; an environment that returns continues its segment."""
    known, cuts = [records[0].environment], []
    for before, record in pairwise(records):
        if record.environment not in known:
            known.append(record.environment)
            changes = _differences(before.environment, record.environment)
            cuts.append(SegmentCut(record=record.name, created_utc=record.created_utc, metric="", changes=changes))
    return cuts


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """What changed, old -> new; the fingerprint only if nothing else explains the change."""
    names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    telling = [name for name in names if name != "device fingerprint"] or names
    return tuple(f"{name} {old.get(name, _ABSENT)} -> {new.get(name, _ABSENT)}" for name in telling)


def _kind_cuts(metric: str, records: Sequence[PastRecord]) -> list[SegmentCut]:
    """The records where a metric's meaning changed: another method, or other rows."""
    known, cuts = {records[0].readings[metric].kind}, []
    for before, record in pairwise(records):
        old, new = before.readings[metric].kind, record.readings[metric].kind
        if new not in known:
            known.add(new)
            cut = SegmentCut(
                record=record.name, created_utc=record.created_utc, metric=metric, changes=(f"{old} -> {new}",)
            )
            cuts.append(cut)
    return cuts


def _metric_history(metric: Metric, records: Sequence[PastRecord], margin: float) -> MetricHistory:
    """Look for changes in each segment; the looks of all segments, in order of time, share the error rate."""
    looks = {record.sha256: number for number, record in enumerate(records, start=1)}
    segments = _segments(metric.name, records)
    newest_of = {segment[0].environment["device"]: segment for segment in sorted(segments, key=lambda one: one[-1].age)}
    changes: list[TrendChange] = []
    for segment in segments:
        found = level_changes(
            [record.readings[metric.name].level for record in segment],
            margin=margin,
            looks=[looks[record.sha256] for record in segment],
        )
        is_newest = segment is newest_of[segment[0].environment["device"]]
        changes += [
            _told(metric, segment, found[place:], is_newest=is_newest, margin=margin) for place in range(len(found))
        ]
        if segment[-1] is records[-1]:
            levels = [record.readings[metric.name].level for record in segment[found[-1].first if found else 0 :]]
    least = least_step(levels, look=len(records))
    few = f"too few to find a change: {len(levels)} on the newest level, {FEWEST_RECORDS} are needed"
    return MetricHistory(
        metric=metric.name,
        title=metric.title,
        unit=metric.unit,
        num_records=len(records),
        changes=tuple(changes),
        least_step=None if least is None else max(least, margin),
        note=few if len(levels) < FEWEST_RECORDS else "",
    )


def _segments(metric: str, records: Sequence[PastRecord]) -> list[list[PastRecord]]:
    segments: dict[object, list[PastRecord]] = {}
    for record in records:
        key = (tuple(sorted(record.environment.items())), record.readings[metric].kind)
        segments.setdefault(key, []).append(record)
    return list(segments.values())


def _told(
    metric: Metric, segment: Sequence[PastRecord], found: Sequence[LevelChange], *, is_newest: bool, margin: float
) -> TrendChange:
    """Describe the first of several changes by its records; later changes may have made up for it."""
    change = found[0]
    first, is_lower_better = segment[change.first], metric.is_lower_better
    is_worse = (change.ratio > 1) == is_lower_better
    since = math.prod(later.ratio for later in found)
    return TrendChange(
        metric=metric.name,
        direction="worse" if is_worse else "better",
        ratio=change.ratio,
        low=change.low,
        high=change.high,
        first=first.name,
        first_run_id=first.run_id,
        created_utc=first.created_utc,
        commit=first.commit,
        is_dirty=first.is_dirty,
        added_by=first.added_by,
        last_before=segment[change.first - 1].name,
        seen=segment[change.seen].name,
        stands=is_newest and is_worse and (since if is_lower_better else 1 / since) >= 1 + margin,
    )
