"""A comparison of ways of dispatch as tables for a terminal: shares, pairs, confusion, cost, and the mixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..judge.figures import count, show, show_interval
from .tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping


def dispatch_lines(document: Mapping[str, Any]) -> list[str]:
    """The tables of a comparison, with notes that a reader needs."""
    parts = [_systems(document), _pairs(document)]
    parts += [_confusion(way, facts) for way, facts in document["first_pass"].items()]
    if document["first_pass"]:
        parts.append(_costs(document["first_pass"]))
    if document["few_shot"]:
        parts.append(_mixtures_found(document["few_shot"]))
    return "\n\n".join([*parts, "\n".join(_notes(document))]).split("\n")


def _systems(document: Mapping[str, Any]) -> str:
    """The share right of every system, by task and over the stream, with intervals."""
    columns = [*document["tasks"], "mixed"]
    rows = []
    for name, shares in document["systems"].items():
        cells = [shares[column] for column in columns]
        rows.append([name, *(_cell(cell) for cell in cells)])
    return table(("system", *columns), rows, numbers=range(1, len(columns) + 1))


def _cell(counts: Mapping[str, Any]) -> str:
    share = show(counts["num_right"] / counts["num_rows"], "share")
    return f"{share} [{show_interval(counts['low'], counts['high'], 'share')}]"


def _pairs(document: Mapping[str, Any]) -> str:
    rows = [
        [
            pair["ours"],
            pair["theirs"],
            f"{100 * pair['margin']:+.1f}",
            f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}" if pair["low"] is not None else "-",
            str(pair["num_only_ours"]),
            str(pair["num_only_theirs"]),
        ]
        for pair in document["pairs"]
    ]
    columns = ("system", "against", "points", "95 % interval", "only it right", "only the other")
    return table(columns, rows, numbers=(2, 3, 4, 5))


def _confusion(way: str, facts: Mapping[str, Any]) -> str:
    """One line per task: how many of its rows were sent to each expert."""
    counts = facts["confusion"]
    names = list(next(iter(counts.values())))
    rows = [[task, *(str(row[name]) for name in names)] for task, row in counts.items()]
    return table((f"{way}: rows of", *(f"to {name}" for name in names)), rows, numbers=range(1, len(names) + 1))


def _costs(first_pass: Mapping[str, Any]) -> str:
    rows = []
    for way, facts in first_pass.items():
        own = facts["own_expert"]
        rows.append(
            [
                way,
                _cell(own),
                show(facts["first_pass_ms_per_row"], "ms"),
                show(facts["second_pass_ms_per_row"], "ms"),
                show(facts["first_pass_share"], "share"),
            ]
        )
    columns = ("first pass", "own expert chosen", "first pass per row", "second pass per row", "first of both")
    return table(columns, rows, numbers=(1, 2, 3, 4))


def _mixtures_found(found: Mapping[str, Any]) -> str:
    rows = [
        [
            task,
            ", ".join(f"{name} {weight:g}" for name, weight in facts["alpha"].items()),
            show(facts["share_right"], "share"),
            str(facts["num_asked"]),
            show(facts["search_s"], "s"),
        ]
        for task, facts in found.items()
    ]
    return table(("few-shot", "alpha", "examples right", "mixtures tried", "search"), rows, numbers=(2, 3, 4))


def _notes(document: Mapping[str, Any]) -> list[str]:
    selection = document["selection"]
    fixed = ", ".join(f"{name} {weight:g}" for name, weight in selection["fixed_mixture"].items())
    is_chosen = "num_right_alike" in selection
    chosen_on = f"{count(selection['num_rows'], 'row')} of the {selection['split']} split"
    lines = [
        f"{document['split']} split, seed {document['seed']}; mixed: all rows as one stream",
        f"best single expert: {selection['best_single']}, chosen on {chosen_on}",
        f"fixed mixture: {fixed}, {'chosen on the same rows' if is_chosen else 'as given'}",
    ]
    if document["first_pass"]:
        change = show(document["change_of_scales_ms"], "ms")
        lines.append("times are of whole batches in this process; they are not a measurement of a device")
        lines.append(
            f"a change of scales took {change} more; rows of one mixture share this cost, a single prompt has all of it"
        )
    failed = sum(shares["mixed"]["num_failed"] for shares in document["systems"].values())
    if failed:
        lines.append(f"the judge failed on {count(failed, 'answer')} of all systems; they count as not right")
    return lines
