"""What valid samples say about one limit: proven met, proven missed, undecided, or not measured at all.

Missing data is never 0: a metric without samples is `not_measured`. `pass` needs a confidence bound on the right side
of the limit and the effort that the target requires. `fail` needs only a bound on the wrong side, with any effort, so
that adding slower samples never turns a fail into a pass. All other cases are `inconclusive` and say what is missing.

Calls of one process are correlated (its memory addresses and its cores stay the same), so bounds over all calls are not
enough: every bound also includes the scatter between processes, and one process proves nothing about the next. A
disturbed call (`disturbance.py`) counts as slow in the upper bound and as fast in the lower one. A process that did not
settle needs distance to the limit on either side: a measurement that cannot pass cannot fail.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import bounds
from ...adapt.tasks.names import bundled_tasks
from . import disturbance
from .metrics import metric_of
from .repeated import any_time_bounds
from .targets import MEMORY_MARGIN_SHARE, title_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .record import ProcessSamples, Record
    from .schema import DomainAccuracy, FormatCost, MemorySeries, Workload
    from .targets import Limit, RequiredProtocol, RequiredWorkload
    from .verdicts import Verdict

STATISTICS = {
    "worst_time": "slowest process",
    "throughput": "mean rate",
    "memory": "worst process",
    "energy": "mean",
    "accuracy": "share right",
    "divergence": "mean",
    "agreement": "share of tokens",
}


# These methods keep the peak themselves, so no peak is missed between two samples.
GAPLESS_METHODS = frozenset({"nvml_accounting", "vm_hwm", "getrusage"})
# These see only the allocator's memory: they may prove a miss, never a pass.
LOWER_BOUND_METHODS = frozenset({"allocator", "ort_arena"})
MIN_ENERGY_SPAN_S = 10.0
ONE_PROCESS = "a single process does not show how processes differ"
DISTURBED = "a process was disturbed too often to say anything"
UNSETTLED = ("slowdown", "no_steady_state")
UNSETTLED_SPARE = 2.0  # with a process that did not settle, only this distance to the limit proves a pass or a miss


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One limit judged, in the metric's own unit. `low` and `high` are one-sided bounds, `reason` is a sentence.

    `value` is the `statistic` of the samples; `num_disturbed` counts the disturbed samples, which prove nothing.
    """

    metric: str
    title: str
    statistic: str
    unit: str
    sign: str
    limit: float
    verdict: Verdict
    reason: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    num_samples: int = 0
    num_processes: int = 0
    num_samples_short: int | None = None
    num_disturbed: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """The figures of one metric; `lacking` says why they cannot prove a pass, `doubt` why they cannot prove a miss.

    `advice` ends the sentence of an undecided limit, if the advice is not to take more samples.
    """

    value: float
    low: float | None
    high: float | None
    num_samples: int
    num_processes: int = 0
    lacking: str = ""
    num_samples_short: int | None = None
    doubt: str = ""
    advice: str = ""
    num_disturbed: int = 0


