"""The words and figures of a report page, ready for its templates: every number is formatted once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from ..judge.figures import DASH, count, printable, show, show_interval
from ..judge.metrics import measured, metric_of
from ..judge.verdicts import VERDICTS
from . import charts
from .history_text import change_sentence, cut_sentence, headline
from .markdown import markdown_cell, markdown_code
from .run_facts import caveats, commands, environment_rows, facts
from .search_table import candidate_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..judge.history import RecordHistory
    from ..judge.limits import Line
    from ..judge.targets import Limit
    from .run import Run
    from .search_files import Margin, Score, ScoreFile

EVIDENCE_WORDS = {
    "measured_target": "measured on the target",
    "measured_other_device": "measured on another device",
    "projected": "projected, not measured",
    "simulated": "simulated, not measured",
}
_BAR_HEADROOM = 1.5
_ACCURACY_FLOOR = 0.5


def html(run: Run) -> str:
    """Return the page for people."""
    return environment().get_template("report.html.jinja").render(**content(run), charts=pictures(run))


def markdown(run: Run) -> str:
    """Return the page for a pull request."""
    return environment().get_template("report.md.jinja").render(**content(run))


def index(
    runs: Sequence[Mapping[str, Any]],
    unread: Sequence[Mapping[str, str]],
    history: RecordHistory,
    limits: Sequence[tuple[str, Limit]],
) -> str:
    """Return the index of all runs: `runs` are lines of the history, oldest first; `limits` those of each target."""
    names = list(dict.fromkeys(name for run in runs for name, value in run["metrics"].items() if value is not None))
    return (
        environment()
        .get_template("index.html.jinja")
        .render(
            runs=[_index_row(run, names) for run in runs],
            metrics=[_history_title(name) for name in names],
            headline=headline(history),
            told=[
                *(
                    {"kind": "worse" if change.stands else "cut", "text": change_sentence(item, change)}
                    for work in history.works
                    for item in work.metrics
                    for change in item.changes
                    if change.direction == "worse"
                ),
                *(
                    {"kind": "cut", "text": cut_sentence(cut)}
                    for work in history.works
                    for cut in work.cuts
                    if not cut.metric
                ),
            ],
            charts=[chart for name in names if (chart := _history_chart(name, runs, history, limits))],
            unread=[*unread, *({"folder": name, "reason": reason} for name, reason in history.left_out)],
        )
    )


def _history_chart(
    name: str, runs: Sequence[Mapping[str, Any]], history: RecordHistory, limits: Sequence[tuple[str, Limit]]
) -> dict[str, Any] | None:
    """One metric over all runs with its limits, and its changes below; None with fewer than two runs."""
    unit = metric_of(name).unit
    own = [(f"{target}: {limit.sign} {show(limit.value, unit)}", limit.value) for target, limit in limits]
    own = [line for line, (_, limit) in zip(own, limits, strict=True) if limit.metric == name]
    items = [item for work in history.works for item in work.metrics if item.metric == name]
    changes = [(item, change) for item in items for change in item.changes]
    cuts = [cut for work in history.works for cut in work.cuts if cut.metric in {"", name}]
    alarms = [change.first for _, change in changes if change.direction == "worse"]
    svg = charts.history(name, unit, runs, limits=own, alarms=alarms, cuts=[cut.record for cut in cuts])
    if svg is None:
        return None
    told = [{"kind": change.direction, "text": change_sentence(item, change)} for item, change in changes]
    told += [{"kind": "cut", "text": cut_sentence(cut)} for cut in cuts if cut.metric]
    return {
        "title": _history_title(name),
        "note": "one colour per device" + ("; limit " + "; ".join(word for word, _ in own) if own else ""),
        "svg": Markup(svg),  # noqa: S704 - our own drawing
        "told": told,
        "least": [item.note or f"five records more would show a step of {item.least_step:.1%}" for item in items],
    }


def _history_title(metric: str) -> str:
    """Name a column of the history with its statistic: the history keeps the percentile of the limits."""
    found = metric_of(metric)
    return f"{found.title}, {found.trend.statistic}" if found.trend and found.trend.statistic else found.title


def _index_row(run: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        "folder": run["folder"],
        "created": _utc(run["created_utc"]),
        "device": run["device"],
        "subject": f"{run['subject']}, {run['structure']}",
        "cells": [show(run["metrics"].get(name), metric_of(name).unit) for name in names],
        "verdicts": [(target, word, VERDICTS[word].title) for target, word in run["verdicts"].items()],
    }


def _utc(created_utc: str) -> str:
    return created_utc.replace("T", " ").removesuffix("Z") + " UTC"


def environment() -> Environment:
    """Return the templates of this folder, with filters that make texts safe."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["cell"] = markdown_cell
    environment.filters["code"] = markdown_code
    environment.filters["prose"] = prose
    return environment


