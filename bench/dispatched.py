"""`havoc eval --dispatch`: two-pass inference of a base with experts, as a table and as JSON.

Scored with torch in this process, as a base is: an artifact holds one mixture and has nothing to choose from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..cores import limit_threads, threads_for
from ..export.runtime.artifact import refuse_artifact
from ..progress import SILENT
from .accuracy import tasks_to_score
from .judge.figures import count, show, show_interval
from .report.tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..adapt.dispatch_table import DispatchSettings
    from ..progress import Progress


def evaluate_dispatch(
    model: str,
    experts: Path,
    settings: DispatchSettings,
    *,
    tasks: Sequence[str] = (),
    few_shot: int | None = None,
    is_chat: bool = True,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Compare the ways of dispatch on `model`, a base, with the experts of a folder; see `compare_dispatch`.

    No `tasks` means those that there are experts of. Raises `HavocError` for an artifact.
    """
    from ..adapt.dispatch import open_mixtures
    from ..adapt.dispatch_table import compare_dispatch
    from ..model.checkpoint import load_base

    refuse_artifact(model)
    base = load_base(model, is_chat=is_chat)
    _ = base.tokenizer  # a base that cannot read text is refused before any work
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    mixtures, basis = open_mixtures(base, experts, progress)
    with mixtures:
        asked = tasks_to_score(
            tasks or mixtures.names,
            can_see=base.config.vision is not None,
            data_dir=settings.data_dir,
            online=settings.online,
            few_shot=few_shot,
        )
        return compare_dispatch(mixtures, basis, experts, asked, settings, progress=progress)


def dispatch_lines(document: Mapping[str, Any]) -> list[str]:
    """The tables of a comparison, and what a reader must know of them."""
    parts = [_systems(document), _pairs(document)]
    parts += [_confusion(way, facts) for way, facts in document["first_pass"].items()]
    if document["first_pass"]:
        parts.append(_costs(document["first_pass"]))
    if document["few_shot"]:
        parts.append(_mixtures_found(document["few_shot"]))
    return "\n\n".join([*parts, "\n".join(_notes(document))]).split("\n")


def _systems(document: Mapping[str, Any]) -> str:
    """Share right of every system, by task and over the stream, each with its interval."""
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
    """One line a task: how many of its rows were sent to each expert."""
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
    columns = ("first pass", "own expert chosen", "first pass a row", "second pass a row", "first of both")
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
        lines.append("times are of whole batches in this process: they are no measurement for a record")
    failed = sum(shares["mixed"]["num_failed"] for shares in document["systems"].values())
    if failed:
        lines.append(f"the judge failed on {count(failed, 'answer')} of all systems; they count as not right")
    return lines
