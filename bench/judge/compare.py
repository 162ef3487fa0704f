"""Two records side by side: the ratio of each metric with its interval, and whether they differ in practice.

A change is proven if the 95 % interval of the ratio is on one side of 1. Two sides are equal if the interval is within
the margin. Otherwise the answer is undecided, with the smallest effect that the samples could have shown. Records of
other devices, versions or work are refused unless `--across` asks for them: their ratio is not a change of the model.
Records with an invalid measurement are always refused. Accuracy of other rows and memory by another method are not
compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ... import bounds
from ...errors import IdentityError, MeasurementError
from . import disturbance, ratios
from .gate import why_invalid
from .limits import UNSETTLED, highest_bytes
from .metrics import METRICS, metric_of
from .schema import asked_apart
from .targets import MEMORY_MARGIN_SHARE, title_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .metrics import Metric
    from .record import Record
    from .schema import Calls, MemorySeries, ProcessSamples

Change = Literal["better", "worse", "equal", "undecided", "not_measured"]
CONFIDENCE = 0.95
_ONE_SIDED = 1 - (1 - CONFIDENCE) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric in both records. `ratio` is new over old; `detectable` the least relative change that would show.

    `reason` says why two measured figures are not compared, or what is behind the change.
    """

    metric: str
    title: str
    unit: str
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    change: Change
    detectable: float | None
    reason: str = ""

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def compare(old: Record, new: Record, *, margin: float = 0.05, across: bool = False) -> list[Comparison]:
    """Compare every metric of two records; `across` allows other devices, versions and work.

    Raises `MeasurementError` (exit 4) if a measurement is invalid, and `IdentityError` (exit 5) with the differences if
    the records are not comparable.
    """
    for name, record in (("old", old), ("new", new)):
        if broken := why_invalid(record):
            raise MeasurementError(f"the {name} record {record.run_id} is invalid ({broken}): measure it again")
    if not across and (different := differences(old, new)):
        raise IdentityError(f"not comparable: {'; '.join(different)} (--across compares them anyway)")
    found = [row for metric in METRICS.values() if (row := _compared(metric, old, new, margin)) is not None]
    domains = sorted(old.accuracy.keys() | new.accuracy.keys())
    rows = [*found, *(_accuracy(domain, old, new, margin) for domain in domains)]
    return [replace(row, title=title_of(row.metric, new.workload)) for row in rows]


def differences(old: Record, new: Record) -> list[str]:
    """Differences because of which the ratio of two records is not a change of the artifact."""
    pairs: tuple[tuple[str, object, object], ...] = (
        ("engine", _engine(old), _engine(new)),
        ("device", old.device.name, new.device.name),
        ("device fingerprint", old.device.fingerprint[:12], new.device.fingerprint[:12]),
        ("evidence", old.evidence, new.evidence),
        ("provider", old.protocol.provider, new.protocol.provider),
        ("provider options", old.protocol.provider_options, new.protocol.provider_options),
        ("keys and values", old.protocol.kv_cache, new.protocol.kv_cache),
        ("threads", old.protocol.num_threads, new.protocol.num_threads),
        *(
            (f"{name} version", old.host.versions.get(name), new.host.versions.get(name))
            for name in _versions(old, new)
        ),
        *(
            (field.replace("_", " "), before, getattr(new.workload, field))
            for field, before in old.workload.model_dump(exclude={"seed"}).items()
        ),
    )
    return [f"{name} {before} and {after}" for name, before, after in pairs if before != after]


def _engine(record: Record) -> str:
    engine = record.subject.engine
    return "HAVOC's" if engine is None else f"{engine.name} {engine.version}"


def _versions(old: Record, new: Record) -> list[str]:
    return sorted(old.host.versions.keys() | new.host.versions.keys())


def _compared(metric: Metric, old: Record, new: Record, margin: float) -> Comparison | None:
    """The row of a metric whose samples can be compared; None for other metrics."""
    if metric.calls is not None:
        return _timing(metric.name, old, new, margin, partial(_durations, metric.calls))
    if metric.series is not None:
        return _memory(metric.name, metric.series(old.memory), metric.series(new.memory), margin)
    return _timing(metric.name, old, new, margin, _rates) if metric.kind == "throughput" else None


def _timing(name: str, old: Record, new: Record, margin: float, read: Callable[[Any], list[_Sample]]) -> Comparison:
    """Compare medians; the interval contains those of all samples and of the undisturbed ones."""
    sides = [[samples for process in record.samples if (samples := read(process))] for record in (old, new)]
    before, after = ([[value for value, _ in samples] for samples in side] for side in sides)
    if not before or not after:
        return _missing(name, _median(before), _median(after))
    row = _row(name, _median(before), _median(after), None, None, margin)
    if len(before) == 1 or len(after) == 1:
        return replace(row, reason="a single process does not show how processes differ")
    low, high = _ratio_range(before, after)
    if any(is_disturbed for side in sides for samples in side for _, is_disturbed in samples):
        calm = [[[value for value, is_off in samples if not is_off] for samples in side] for side in sides]
        if not all(values for side in calm for values in side):
            return replace(row, reason="a process was disturbed the whole time")
        calm_low, calm_high = _ratio_range(*calm)
        low, high = min(low, calm_low), max(high, calm_high)
    return _row(name, row.old, row.new, low or None, None if high == math.inf else high, margin)


