"""What valid samples say about one limit: proven met, proven missed, undecided, or not measured at all.

Missing data is never 0: a metric without samples is `not_measured`. `pass` needs a confidence bound on the right side
of the limit, and the effort the target asks for; `fail` needs a bound on the wrong side, however little effort there
was, so that adding slower samples never turns a fail into a pass. All else is `inconclusive` and says what is missing.

Calls of one process are correlated (its memory lies where it lies, its threads run where they run), so bounds over all
calls are not enough: the processes themselves must agree, measured by how much they scatter.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import bounds
from .targets import MEMORY_MARGIN_SHARE, metric_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .record import ProcessSamples, Record
    from .schema import FormatCost, MemorySeries
    from .targets import Limit, RequiredProtocol

Verdict = Literal["pass", "fail", "inconclusive", "invalid", "not_measured"]

# Read by whoever kept the peak itself, so nothing lies between two samples.
GAPLESS_METHODS = frozenset({"nvml_accounting", "vm_hwm", "getrusage"})
# Blind to what others than the allocator hold: may prove a miss, never a pass.
LOWER_BOUND_METHODS = frozenset({"allocator", "ort_arena"})
MIN_ENERGY_SPAN_S = 10.0
UNSETTLED = ("slowdown", "no_steady_state")
UNSETTLED_SPARE = 2.0  # a process that may still get slower proves a limit only by this factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One limit judged, in the metric's own unit. `low` and `high` are one-sided bounds, `reason` is a sentence."""

    metric: str
    title: str
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """The figures of one metric; `lacking` says why they may not prove a pass, `doubt` why not a miss, if so.

    `advice` ends the sentence of an undecided limit, where it is not that more samples would do.
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


def judge_limit(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Line:
    """Judge one limit over the joined samples of valid records of one artifact on one device."""
    metric = metric_of(limit.metric)
    evidence = _EVIDENCE[metric.kind](limit, records, protocol)
    if isinstance(evidence, str):
        return line_without_data(limit, "not_measured", evidence)
    verdict, reason = decide(limit, evidence)
    return Line(
        metric=limit.metric,
        title=metric.title,
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
    )


def line_without_data(limit: Limit, verdict: Verdict, reason: str) -> Line:
    """Return the line of a limit no number speaks to."""
    metric = metric_of(limit.metric)
    return Line(
        metric=limit.metric,
        title=metric.title,
        unit=metric.unit,
        sign=limit.sign,
        limit=limit.value,
        verdict=verdict,
        reason=reason,
    )


def decide(limit: Limit, evidence: Evidence) -> tuple[Verdict, str]:
    """Compare proven bounds with the limit; equality proves nothing for a pass and everything for a fail."""
    if limit.below is not None:
        is_met = evidence.high is not None and evidence.high < limit.value
        is_missed = evidence.low is not None and evidence.low >= limit.value
    else:
        is_met = evidence.low is not None and evidence.low > limit.value
        is_missed = evidence.high is not None and evidence.high <= limit.value
    if is_missed:
        return ("inconclusive", evidence.doubt) if evidence.doubt else ("fail", "proven missed")
    if evidence.lacking:
        return "inconclusive", evidence.lacking
    if is_met:
        return "pass", "proven met"
    return "inconclusive", "the limit lies within the interval" + (evidence.advice or _more(evidence.num_samples_short))


def _more(num_samples_short: int | None) -> str:
    return f": about {num_samples_short} more samples would decide" if num_samples_short else ""


def latency_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:
    """Bound a percentile over all calls; every process must be on the same side, and the next one likely to be."""
    processes = _processes(records)
    per_process = [sorted(samples) for process in processes if (samples := getattr(process, limit.metric))]
    samples = [value for values in per_process for value in values]
    if not samples:
        return "no samples"
    found = bounds.quantile_bounds(samples, quantile=limit.percentile, confidence=limit.confidence)
    num_within = sum(len(values) for values in _within(limit, per_process))
    share_within = num_within / len(samples)
    wanted = bounds.num_samples_needed(share_within, quantile=limit.percentile, confidence=limit.confidence)
    figures = [bounds.quantile_of(values, limit.percentile) for values in per_process]
    lacking = _effort_lacking(processes, len(per_process), protocol, times_limit=max(figures) / limit.value)
    if not lacking and num_within < protocol.min_samples:
        lacking = f"{num_within} samples within the limit, {protocol.min_samples} are needed"
    lacking = lacking or _processes_lacking(limit, figures, per_process)
    is_split = min(figures) < limit.value
    doubt = f"only some processes miss the limit: the fastest has {_figure(limit, min(figures))}" if is_split else ""
    num_short = max(protocol.min_samples - num_within, (wanted or len(samples)) - len(samples), 0) or None
    return Evidence(found.value, found.low, found.high, len(samples), len(per_process), lacking, num_short, doubt)


def _processes_lacking(limit: Limit, figures: Sequence[float], per_process: Sequence[Sequence[float]]) -> str:
    """Ask that no process misses the limit, nor, by how they scatter, that one process more would.

    The scatter is that of calls within the limit, so a call over the limit can only raise what is compared.
    """
    if max(figures) >= limit.value:
        return f"the slowest process has {_figure(limit, max(figures))}"
    scatter = [bounds.quantile_of(values, limit.percentile) for values in _within(limit, per_process)]
    likely = bounds.next_bound(figures, scatter=scatter, confidence=limit.confidence)
    return f"the processes scatter: one more may have {_figure(limit, likely)}" if likely >= limit.value else ""


def _within(limit: Limit, per_process: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Keep the calls within the limit, of each process's sorted ones."""
    return [values[: bisect_left(values, limit.value)] for values in per_process]


