"""Text for the terminal: a verdict, a record, a comparison, a plan, scores, and the capabilities of a machine.

Each function takes a finished result and returns text; `tables.py` lays it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..judge.disturbance import cpu_share, disturbed_share
from ..judge.figures import DASH, count, printable, show, show_interval
from ..judge.metrics import measured, metric_of
from ..judge.verdicts import spelled
from .tables import emphasis, paired_rows_table, paired_table, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..divergence import Divergence
    from ..doctor import Capability
    from ..duel import DuelOutcome
    from ..judge.compare import Comparison
    from ..judge.gate import Judgement
    from ..judge.limits import Line
    from ..judge.paired_rows import PairedRows
    from ..judge.record import Record
    from ..plan import Option, Plan


def judgement_text(judgement: Judgement, title: str) -> str:
    """Return a verdict as a table of limits under a one-line summary."""
    word = spelled(judgement.verdict).upper()
    head = f"{emphasis(word, judgement.verdict)} on {printable(f'{judgement.target} ({title}): {judgement.reason}')}"
    if judgement.findings:
        rows = [[finding.rule, finding.sentence, finding.reason] for finding in judgement.findings]
        body = table(("rule", "must hold", "but"), rows)
    else:
        body = limits_text(judgement.lines)
    if judgement.unlimited:
        rows = [[f"{item.title}, {item.statistic}", show(item.value, item.unit)] for item in judgement.unlimited]
        body += "\n\n" + table(("without a limit", "measured"), rows, numbers=(1,))
    evidence = judgement.evidence.replace("_", " ")
    limits = ""
    if judgement.target_sha256:
        limits = f"; limits of {printable(judgement.target_file or '')}, SHA-256 {judgement.target_sha256[:16]}"
    signed = f"; signed by {', '.join(map(printable, judgement.signed_by))}" if judgement.signed_by else ""
    return f"{head}\n\n{body}\n\nevidence: {evidence}; exit code {judgement.exit_code}{limits}{signed}"


def limits_text(lines: Sequence[Line]) -> str:
    """Return a table of limits: the measured value, the proven bounds, and the verdict of each."""
    head = ("limit", "must be", "measured", "proven", "verdict", "because")
    return table(head, [_line_cells(line) for line in lines], numbers=(2, 3))


def _line_cells(line: Line) -> list[str]:
    effort = count(line.num_samples, "row" if line.metric.startswith("accuracy/") else "sample")
    return [
        f"{line.title}, {line.statistic}",
        f"{line.sign} {show(line.limit, line.unit)}",
        show(line.value, line.unit),
        show_interval(line.low, line.high, line.unit),
        line.verdict,
        effort if line.verdict == "pass" else line.reason,
    ]


def record_text(record: Record) -> str:
    """Return the figures of a record as a table without a verdict; if the record is invalid, the reason comes first."""
    from ..judge.gate import why_invalid

    rows = [[metric_of(name).label, show(value, metric_of(name).unit)] for name, value in measured(record).items()]
    broken = why_invalid(record)
    lines = [] if broken is None else [f"{emphasis('INVALID', 'invalid')}: {printable(broken)}\n"]
    lines.append(table(("measured", printable(record.device.name)), rows, numbers=(1,)))
    lines.extend(_witness_lines(record))
    if (cold := record.cold_start) is not None:
        seconds = (cold.startup_ns + cold.load_ns + cold.first_call_ns) / 1e9
        lines.append(
            f"\ncold start, {cold.page_cache} page cache: {show(seconds, 's')} to the first prefill, of which "
            f"{show(cold.load_ns / 1e9, 's')} to load and {show(cold.first_call_ns / 1e6, 'ms')} for the first call"
        )
    doubts = [f"{check.status}: {check.id}: {check.detail}" for check in record.checks if check.status != "ok"]
    return "\n".join([*lines, *([""] if doubts else []), *doubts])


def _witness_lines(record: Record) -> list[str]:
    """Compare CPU time with wall time, and say for how much of the time other work took the CPU."""
    cores, share = cpu_share(record.samples), disturbed_share(record.samples)
    lines = []
    if cores is not None:
        threads = count(record.protocol.num_threads, "thread")
        lines.append(f"\nprefills used {cores:.2f} cores on average, with {threads}")
    if share:
        lines.append(f"disturbed: {share:.0%} of the timed time; its calls say nothing about the model")
    return lines


def comparison_text(rows: Sequence[Comparison], warnings: Sequence[str]) -> str:
    """Return each metric of two records with its ratio and interval; disturbances come first."""
    cells = [
        [
            f"{row.title}, median" if metric_of(row.metric).kind in _MEDIANS else row.title,
            show(row.old, row.unit),
            show(row.new, row.unit),
            DASH if row.ratio is None else f"{row.ratio:.3f}",
            DASH if row.low is None or row.high is None else f"{row.low:.3f} {DASH} {row.high:.3f}",
            row.change,
            _would_show(row),
        ]
        for row in rows
    ]
    told = "".join(f"{emphasis('warning', 'undecided')}: {printable(warning)}\n" for warning in warnings)
    columns = ("metric", "old", "new", "ratio", "95 % interval", "change", "")
    return (told and f"{told}\n") + table(columns, cells, numbers=(1, 2, 3, 4))


def duel_text(
    outcome: DuelOutcome,
    margin: float,
    notes: Sequence[str],
    *,
    answers: Sequence[PairedRows],
    answer_margin: float,
    far: Divergence | None,
    max_time_s: float,
) -> str:
    """Return the result of a duel: notes, times, agreement of tokens and answers, and advice if it is undecided."""
    parts = [*(f"note: {note}" for note in notes), paired_table(outcome.verdict, outcome.rows, margin)]
    if outcome.agreement is not None and outcome.agreement.num_prompts:
        parts.append(outcome.agreement.sentence())
    if answers:
        parts.append(paired_rows_table(answers, answer_margin))
    if far is not None:
        parts.append(far.sentence())
    if outcome.verdict == "undecided":
        blocks = count(outcome.num_blocks, "block")
        parts.append(f"{blocks} in {max_time_s} s are not enough: raise --max-time or --margin, or use a quiet machine")
    return "\n\n".join(parts)


_MEDIANS = ("latency", "throughput")
"""The quantities whose medians `compare` shows; the gate judges percentiles and the rate over all runs."""


def _would_show(row: Comparison) -> str:
    """For every "no change": the least change that these samples would have shown, or why there is no comparison."""
    if row.change not in {"equal", "undecided"}:
        return row.reason
    shown = "too few samples to show any" if row.detectable is None else f"would show {row.detectable:.1%}"
    return f"{shown}; {row.reason}" if row.reason else shown


def plan_text(plan: Plan) -> str:
    """Return what each structure of a model can reach on a target, and the conclusion."""
    metrics = plan.options[0].figures
    head = [f"{figure.metric} {figure.sign} {show(figure.limit, figure.unit)}" for figure in metrics]
    rows = [_option_cells(option) for option in plan.options]
    right = tuple(range(1, 3 + len(head)))
    best = min((option.outlook for option in plan.options), key=("possible", "unlikely", "impossible").index)
    about = (
        f"{printable(f'{plan.model} on {plan.target} ({plan.target_title})')}: {plan.num_parameters:,} parameters, "
        f"{plan.prefill_flops / 1e9:.4g} GFLOP to read the prompt, {plan.decode_flops / 1e9:.3g} to write a token\n"
        f"peaks: {plan.peaks}"
    )
    parts = [
        about,
        table(("structure", "weights", "KV/token", *head, "outlook"), rows, numbers=right),
        "each figure: certain bound / likely value",
        _samples_text(plan.samples),
        emphasis(plan.conclusion, best),
    ]
    if not plan.truncated:
        return "\n\n".join(parts)
    names = ", ".join(option.structure for option in plan.truncated)
    return "\n\n".join(parts) + f"\nwith fewer ranks, by arithmetic only and if accuracy stays the same: {names}"


def _option_cells(option: Option) -> list[str]:
    figures = [f"{show(figure.floor, figure.unit)} / {show(figure.estimate, figure.unit)}" for figure in option.figures]
    return [
        option.structure,
        show(option.weight_bytes, "bytes"),
        show(option.kv_bytes_per_token, "bytes"),
        *figures,
        option.outlook,
    ]


def _samples_text(samples: dict[str, Any]) -> str:
    effort = f"{samples['min_processes']} processes, {samples['min_samples']} samples, {samples['min_busy_s']:g} s busy"
    none_over = ", ".join(f"{metric} {number}" for metric, number in samples["latency_none_over"].items())
    lines = [f"a verdict needs: {effort}" + (f"; with none over the limit at least {none_over}" if none_over else "")]
    for row in samples["accuracy"]:
        needed = "cannot be proven" if row["num_right"] is None else f"{row['num_right']} right"
        chance = ", ".join(f"{float(true):.0%} model {odds:.0%}" for true, odds in row["chance"].items())
        passes = f" (passes: {chance})" if chance else ""
        lines.append(f"to prove more than {row['share']:.0%} on {row['num_rows']} rows: {needed}{passes}")
    return "\n".join(lines)


def capabilities_text(capabilities: Sequence[Capability]) -> str:
    """Return what a machine can and cannot measure, by topic."""
    topic, rows = "", []
    for able in capabilities:
        rows.append(["" if able.topic == topic else able.topic, able.question, able.answer, able.reason])
        topic = able.topic
    return table(("about", "question", "answer", "because"), rows)


def accuracy_text(scores: Mapping[str, Any], mixed: Mapping[str, Any] | None, notes: Sequence[str]) -> str:
    """Return the score of each task, and of all rows together if `mixed` counts them; then the rows' sources."""
    cells = [cell for task, row in scores.items() for cell in _accuracy_cells(task, row)]
    if mixed is not None:
        cells.append(["mixed", "", *_share_cells(mixed), "all rows of all tasks"])
    columns = ("task", "metric", "accuracy", "95 % interval", "right", "")
    sources = [_source_line(task, row) for task, row in scores.items()]
    return "\n".join([table(columns, cells, numbers=(2, 3, 4)), "", *sources, *notes])


