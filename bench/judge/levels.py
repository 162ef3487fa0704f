"""A record's figures for each metric that has a trend: one figure per process, as a logarithm.

Times and rates are medians of undisturbed calls (`disturbance.py`) of each process, as in `compare`. Memory is the peak
of each process; accuracy is the share right on the gate split with its binomial error; any other quantity is the
record's single figure. Two figures can be compared only if they have the same `kind`: the method of memory, the rows of
accuracy.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import disturbance
from .change_points import Level, level_of
from .metrics import METRICS

if TYPE_CHECKING:
    from .metrics import Metric
    from .record import DomainAccuracy, Record
    from .schema import ProcessSamples


@dataclass(frozen=True, slots=True)
class Reading:
    """A record's level of one metric, and its kind."""

    level: Level
    kind: str = ""


def readings(record: Record) -> dict[str, Reading]:
    """Return the level of each measured metric with a trend, including accuracy by task."""
    found = {name: reading for name, metric in METRICS.items() if metric.trend and (reading := _read(metric, record))}
    scores = {f"accuracy/{task}": item for task, item in sorted(record.accuracy.items()) if item.split == "gate"}
    return found | {name: _accuracy(item) for name, item in scores.items()}


def _read(metric: Metric, record: Record) -> Reading | None:
    if metric.series is not None:
        series = metric.series(record.memory)
        methods = ", ".join(sorted({item.method for item in series}))
        return Reading(level_of([item.peak_bytes for item in series]), methods) if series else None
    if metric.calls is None and metric.kind != "throughput":
        figures = [figure for figure in [metric.read(record)] if figure]
    else:
        figures = [figure for process in record.samples if (figure := _figure(metric, process))]
    return Reading(level_of(figures)) if figures else None


def _figure(metric: Metric, process: ProcessSamples) -> float | None:
    """Median of a process's undisturbed calls in ns, or of its undisturbed decode runs in tokens a second."""
    if metric.calls is not None:
        timed = disturbance.calls_of(process, metric.calls(process))
        values = [float(call.duration_ns) for call in timed if not call.is_disturbed]
    else:
        runs = [run for run in disturbance.runs_of(process) if run and not any(step.is_disturbed for step in run)]
        values = [len(run) / sum(step.duration_ns for step in run) * 1e9 for run in runs]
    return statistics.median(values) if values else None


def _accuracy(item: DomainAccuracy) -> Reading:
    """The share right; half a row is added on either side, so that 0 right also has a logarithm and an error."""
    share = (item.num_right + 0.5) / (item.num_rows + 1)
    error = math.sqrt((1 - share) / share / item.num_rows)
    chat = "" if item.chat is None else f", {'with' if item.chat else 'without'} chat template"
    shots = "" if item.few_shot is None else f", {item.few_shot} solved rows"
    kind = f"{item.metric or 'right'} on {item.num_rows} rows {item.rows_sha256[:12]}{shots}{chat}"
    return Reading(Level(math.log(share), error), kind)