def _ratio_range(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Bounds of the ratio; 0 and infinity if there are none."""
    found = ratios.ratio_bounds(before, after, confidence=_ONE_SIDED)
    return (0.0 if found.low is None else found.low), (math.inf if found.high is None else found.high)


_Sample = tuple[float, bool]
"""A figure, and whether it was disturbed when it was measured."""


def _durations(calls: Callable[[ProcessSamples], Calls], process: ProcessSamples) -> list[_Sample]:
    """Milliseconds of each call."""
    return [(call.duration_ns / 1e6, call.is_disturbed) for call in disturbance.calls_of(process, calls(process))]


def _rates(process: ProcessSamples) -> list[_Sample]:
    return [
        (len(run) / sum(step.duration_ns for step in run) * 1e9, any(step.is_disturbed for step in run))
        for run in disturbance.runs_of(process)
        if run
    ]


def disturbances(old: Record, new: Record) -> list[str]:
    """What makes the ratio of two records less certain: disturbed time, and processes that did not settle."""
    found = []
    for name, record in (("old", old), ("new", new)):
        share = disturbance.disturbed_share(record.samples)
        if share:
            found.append(f"the {name} record {record.run_id} was disturbed for {share:.0%} of its timed time")
        unsettled = sum(process.warmup.classification in UNSETTLED for process in record.samples)
        if unsettled:
            found.append(f"{unsettled} processes of the {name} record {record.run_id} did not settle")
    return found


def _median(processes: Sequence[Sequence[float]]) -> float | None:
    values = sorted(value for samples in processes for value in samples)
    return values[len(values) // 2] if values else None


def _memory(name: str, before: Sequence[MemorySeries], after: Sequence[MemorySeries], margin: float) -> Comparison:
    """Compare the worst peaks; the interval comes from the scatter of the processes' peaks and the sampling gap."""
    if not before or not after:
        return _missing(name, *(max((item.peak_bytes for item in side), default=None) for side in (before, after)))
    methods = [", ".join(sorted({item.method for item in side})) for side in (before, after)]
    if methods[0] != methods[1]:
        peaks = (max(item.peak_bytes for item in side) for side in (before, after))
        return _missing(name, *peaks, reason=f"measured by {methods[0]} and by {methods[1]}")
    (old_least, old), (new_least, new) = _peak_range(before), _peak_range(after)
    worst_old, worst_new = (max(item.peak_bytes for item in side) for side in (before, after))
    return _row(name, worst_old, worst_new, new_least / old, new / old_least, margin)


def _peak_range(series: Sequence[MemorySeries]) -> tuple[float, float]:
    """Lowest and highest peak that another process may have; a single process shows no scatter."""
    least, highest = float(min(item.peak_bytes for item in series)), max(highest_bytes(item) for item in series)
    if len(series) == 1:
        return least / (1.0 + MEMORY_MARGIN_SHARE), max(highest, least * (1.0 + MEMORY_MARGIN_SHARE))
    return least, highest


def _accuracy(domain: str, old: Record, new: Record, margin: float) -> Comparison:
    """Ratio of two shares of the same rows: paired if both records hold each row's answer, else unpaired."""
    name, before, after = f"accuracy/{domain}", old.accuracy.get(domain), new.accuracy.get(domain)
    if before is None or after is None:
        return _missing(name, *(None if item is None else item.num_right / item.num_rows for item in (before, after)))
    if before.split != after.split or before.rows_sha256 != after.rows_sha256:
        splits = f"{before.split} and {after.split} split" if before.split != after.split else "other rows"
        both = (item.num_right / item.num_rows for item in (before, after))
        return _missing(name, *both, reason=f"not of the same rows ({splits})")
    if apart := asked_apart(before, after):
        both = (item.num_right / item.num_rows for item in (before, after))
        return _missing(name, *both, reason=f"asked in two ways ({apart} differ)")
    old_rows, new_rows = before.is_right(), after.is_right()
    if old_rows is not None and new_rows is not None and len(old_rows) == len(new_rows):
        return _paired_accuracy(name, old_rows, new_rows, margin)
    shares = [bounds.share_bounds(item.num_right, item.num_rows, confidence=_ONE_SIDED) for item in (before, after)]
    low, high = ratios.ratio_of_shares(*shares) or (None, None)
    return _row(name, shares[0].value, shares[1].value, low, high, margin)


def _paired_accuracy(name: str, old: Sequence[bool], new: Sequence[bool], margin: float) -> Comparison:
    low, high = ratios.ratio_of_paired_shares(old, new, confidence=_ONE_SIDED) or (None, None)
    gained = sum(now and not was for was, now in zip(old, new, strict=True))
    lost = sum(was and not now for was, now in zip(old, new, strict=True))
    row = _row(name, sum(old) / len(old), sum(new) / len(new), low, high, margin)
    return replace(row, reason=f"{gained} rows gained, {lost} lost")


def _missing(name: str, old: float | None, new: float | None, *, reason: str = "") -> Comparison:
    """Keep the known figures without a ratio: it would compare different quantities."""
    row = _row(name, old, new, None, None, 0.0, change="not_measured")
    return replace(row, ratio=None, reason=reason)


def _row(
    name: str,
    old: float | None,
    new: float | None,
    low: float | None,
    high: float | None,
    margin: float,
    *,
    change: Change | None = None,
) -> Comparison:
    metric = metric_of(name)
    return Comparison(
        metric=name,
        title=metric.title,
        unit=metric.unit,
        old=old,
        new=new,
        ratio=new / old if old and new is not None else None,
        low=low,
        high=high,
        change=change or decide(low, high, margin=margin, is_lower_better=metric.is_lower_better),
        detectable=ratios.detectable_change(low, high, confidence=_ONE_SIDED) if low and high else None,
    )


def decide(low: float | None, high: float | None, *, margin: float, is_lower_better: bool) -> Change:
    """Name what the interval of a ratio proves."""
    if low is None or high is None:
        return "undecided"
    if 1 / (1 + margin) <= low and high <= 1 + margin:
        return "equal"
    if high < 1:
        return "better" if is_lower_better else "worse"
    if low > 1:
        return "worse" if is_lower_better else "better"
    return "undecided"