def judge_limit(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Line:
    """Judge one limit over the joined samples of valid records of one artifact on one device."""
    metric = metric_of(limit.metric)
    evidence = _EVIDENCE[metric.kind](limit, records, protocol)
    if isinstance(evidence, str):
        return line_without_data(limit, "not_measured", evidence, workload=records[0].workload)
    verdict, reason = decide(limit, evidence)
    return Line(
        metric=limit.metric,
        title=title_of(limit.metric, records[0].workload),
        statistic=statistic_of(limit),
        unit=metric.unit,
        sign=limit.sign,
        limit=limit.value,
        verdict=verdict,
        reason=reason,
        value=evidence.value,
        low=evidence.low,
        high=evidence.high,
        num_samples=evidence.num_samples,
        num_processes=evidence.num_processes,
        num_samples_short=evidence.num_samples_short if verdict == "inconclusive" else None,
        num_disturbed=evidence.num_disturbed,
    )


def statistic_of(limit: Limit) -> str:
    """Name the statistic that a limit is on: `p90`, `mean rate`, `worst process`."""
    kind = metric_of(limit.metric).kind
    return f"p{limit.percentile * 100:g}" if kind == "latency" else STATISTICS[kind]


def line_without_data(
    limit: Limit, verdict: Verdict, reason: str, *, workload: Workload | RequiredWorkload | None = None
) -> Line:
    """Return the line of a limit without data."""
    metric = metric_of(limit.metric)
    return Line(
        metric=limit.metric,
        title=title_of(limit.metric, workload),
        statistic=statistic_of(limit),
        unit=metric.unit,
        sign=limit.sign,
        limit=limit.value,
        verdict=verdict,
        reason=reason,
    )


def decide(limit: Limit, evidence: Evidence) -> tuple[Verdict, str]:
    """Compare proven bounds with the limit; a bound equal to the limit proves a fail, never a pass."""
    if limit.below is not None:
        is_met = evidence.high is not None and evidence.high < limit.value
        is_missed = evidence.low is not None and evidence.low >= limit.value
    else:
        is_met = evidence.low is not None and evidence.low > limit.value
        is_missed = evidence.high is not None and evidence.high <= limit.value
    if is_missed:
        return ("inconclusive", evidence.doubt) if evidence.doubt else ("fail", "proven missed")
    if evidence.lacking:
        return "inconclusive", evidence.lacking + (evidence.advice if evidence.num_disturbed else "")
    if is_met:
        return "pass", "proven met"
    return "inconclusive", "the limit lies within the interval" + (evidence.advice or _more(evidence.num_samples_short))


def _more(num_samples_short: int | None) -> str:
    return f": about {num_samples_short} more samples would decide" if num_samples_short else ""


def latency_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:
    """Bound a percentile over all calls; every process, and probably the next one, must be on the same side."""
    processes = _processes(records)
    timed = [calls for process in processes if (calls := _calls(process, limit.metric))]
    samples = [call.duration_ns / 1e6 for calls in timed for call in calls]
    if not samples:
        return "no samples"
    slow = [sorted(call.duration_ns / 1e6 if call.bounds_itself else math.inf for call in calls) for calls in timed]
    fast = [sorted(0.0 if call.is_disturbed else call.duration_ns / 1e6 for call in calls) for calls in timed]
    slow_figures, fast_figures = ([_quantile(limit, values) for values in side] for side in (slow, fast))
    num_within = sum(len(values) for values in _within(limit, slow))
    num_disturbed = sum(call.is_disturbed for calls in timed for call in calls)
    return Evidence(
        value=_quantile(limit, sorted(samples)),
        low=_lower(limit, fast, fast_figures),
        high=_upper(limit, slow, slow_figures),
        num_samples=len(samples),
        num_processes=len(timed),
        lacking=_latency_lacking(limit, processes, protocol, slow, slow_figures),
        num_samples_short=_samples_short(limit, protocol, num_within, len(samples)),
        doubt=_unsettled(processes, times_spare=min(fast_figures) / limit.value),
        advice=_disturbed(num_disturbed, len(samples)),
        num_disturbed=num_disturbed,
    )


def _calls(process: ProcessSamples, metric: str) -> list[disturbance.Timed]:
    calls = metric_of(metric).calls
    return [] if calls is None else disturbance.calls_of(process, calls(process))


def _quantile(limit: Limit, ordered: Sequence[float]) -> float:
    """Return the percentile of sorted calls; infinite if it is at or beside a disturbed call."""
    value = bounds.quantile_of(ordered, limit.percentile)
    return math.inf if math.isnan(value) else value


def _upper(limit: Limit, slow: Sequence[Sequence[float]], figures: Sequence[float]) -> float | None:
    """Upper bound: of all calls as if they were independent, and of the next process; None if there is no bound.

    The scatter is that of calls within the limit, so a call over the limit can only raise the compared figure.
    """
    found = bounds.quantile_bounds(_joined(slow), quantile=limit.percentile, confidence=limit.confidence).high
    if found is None or len(figures) == 1 or math.inf in (found, *figures):
        return None
    scatter = [_quantile(limit, values) for values in _within(limit, slow) if values] or figures
    return max(found, bounds.next_bound(figures, scatter=scatter, confidence=limit.confidence))


def _lower(limit: Limit, fast: Sequence[Sequence[float]], figures: Sequence[float]) -> float | None:
    """Lower bound: of all calls as if they were independent, and of the fastest process; None if there is no bound.

    The fastest of k processes is below the median process with a probability of 1 - 0.5^k, for any distribution: 5
    processes give a confidence of 95 %. A slower call can only raise the bound.
    """
    found = bounds.quantile_bounds(_joined(fast), quantile=limit.percentile, confidence=limit.confidence).low
    if found is None or 1 - 0.5 ** len(figures) < limit.confidence:
        return None
    return min(found, *figures) or None


def _joined(per_process: Sequence[Sequence[float]]) -> list[float]:
    return [value for values in per_process for value in values]


def _samples_short(limit: Limit, protocol: RequiredProtocol, num_within: int, num_samples: int) -> int | None:
    wanted = bounds.num_samples_needed(num_within / num_samples, quantile=limit.percentile, confidence=limit.confidence)
    return max(protocol.min_samples - num_within, (wanted or num_samples) - num_samples, 0) or None


def _latency_lacking(
    limit: Limit,
    processes: Sequence[ProcessSamples],
    protocol: RequiredProtocol,
    slow: Sequence[Sequence[float]],
    figures: Sequence[float],
) -> str:
    """Say why the calls cannot prove a pass: the first reason that applies."""
    if lacking := _effort_lacking(processes, len(slow), protocol):
        return lacking
    if unsettled := _unsettled(processes, times_spare=limit.value / max(figures)):
        return unsettled
    num_within = sum(len(values) for values in _within(limit, slow))
    if num_within < protocol.min_samples:
        return f"{num_within} samples within the limit, {protocol.min_samples} are needed"
    return _processes_lacking(limit, figures, slow)


def _processes_lacking(limit: Limit, figures: Sequence[float], per_process: Sequence[Sequence[float]]) -> str:
    """Require that no process misses the limit, and that by their scatter the next one would not miss it either."""
    if max(figures) == math.inf:
        return DISTURBED
    if max(figures) >= limit.value:
        return f"the slowest process has {_figure(limit, max(figures))}"
    if len(figures) == 1:
        return ONE_PROCESS
    scatter = [_quantile(limit, values) for values in _within(limit, per_process)]
    likely = bounds.next_bound(figures, scatter=scatter, confidence=limit.confidence)
    return f"the processes scatter: one more may have {_figure(limit, likely)}" if likely >= limit.value else ""


def _within(limit: Limit, per_process: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Keep the calls within the limit from the sorted calls of each process."""
    return [values[: bisect_left(values, limit.value)] for values in per_process]


def _figure(limit: Limit, value: float) -> str:
    return f"p{limit.percentile * 100:g} = {value:.4g} {metric_of(limit.metric).unit}"


def _disturbed(num_disturbed: int, num_samples: int) -> str:
    """Words about disturbed calls for the sentence of an undecided limit; empty if there were none."""
    if not num_disturbed:
        return ""
    return f": {num_disturbed} of {num_samples} calls were disturbed, measure again on a quiet machine"


def throughput_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:
    """Bound tokens per second of decoding without the first token; no single process may contradict the bound.

    Bounds are computed with and without the disturbed steps: the lower of both lower bounds and the higher of both
    upper bounds count.
    """
    processes = _processes(records)
    timed = [[run for run in disturbance.runs_of(process) if run] for process in processes]
    timed = [runs for runs in timed if runs]
    if not timed:
        return "no samples"
    whole = [[_rate(run) for run in runs] for runs in timed]
    calm = [[_rate(steps) for run in runs if (steps := _calm(run))] for runs in timed]
    num_runs = sum(len(runs) for runs in timed)
    num_disturbed = num_runs - sum(len(_calm(run)) == len(run) for runs in timed for run in runs)
    found = bounds.rate_bounds(whole, confidence=limit.confidence)
    if num_disturbed:
        found = _widest(found, calm, limit.confidence)
    rates = [_joined_rate(runs) for runs in [*whole, *(runs for runs in calm if runs)]]
    found = _beyond_processes(found, rates) if len(timed) > 1 else bounds.Bounds(found.value, None, None)
    return Evidence(
        value=found.value,
        low=found.low,
        high=found.high,
        num_samples=num_runs,
        num_processes=len(timed),
        lacking=_throughput_lacking(limit, processes, protocol, len(timed), found, min(rates)),
        doubt=_unsettled(processes, times_spare=limit.value / max(rates)),
        advice=_disturbed(num_disturbed, num_runs),
        num_disturbed=num_disturbed,
    )


def _rate(steps: Sequence[disturbance.Timed]) -> tuple[float, float]:
    """Return tokens and seconds of some steps."""
    return float(len(steps)), sum(step.duration_ns for step in steps) / 1e9


def _calm(run: Sequence[disturbance.Timed]) -> list[disturbance.Timed]:
    return [step for step in run if not step.is_disturbed]


def _joined_rate(runs: Sequence[tuple[float, float]]) -> float:
    return sum(tokens for tokens, _ in runs) / sum(seconds for _, seconds in runs)


def _widest(whole: bounds.Bounds, calm: Sequence[Sequence[tuple[float, float]]], confidence: float) -> bounds.Bounds:
    """Join the bounds of all steps with those of the undisturbed ones; none if a process has no undisturbed step."""
    if not all(calm):
        return bounds.Bounds(whole.value, None, None)
    other = bounds.rate_bounds(calm, confidence=confidence)
    return bounds.Bounds(whole.value, _least(whole.low, other.low), _most(whole.high, other.high))


def _least(*values: float | None) -> float | None:
    """Return the least of bounds; None if one of them is None."""
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _most(*values: float | None) -> float | None:
    """Return the highest of bounds; None if one of them is None."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _beyond_processes(found: bounds.Bounds, rates: Sequence[float]) -> bounds.Bounds:
    """Widen bounds to the slowest and the fastest process."""
    return bounds.Bounds(found.value, _least(found.low, *rates), _most(found.high, *rates))


def _throughput_lacking(
    limit: Limit,
    processes: Sequence[ProcessSamples],
    protocol: RequiredProtocol,
    num_measured: int,
    found: bounds.Bounds,
    slowest: float,
) -> str:
    """Say why the runs cannot prove a pass: the first reason that applies."""
    if lacking := _effort_lacking(processes, num_measured, protocol):
        return lacking
    if unsettled := _unsettled(processes, times_spare=slowest / limit.value):
        return unsettled
    if slowest <= limit.value:
        return f"the slowest process reaches {slowest:.4g} tok/s"
    if num_measured == 1:
        return ONE_PROCESS
    if found.low is None:
        return f"{num_measured} processes are too few for a confidence of {limit.confidence!r}: lower it"
    return ""


def memory_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Take the worst process; add the scatter of the processes, and a margin if a peak may be between two samples.

    A single process shows no scatter: then the margin replaces it.
    """
    metric = metric_of(limit.metric)
    series = [item for record in records for item in (metric.series(record.memory) if metric.series else ())]
    if not series:
        reasons = [metric.reason(record.memory) if metric.reason else None for record in records]
        return next((reason for reason in reasons if reason), "no samples")
    peak = max(item.peak_bytes for item in series)
    peaks = [float(item.peak_bytes) for item in series]
    high = max(
        *(highest_bytes(item) for item in series),
        peak * (1.0 + MEMORY_MARGIN_SHARE)
        if len(series) == 1
        else bounds.next_bound(peaks, scatter=peaks, confidence=limit.confidence),
    )
    blind = sorted({item.method for item in series} & LOWER_BOUND_METHODS)
    lacking = f"{blind[0]} sees only a part of the memory" if blind else ""
    return Evidence(float(peak), float(peak), high, len(series), len(series), lacking)


def highest_bytes(series: MemorySeries) -> float:
    """Return the peak plus the margin for what happens between two samples."""
    return series.peak_bytes * (1.0 if series.method in GAPLESS_METHODS else 1.0 + MEMORY_MARGIN_SHARE)


def worst_time_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:
    """Take the slowest process's load, and bound that of the next process by their scatter.

    A disturbed load proves neither a miss nor a pass.
    """
    processes = _processes(records)
    loads = [process.load_ns / 1e9 for process in processes]
    if not loads:
        return "no samples"
    is_disturbed = [disturbance.is_load_disturbed(process) for process in processes]
    calm = [load for load, was_disturbed in zip(loads, is_disturbed, strict=True) if not was_disturbed]
    num_disturbed = sum(is_disturbed)
    high = None
    if len(loads) > 1 and not num_disturbed:
        high = max(*loads, bounds.next_bound(loads, scatter=loads, confidence=limit.confidence))
    num_short = _short(protocol.min_processes, len(loads))
    lacking = f"{len(loads)} processes, {protocol.min_processes} are needed" if num_short else ""
    return Evidence(
        value=max(loads),
        low=max(calm, default=None),
        high=high,
        num_samples=len(loads),
        num_processes=len(loads),
        lacking=lacking,
        num_samples_short=num_short,
        advice=_disturbed(num_disturbed, len(loads)),
        num_disturbed=num_disturbed,
    )


def energy_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Take the highest mean over a record's span, and bound it by the scatter of the processes.

    The counter is that of the whole processor: if other work ran beside decoding, its energy is in the figure.
    """
    spans = [record.energy for record in records if record.energy is not None]
    if not spans:
        return "no energy counter of the device was read"
    worst = max(span.joules / span.num_tokens for span in spans)
    each = [figure for span in spans for figure in span.process_j_per_tok]
    shortest_s = min(span.span_s for span in spans)
    lacking = f"a span of {shortest_s:g} s is too short" if shortest_s < MIN_ENERGY_SPAN_S else ""
    runs = [run for process in _processes(records) for run in disturbance.runs_of(process)]
    num_disturbed = sum(any(step.is_disturbed for step in run) for run in runs)
    shared = f"other work ran beside {num_disturbed} of {len(runs)} decode runs" if num_disturbed else ""
    low = high = None
    if len(each) > 1:
        reach = bounds.next_bound(each, scatter=each, confidence=limit.confidence) - math.fsum(each) / len(each)
        low, high = max(worst - reach, 0.0), worst + reach
    return Evidence(
        value=worst,
        low=low,
        high=high,
        num_samples=len(spans),
        num_processes=len(each),
        lacking=lacking or shared or ("" if len(each) > 1 else ONE_PROCESS),
        doubt=shared,
        num_disturbed=num_disturbed,
    )


def accuracy_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Bound the share of right answers on the gate split; a row the judge could not decide counts as wrong.

    Only the largest of several sets of rows counts: a smaller built-in set of the same seed is the beginning of a
    larger one. If the limit states a number of rows and that many were scored, the bound is that of one look. Otherwise
    the bound holds for any number of looks, because the number of rows may have been chosen after a look.
    """
    domain = limit.metric.partition("/")[2]
    found = [record.accuracy[domain] for record in records if domain in record.accuracy]
    gate = [item for item in found if item.split == "gate"]
    if not gate:
        return f"measured on the {found[0].split} split, not on the gate split" if found else "no samples"
    counted = max(gate, key=lambda item: (item.num_rows == limit.rows, item.num_rows))  # the others may be rows of it
    num_right, num_rows = counted.num_right, counted.num_rows
    bound = bounds.share_bounds if num_rows == limit.rows else any_time_bounds
    share = bound(num_right, num_rows, confidence=limit.confidence)
    others = _other_rows(limit, counted)
    wanted = bounds.num_samples_needed(num_right / num_rows, quantile=limit.value, confidence=limit.confidence)
    num_short = None if wanted is None else _short(wanted, num_rows)
    advice = f": about {num_short} more rows would decide: measure again with --n {wanted}" if num_short else ""
    return Evidence(share.value, share.low, share.high, num_rows, 0, others, num_short, doubt=others, advice=advice)


def _other_rows(limit: Limit, counted: DomainAccuracy) -> str:
    """Say how the rows differ from those that the target states."""
    if limit.seed is not None and counted.seed != limit.seed:
        return f"scored on rows of seed {counted.seed}, but the target states seed {limit.seed}"
    if limit.rows_sha256 is not None and counted.rows_sha256 != limit.rows_sha256:
        return f"scored on rows with SHA-256 {counted.rows_sha256[:16]}, but the target pins {limit.rows_sha256[:16]}"
    if not limit.must_be_pinned or limit.rows_sha256 is not None or limit.data_sha256 is not None:
        return ""
    return "" if is_made_here(limit.metric.partition("/")[2], counted) else _unpinned(counted)


def is_made_here(domain: str, counted: DomainAccuracy) -> bool:
    """Whether HAVOC's own task of that name made the rows, asked them and judged them, without a change."""
    if domain not in bundled_tasks() or counted.data_sha256 is not None:
        return False
    from ...adapt.tasks.task import load_task  # imports Jinja, which a record without such rows does not need

    task = load_task(domain)
    return task.generator is not None and counted.task_sha256 == task.sha256


def _unpinned(counted: DomainAccuracy) -> str:
    said = f'data_sha256 = "{counted.data_sha256}"' if counted.data_sha256 else f'rows_sha256 = "{counted.rows_sha256}"'
    return f"these rows may have been chosen after a look at the answers: pin them ({said}) in your own target"


def divergence_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Bound the mean KL divergence from the exact fold by the scatter between pieces of the text; the worst counts."""
    costs = _costs(records)
    if isinstance(costs, str):
        return costs
    worst = max(costs, key=lambda cost: cost.kl_mean)
    found = bounds.mean_bounds(worst.kl_chunks, confidence=limit.confidence)
    lacking = "" if found.high is not None else "one piece of text shows no scatter: export with a longer --calibration"
    return Evidence(found.value, found.low, found.high, worst.num_positions, 0, lacking, advice=_LONGER)


def agreement_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Bound the share of positions whose first choice is that of the exact fold; the worst record counts."""
    costs = _costs(records)
    if isinstance(costs, str):
        return costs
    worst = min(costs, key=lambda cost: cost.top1_share)
    share = bounds.share_bounds(worst.num_same, worst.num_positions, confidence=limit.confidence)
    return Evidence(share.value, share.low, share.high, worst.num_positions, advice=_LONGER)


_LONGER = ": the text cannot decide it; export a finer format, or with a longer text (--calibration FILE)"


def _costs(records: Sequence[Record]) -> list[FormatCost] | str:
    """The costs of the formats from every record that has them, or why none can be judged."""
    costs = [record.subject.format_cost for record in records if record.subject.format_cost is not None]
    if not costs:
        return "the artifact does not say what its format costs: export it again"
    on_text = [cost for cost in costs if cost.text_sha256 is not None]
    return on_text or "measured over random ids: the base has no tokenizer to read text with"


def _short(num_needed: int, num_found: int) -> int | None:
    """The number that is missing; None if enough are there."""
    return max(num_needed - num_found, 0) or None


def _processes(records: Sequence[Record]) -> list[ProcessSamples]:
    return [process for record in records for process in record.samples]


def _effort_lacking(processes: Sequence[ProcessSamples], num_measured: int, protocol: RequiredProtocol) -> str:
    """Say which required effort is missing."""
    if num_measured < protocol.min_processes:
        return f"{num_measured} processes, {protocol.min_processes} are needed"
    busy_s = sum(process.busy_ns for process in processes) / 1e9
    if busy_s < protocol.min_busy_s:
        return f"{busy_s:.3g} s of busy time, {protocol.min_busy_s:g} s are needed"
    return ""


def _unsettled(processes: Sequence[ProcessSamples], *, times_spare: float) -> str:
    """Name a process that did not settle, unless the limit is so far away that it does not matter.

    `times_spare` is the ratio of the limit to the worst figure; for a miss, that of the best figure to the limit.
    """
    unsettled = [process for process in processes if process.warmup.classification in UNSETTLED]
    if not unsettled or times_spare >= UNSETTLED_SPARE:
        return ""
    what = unsettled[0].warmup.classification.replace("_", " ")
    return f"process {unsettled[0].process} did not settle ({what})"


_EVIDENCE = {
    "latency": latency_evidence,
    "worst_time": worst_time_evidence,
    "throughput": throughput_evidence,
    "memory": memory_evidence,
    "energy": energy_evidence,
    "accuracy": accuracy_evidence,
    "divergence": divergence_evidence,
    "agreement": agreement_evidence,
}