def _figure(limit: Limit, value: float) -> str:
    return f"p{limit.percentile * 100:g} = {value:.4g} {metric_of(limit.metric).unit}"


def throughput_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:
    """Bound tokens per second of decoding, the first token excluded; no single process may miss the limit either."""
    processes = _processes(records)
    per_process = [
        [(float(len(run.step_ns)), sum(run.step_ns) / 1e9) for run in process.decode if run.step_ns]
        for process in processes
    ]
    per_process = [runs for runs in per_process if runs]
    if not per_process:
        return "no samples"
    found = bounds.rate_bounds(per_process, confidence=limit.confidence)
    slowest = min(sum(tokens for tokens, _ in runs) / sum(seconds for _, seconds in runs) for runs in per_process)
    lacking = _effort_lacking(processes, len(per_process), protocol, times_limit=limit.value / slowest)
    if not lacking and slowest <= limit.value:
        lacking = f"the slowest process reaches {slowest:.4g} tok/s"
    if not lacking and found.low is None:
        lacking = f"{len(per_process)} processes cannot carry a confidence of {limit.confidence!r}: lower it"
    num_runs = sum(len(runs) for runs in per_process)
    return Evidence(found.value, found.low, found.high, num_runs, len(per_process), lacking)


def memory_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Take the worst process; add a margin where peaks may hide between two samples."""
    is_vram = limit.metric == "peak_vram_bytes"
    series = [item for record in records for item in (record.memory.vram if is_vram else record.memory.rss)]
    if not series:
        reasons = [record.memory.vram_reason if is_vram else record.memory.rss_reason for record in records]
        return next((reason for reason in reasons if reason), "no samples")
    peak = max(item.peak_bytes for item in series)
    high = max(highest_bytes(item) for item in series)
    blind = sorted({item.method for item in series} & LOWER_BOUND_METHODS)
    lacking = f"{blind[0]} sees only a part of the memory" if blind else ""
    return Evidence(float(peak), float(peak), high, len(series), len(series), lacking)


def highest_bytes(series: MemorySeries) -> float:
    """Return the peak with what may hide between two samples."""
    return series.peak_bytes * (1.0 if series.method in GAPLESS_METHODS else 1.0 + MEMORY_MARGIN_SHARE)


def worst_time_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Take the slowest process's load."""
    loads = [process.load_ns / 1e9 for process in _processes(records)]
    if not loads:
        return "no samples"
    num_short = _short(protocol.min_processes, len(loads))
    lacking = f"{len(loads)} processes, {protocol.min_processes} are needed" if num_short else ""
    return Evidence(max(loads), max(loads), max(loads), len(loads), len(loads), lacking, num_short)


