"""A history as text for the terminal and as Markdown: each work with its metrics, cuts and alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..judge.figures import DASH, count, printable
from .markdown import markdown_cell, markdown_table
from .tables import emphasis, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..judge.history import MetricHistory, RecordHistory, SegmentCut, TrendChange, WorkHistory

_COLUMNS = ("metric", "records", "changes", "five more would show", "")
_MOST_LEFT_OUT = 10
_COMMIT_DIGITS = 12


def history_text(history: RecordHistory) -> str:
    """Return the history as tables under one line that says how many alarms there are."""
    parts = [emphasis(headline(history), "worse" if history.alarms else "equal")]
    for work in history.works:
        rows = [metric_cells(item) for item in work.metrics]
        told = [f"{cut_sentence(cut)}" for cut in work.cuts]
        told += [change_sentence(item, change) for item in work.metrics for change in item.changes]
        parts.append("\n".join([printable(work_line(work)), "", table(_COLUMNS, rows, numbers=(1, 2, 3))]))
        if told:
            parts.append("\n".join(printable(line) for line in told))
    parts += ["\n".join(printable(line) for line in left_out_lines(history))] if history.left_out else []
    return "\n\n".join(parts)


def history_markdown(history: RecordHistory) -> str:
    """Return the history as Markdown, for a comment or a summary."""
    parts = [f"**{headline(history)}**"]
    for work in history.works:
        parts += [markdown_cell(printable(work_line(work)))]
        told = [cut_sentence(cut) for cut in work.cuts]
        told += [change_sentence(item, change) for item in work.metrics for change in item.changes]
        parts += ["\n".join(f"- {markdown_cell(printable(line))}" for line in told)] if told else []
        parts.append(markdown_table(_COLUMNS, [metric_cells(item) for item in work.metrics]))
    parts += ["\n".join(f"- {markdown_cell(printable(line))}" for line in left_out_lines(history))]
    return "\n\n".join(part for part in parts if part)


def headline(history: RecordHistory) -> str:
    """Say in one line how many alarms there are, and how many of them stand."""
    records = count(sum(len(work.records) for work in history.works), "record")
    if not history.alarms:
        return f"no alarm in {records}"
    num_standing = sum(alarm.stands for alarm in history.alarms)
    return f"{count(len(history.alarms), 'alarm')} in {records}, {num_standing or 'none'} of them standing"


def work_line(work: WorkHistory) -> str:
    """Say what was measured, how often and from when to when."""
    span = moment(work.first_utc) if len(work.records) == 1 else f"{moment(work.first_utc)} to {moment(work.last_utc)}"
    return f"{work.work}: {count(len(work.records), 'record')}, {span}"


def moment(created_utc: str) -> str:
    """Write a time as `2026-11-20 03:00 UTC`."""
    return f"{created_utc[:16].replace('T', ' ')} UTC"


def metric_cells(item: MetricHistory) -> list[str]:
    """One metric: records, changes, and the smallest step that five more records would show in nine of ten cases."""
    least = DASH if item.least_step is None else f"{item.least_step:.1%}"
    return [item.title, str(item.num_records), str(len(item.changes)), least, item.note]


def cut_sentence(cut: SegmentCut) -> str:
    """Say that a segment begins, and what changed."""
    of = f" of {cut.metric}" if cut.metric else ""
    return f"cut{of} before {cut.record}, {moment(cut.created_utc)}: {'; '.join(cut.changes)}"


def change_sentence(item: MetricHistory, change: TrendChange) -> str:
    """Say how far a metric moved, from which record on, and from which commits that record came."""
    word = "better" if change.direction == "better" else "ALARM" if change.stands else "past alarm"
    step = f"{change.ratio - 1:+.1%} ({change.low - 1:+.1%} to {change.high - 1:+.1%})"
    return (
        f"{word}: {item.title} {step} from {change.first} on, {moment(change.created_utc)}{commit_words(change)}; "
        f"last before {change.last_before}, proven by {change.seen}"
    )


def commit_words(change: TrendChange) -> str:
    """Name the commits that a record came from, as far as they are known."""
    dirty = " with changes of its own" if change.is_dirty else ""
    found = [
        *([f"measured at commit {change.commit[:_COMMIT_DIGITS]}{dirty}"] if change.commit else []),
        *([f"added by commit {change.added_by[:_COMMIT_DIGITS]}"] if change.added_by else []),
    ]
    return "".join(f", {words}" for words in found)


def left_out_lines(history: RecordHistory) -> Sequence[str]:
    """Name the records that do not count, and why; after `_MOST_LEFT_OUT` names, only their number."""
    shown = [f"left out {name}: {reason}" for name, reason in history.left_out[:_MOST_LEFT_OUT]]
    rest = len(history.left_out) - len(shown)
    return [*shown, *([f"left out {rest} more: --json names them"] if rest else [])]