def prose(text: str) -> Markup:
    """Escape a sentence and show text between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))  # noqa: S704 - escaped here


def content(run: Run) -> dict[str, Any]:
    """All content of both templates, as strings and plain lists."""
    record = run.record
    is_judged = any(not judgement.findings for _, judgement in run.judged)
    limited = {line.metric for _, judgement in run.judged for line in judgement.lines if not judgement.findings}
    return {
        "name": record.subject.name,
        "run_id": record.run_id,
        "created": _utc(record.created_utc),
        "facts": facts(record),
        "verdicts": [verdict(target.title, judgement) for target, judgement in run.judged],
        "figures": [
            (metric_of(name).label, show(value, metric_of(name).unit))
            for name, value in measured(record).items()
            if value is not None and not (is_judged and name in limited)
        ],
        "is_judged": is_judged,
        "scores": score_cells(run.scores),
        "environment": environment_rows(record, run.previous),
        "has_previous": run.previous is not None,
        "commands": commands(run),
        "caveats": [*run.left_out, *caveats(run)],
        "hashes": {"record": record.sha256 or DASH, **record.subject.files},
        "search": [] if run.front is None else run.front.notes(),
        "candidates": candidate_table(run.front),
    }


def verdict(title: str, judgement: Any) -> dict[str, Any]:  # noqa: ANN401 - a Judgement, imported only for its name
    """One target's verdict with a bar for each limit."""
    return {
        "target": judgement.target,
        "title": title,
        "verdict": judgement.verdict,
        "word": VERDICTS[judgement.verdict].title,
        "evidence": EVIDENCE_WORDS[judgement.evidence],
        "exit_code": judgement.exit_code,
        "reason": judgement.reason,
        "origin": f"{judgement.target_file}, SHA-256 {judgement.target_sha256}" if judgement.target_sha256 else "",
        "is_judged": not judgement.findings,
        "lines": [limit_row(line) for line in judgement.lines],
        "findings": [f"{finding.rule}: {finding.sentence} Found: {finding.reason}" for finding in judgement.findings],
    }


def limit_row(line: Line) -> dict[str, Any]:
    """One limit as text and as a bar."""
    return {
        "metric": line.metric,
        "title": line.title,
        "statistic": line.statistic,
        "limit": f"{line.sign} {show(line.limit, line.unit)}",
        "value": show(line.value, line.unit),
        "interval": show_interval(line.low, line.high, line.unit),
        "verdict": line.verdict,
        "word": VERDICTS[line.verdict].title,
        "reason": line.reason,
        "samples": _samples(line),
        "bar": bar(line),
    }


def _samples(line: Line) -> str:
    if line.metric.startswith("accuracy/"):
        return count(line.num_samples, "row") if line.num_samples else DASH
    if not line.num_samples:
        return DASH
    if line.num_samples == line.num_processes:
        return count(line.num_processes, "process")
    if not line.num_processes:  # the cost of a format is measured at export, over the tokens of a text
        return count(line.num_samples, "token")
    return f"{count(line.num_samples, 'sample')} in {count(line.num_processes, 'process')}"


