"""Every quantity that a release may be judged by, one entry each; the judge, the comparison and the pages read it.

A new quantity needs an entry here, the raw samples it reads (`schema.py`), and the pass that takes them. `limits.py`
computes the bounds of each kind of quantity from its samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...adapt.tasks.names import NAME
from ...bounds import quantile_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .record import Memory, ProcessSamples, Record
    from .schema import Calls, FormatCost, MemorySeries

Kind = Literal["latency", "worst_time", "throughput", "memory", "energy", "accuracy", "divergence", "agreement"]

_TIME_MS = {"ms": 1.0, "s": 1e3, "us": 1e-3}
_TIME_S = {"s": 1.0, "ms": 1e-3}
_BYTES = {"bytes": 1.0, "MB": 1e6, "GB": 1e9, "MiB": 2.0**20, "GiB": 2.0**30}
_SHARE = {"share": 1.0, "%": 0.01}


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The figure of a metric that the history of a device keeps, and the statistic if the title should name it."""

    read: Callable[[Record], float | None]
    statistic: str = ""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One quantity: how it is judged, the unit in its name, the units of its limits, and its plausible range.

    `read` returns a record's figure, which is the `statistic` of its samples; None if it was not measured. A latency
    has the `calls` of a process; memory has its `series`, and the `reason` if there are none.
    """

    name: str
    title: str
    kind: Kind
    unit: str
    scales: Mapping[str, float]
    lowest: float
    highest: float
    statistic: str
    read: Callable[[Record], float | None]
    calls: Callable[[ProcessSamples], Calls] | None = None
    series: Callable[[Memory], Sequence[MemorySeries]] | None = None
    reason: Callable[[Memory], str | None] | None = None
    trend: Trend | None = None

    @property
    def is_lower_better(self) -> bool:
        """Whether its limits are upper limits."""
        return self.kind not in {"throughput", "accuracy", "agreement"}

    @property
    def label(self) -> str:
        """The name with the statistic: `prefill_ms, median`."""
        return self.name if self.kind == "accuracy" else f"{self.name}, {self.statistic}"


def decode_rate(record: Record) -> float | None:
    """Tokens per second over all decode runs, without each run's first token: the gate's estimate."""
    runs = [run for process in record.samples for run in process.decode if run.step_ns]
    seconds = sum(sum(run.step_ns) for run in runs) / 1e9
    return sum(len(run.step_ns) for run in runs) / seconds if seconds else None


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _p90_prefill(record: Record) -> float | None:
    times = sorted(ms for process in record.samples for ms in process.prefill_ms)
    return quantile_of(times, 0.9) if times else None


def _cost(record: Record) -> FormatCost | None:
    """The cost of the formats on a text; a cost over random ids is not a figure of the artifact."""
    cost = record.subject.format_cost
    return cost if cost is not None and cost.text_sha256 is not None else None


def _kl_mean(record: Record) -> float | None:
    cost = _cost(record)
    return None if cost is None else cost.kl_mean


def _top1_share(record: Record) -> float | None:
    cost = _cost(record)
    return None if cost is None else cost.top1_share


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="prefill_ms",
            title="prefill",
            kind="latency",
            unit="ms",
            scales=_TIME_MS,
            lowest=1e-3,
            highest=1e6,
            statistic="median",
            read=lambda record: _median([ms for process in record.samples for ms in process.prefill_ms]),
            calls=lambda process: process.prefill,
            trend=Trend(read=_p90_prefill, statistic="p90"),
        ),
        Metric(
            name="ttft_ms",
            title="time to first token",
            kind="latency",
            unit="ms",
            scales=_TIME_MS,
            lowest=1e-3,
            highest=1e6,
            statistic="median",
            read=lambda record: _median([ms for process in record.samples for ms in process.ttft_ms]),
            calls=lambda process: process.ttft,
        ),
        Metric(
            name="load_s",
            title="load",
            kind="worst_time",
            unit="s",
            scales=_TIME_S,
            lowest=1e-4,
            highest=1e5,
            statistic="slowest",
            read=lambda record: max((process.load_ns / 1e9 for process in record.samples), default=None),
        ),
        Metric(
            name="decode_tok_per_s",
            title="decode",
            kind="throughput",
            unit="tok/s",
            scales={"tok/s": 1.0},
            lowest=1e-3,
            highest=1e7,
            statistic="over all runs",
            read=decode_rate,
            trend=Trend(read=decode_rate),
        ),
        Metric(
            name="peak_rss_bytes",
            title="peak RSS",
            kind="memory",
            unit="bytes",
            scales=_BYTES,
            lowest=1e6,
            highest=1e13,
            statistic="highest",
            read=lambda record: record.memory.peak_rss_bytes,
            series=lambda memory: memory.rss,
            reason=lambda memory: memory.rss_reason,
            trend=Trend(read=lambda record: record.memory.peak_rss_bytes),
        ),
        Metric(
            name="peak_vram_bytes",
            title="peak VRAM",
            kind="memory",
            unit="bytes",
            scales=_BYTES,
            lowest=1e6,
            highest=1e13,
            statistic="highest",
            read=lambda record: record.memory.peak_vram_bytes,
            series=lambda memory: memory.vram,
            reason=lambda memory: memory.vram_reason,
            trend=Trend(read=lambda record: record.memory.peak_vram_bytes),
        ),
        Metric(
            name="energy_j_per_tok",
            title="energy",
            kind="energy",
            unit="J/tok",
            scales={"J/tok": 1.0, "mJ/tok": 1e-3},
            lowest=1e-6,
            highest=1e6,
            statistic="mean",
            read=lambda record: record.energy.joules / record.energy.num_tokens if record.energy else None,
        ),
        Metric(
            name="kl_mean",
            title="format cost, KL",
            kind="divergence",
            unit="nats",
            scales={"nats": 1.0, "bits": math.log(2)},
            lowest=1e-6,
            highest=1e2,
            statistic="mean",
            read=_kl_mean,
        ),
        Metric(
            name="top1_share",
            title="format cost, same next token",
            kind="agreement",
            unit="share",
            scales=_SHARE,
            lowest=1e-6,
            highest=1 - 1e-6,
            statistic="share of tokens",
            read=_top1_share,
        ),
    )
}
"""The quantities that every record may hold, by name; `metric_of` also knows accuracy by task."""


def metric_of(name: str) -> Metric:
    """Return the metric called `name`; `accuracy/<task>` exists for every name a task may have."""
    if name in METRICS:
        return METRICS[name]
    prefix, _, task = name.partition("/")
    if prefix == "accuracy" and NAME.fullmatch(task):
        return _accuracy(name, task)
    raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}, accuracy/<task>")


def _accuracy(name: str, task: str) -> Metric:
    def read(record: Record) -> float | None:
        found = record.accuracy.get(task)
        return None if found is None else found.num_right / found.num_rows

    return Metric(
        name=name,
        title=f"accuracy, {task}",
        kind="accuracy",
        unit="share",
        scales=_SHARE,
        lowest=1e-6,
        highest=1 - 1e-6,
        statistic="share right",
        read=read,
    )


def measured(record: Record) -> dict[str, float | None]:
    """Each metric's figure by name, None if not measured; the cost of a format only if the record holds it."""
    found = [metric for metric in METRICS.values() if metric.kind not in {"divergence", "agreement"} or _cost(record)]
    found += [metric_of(f"accuracy/{task}") for task in record.accuracy]
    return {metric.name: metric.read(record) for metric in found}