def _source_line(task: str, row: dict[str, Any]) -> str:
    """The source of a task's rows, with the hashes that identify them."""
    hashes = [f"{name} {row[key][:12]}" for name, key in _HASHES.items() if row[key] is not None]
    return f"{task}: {printable(row['source'])}, {row['split']} split; SHA-256: {', '.join(hashes)}"


_HASHES = {"rows": "rows_sha256", "task": "task_sha256", "data": "data_sha256"}


def _accuracy_cells(task: str, row: dict[str, Any]) -> list[list[str]]:
    """One line for each metric of a task; the metric of `accuracy/<task>` comes first."""
    names = sorted(row["metrics"], key=lambda name: name != row["metric"])
    shots = f"{row['few_shot']}-shot" if row["few_shot"] else ""
    failed = count(row["num_failed"], "judge") + " failed" if row["num_failed"] else ""
    chat = "chat template" if row["chat"] else ""
    remarks = ", ".join(filter(None, (chat, shots, failed)))
    return [
        [
            "" if place else task,
            name,
            *_share_cells(counts),
            "" if place else remarks,
        ]
        for place, (name, counts) in enumerate((name, row["metrics"][name]) for name in names)
    ]


def _share_cells(counts: Mapping[str, Any]) -> list[str]:
    """A share, its interval, and the counts."""
    return [
        show(counts["num_right"] / counts["num_rows"], "share"),
        show_interval(counts["low"], counts["high"], "share"),
        f"{counts['num_right']} of {counts['num_rows']}",
    ]