def bar(line: Line) -> dict[str, float | str] | None:
    """Positions in percent of the bar: value, interval and limit, and the labels of its ends; None without a value."""
    if line.value is None:
        return None
    low = line.value if line.low is None else line.low
    high = line.value if line.high is None else line.high
    if line.unit == "share":
        start, end = (0.0 if low < _ACCURACY_FLOOR else _ACCURACY_FLOOR), 1.0
    else:
        start, end = 0.0, max(_BAR_HEADROOM * line.limit, 1.1 * high)

    def place(value: float) -> float:
        return round(100 * min(max((value - start) / (end - start), 0.0), 1.0), 2)

    return {
        "value": place(line.value),
        "low": place(low),
        "width": round(max(place(high) - place(low), 0.8), 2),
        "limit": place(line.limit),
        "start": show(start, line.unit) if start else "0",
        "end": show(end, line.unit),
        "good_from": 0.0 if line.sign == "<" else place(line.limit),
        "good_width": place(line.limit) if line.sign == "<" else round(100 - place(line.limit), 2),
    }


def score_cells(scores: ScoreFile | None) -> dict[str, Any] | None:
    """Base, experts and mixture by domain; the best of each column is marked."""
    if scores is None or not scores.rows:
        return None
    domains = scores.domains
    cells = [cell for row in scores.rows for cell in row.accuracy.values()]
    best = {
        domain: max(row.accuracy[domain].share for row in scores.rows if domain in row.accuracy) for domain in domains
    }
    means = [row.mean(domains) for row in scores.rows]
    best_mean = max((mean for mean in means if mean is not None), default=None)
    return {
        "domains": domains,
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "cells": [_score_cell(row.accuracy.get(domain), best[domain]) for domain in domains],
                "mean": show(mean, "share"),
                "is_best": mean is not None and mean == best_mean,
                "kl": f"{max(row.kl_to_base.values()):.3f}" if row.kl_to_base else DASH,
            }
            for row, mean in zip(scores.rows, means, strict=True)
        ],
        "has_kl": any(row.kl_to_base for row in scores.rows),
        "num_rows": max(cell.num_rows for cell in cells),
        "paired": [_paired(margin) for margin in scores.paired],
    }


def _paired(margin: Margin) -> str:
    """One sentence: the mixture against another on the same rows, in points of the mean over the domains."""
    words = "beats" if margin.is_proven else "is not proven to beat"
    interval = f"{100 * margin.low:+.1f} to {100 * margin.high:+.1f}"
    return f"The mixture {words} {margin.against}: {100 * margin.margin:+.1f} points, paired 95 % {interval}"


def _score_cell(cell: Score | None, best: float) -> dict[str, Any]:
    if cell is None:
        return {"value": DASH, "interval": "", "share": 0.0, "low": 0.0, "width": 0.0, "is_best": False}
    return {
        "value": show(cell.share, "share"),
        "interval": show_interval(cell.low, cell.high, "share"),
        "share": round(100 * cell.share, 2),
        "low": round(100 * cell.low, 2),
        "width": round(100 * (cell.high - cell.low), 2),
        "is_best": cell.share == best,
    }


def pictures(run: Run) -> list[dict[str, Any]]:
    """Every chart for which the folder has data, with its heading and a note."""
    record = run.record
    limits = {line.metric: line.limit for _, judgement in run.judged[:1] for line in judgement.lines}
    memory_limit = limits.get("peak_vram_bytes" if record.memory.vram else "peak_rss_bytes")
    rate_limit, latency_limit = limits.get("decode_tok_per_s"), limits.get("prefill_ms")
    drawn = (
        ("Prefill latency", "every counted call", charts.latency_histogram(record, latency_limit)),
        ("Prefill over time", "shows drift, throttling and outliers", charts.latency_series(record)),
        ("Decode throughput", "one dot per run, one column per process", charts.decode_rates(record, rate_limit)),
        ("Memory", "measured separately from the timed calls", charts.memory_timeline(record, memory_limit)),
        ("Search", "arrows point from the first score to the repeated score", front_picture(run)),
    )
    return [{"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in drawn if svg]  # noqa: S704 - our own drawing


def front_picture(run: Run) -> str | None:
    """Draw the search's candidates, with the chosen one's accuracy on the gate split if it was scored."""
    if run.front is None:
        return None
    confirmed = [row for row in run.scores.rows if row.kind == "mixture"] if run.scores else []
    mean = confirmed[-1].mean(list(confirmed[-1].accuracy)) if confirmed else None
    return charts.pareto_front(run.front, None if mean is None else 100 * mean)