def energy_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Take the thirstiest record's mean over its span."""
    spans = [record.energy for record in records if record.energy is not None]
    if not spans:
        return "the device has no energy counter that was read"
    worst = max(span.joules / span.num_tokens for span in spans)
    shortest_s = min(span.span_s for span in spans)
    lacking = f"a span of {shortest_s:g} s is too short" if shortest_s < MIN_ENERGY_SPAN_S else ""
    return Evidence(worst, worst, worst, len(spans), len(spans), lacking)


def accuracy_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Bound the share of right answers on the gate split; a row the judge could not decide counts as wrong.

    Of several sets of rows only the largest counts: built-in sets of one seed are each the beginning of a larger one.
    """
    domain = limit.metric.partition("/")[2]
    found = [record.accuracy[domain] for record in records if domain in record.accuracy]
    gate = [item for item in found if item.split == "gate"]
    if not gate:
        return f"measured on the {found[0].split} split, not on the gate split" if found else "no samples"
    counted = max(gate, key=lambda item: item.num_rows)  # the others may be rows of it: never added
    num_right, num_rows = counted.num_right, counted.num_rows
    share = bounds.share_bounds(num_right, num_rows, confidence=limit.confidence)
    wanted = bounds.num_samples_needed(num_right / num_rows, quantile=limit.value, confidence=limit.confidence)
    num_short = None if wanted is None else _short(wanted, num_rows)
    advice = f": about {num_short} more rows would decide: measure again with --n {wanted}" if num_short else ""
    return Evidence(share.value, share.low, share.high, num_rows, 0, "", num_short, advice=advice)


def divergence_evidence(limit: Limit, records: Sequence[Record], protocol: RequiredProtocol) -> Evidence | str:  # noqa: ARG001
    """Bound the mean KL divergence from the exact fold by how pieces of the text scatter; the worst record counts."""
    costs = _costs(records)
    if isinstance(costs, str):
        return costs
    worst = max(costs, key=lambda cost: cost.kl_mean)
    found = bounds.mean_bounds(worst.kl_chunks, confidence=limit.confidence)
    lacking = "" if found.high is not None else "one piece of text has no scatter: export with a longer --calibration"
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
    """What the formats cost by every record that says it, or why none can be judged."""
    costs = [record.subject.format_cost for record in records if record.subject.format_cost is not None]
    if not costs:
        return "the artifact does not say what its format costs: export it again"
    on_text = [cost for cost in costs if cost.text_sha256 is not None]
    return on_text or "measured over random ids: the base has no tokenizer to read text with"


def _short(num_needed: int, num_found: int) -> int | None:
    """Count what is missing; None for nothing."""
    return max(num_needed - num_found, 0) or None


def _processes(records: Sequence[Record]) -> list[ProcessSamples]:
    return [process for record in records for process in record.samples]


def _effort_lacking(
    processes: Sequence[ProcessSamples], num_measured: int, protocol: RequiredProtocol, *, times_limit: float
) -> str:
    """Say what keeps timings from proving a pass; `times_limit` is the bound in limits, above 1 being worse."""
    if num_measured < protocol.min_processes:
        return f"{num_measured} processes, {protocol.min_processes} are needed"
    busy_s = sum(process.busy_ns for process in processes) / 1e9
    if busy_s < protocol.min_busy_s:
        return f"{busy_s:.3g} s of busy time, {protocol.min_busy_s:g} s are needed"
    unsettled = [process for process in processes if process.warmup.classification in UNSETTLED]
    if unsettled and times_limit * UNSETTLED_SPARE > 1:
        what = unsettled[0].warmup.classification.replace("_", " ")
        return f"process {unsettled[0].process} did not settle ({what})"
    return ""


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
