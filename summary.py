"""The output at the end of a run: accuracy by task, figures against limits, verdicts, the page."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .adapt.tasks.names import in_order
from .bench.judge.figures import printable, show, show_interval
from .bench.judge.verdicts import VERDICTS
from .bench.report.search_files import Front
from .model.structure import Structure
from .storage import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .adapt.search import SearchResult
    from .bench.judge.gate import Judgement
    from .config import Recipe


def show_run(out: Path, judgements: Sequence[tuple[str, Judgement]], *, as_json: bool) -> None:
    """Print the result of the run in `out`: tables, or with `as_json` one JSON document."""
    scores = read_json(out / "scores.json")
    if as_json:
        document = {
            "out": str(out),
            "report": str(out / "report.html"),
            "scores": scores,
            "judgements": {name: judgement.document() for name, judgement in judgements},
        }
        print(json.dumps(document))
        return
    console = Console()
    for name, judgement in judgements:
        style = VERDICTS[judgement.verdict].terminal
        console.print(
            f"[bold]{_plain(name)}[/]: [{style}]{judgement.verdict}[/] (exit {judgement.exit_code}) "
            f"{_plain(judgement.reason)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print()
    console.print(accuracy_text(scores))
    for row in scores["paired"]:
        console.print(_paired(row), highlight=False)
    console.print()
    for name, judgement in judgements:
        console.print(limit_table(name, judgement))
    console.print(f"\nreport: {escape(str(out / 'report.html'))}", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text of a file or a driver as it is: nothing in it styles or steers the terminal."""
    return escape(printable(text))


def export_command(result: SearchResult, recipe: Recipe, tasks: Sequence[str], *, base: str, experts: Path) -> str:
    """Return the command that exports a search's choice; alpha in the order in which `havoc export` reads experts."""
    candidate = result.chosen.candidate
    alpha = dict(zip(tasks, candidate.alpha, strict=True))
    weights = ",".join(f"{alpha[name]:g}" for name in in_order(alpha))
    words = ["havoc", "export", base, "--experts", str(experts), "--alpha", weights]
    words += [] if recipe.search.rule == "delta" else ["--rule", recipe.search.rule]
    return shlex.join([*words, *_structure_options(candidate.structure), "--out", "artifact"])


def _structure_options(structure: Structure) -> list[str]:
    plain = Structure()
    words = ["--weights", structure.weight_format]
    words += (
        [] if structure.activation_dtype == plain.activation_dtype else ["--activations", structure.activation_dtype]
    )
    words += [] if structure.block_size == plain.block_size else ["--block-size", str(structure.block_size)]
    words += [] if structure.is_symmetric else ["--asymmetric"]
    words += [] if structure.quantizer == plain.quantizer else ["--quantizer", structure.quantizer.replace("_", "-")]
    words += [] if structure.average_bits is None else ["--bits", f"{structure.average_bits:g}"]
    words += ["--compute", structure.compute] if structure.has_compute and structure.compute != "int8" else []
    words += [] if structure.rank_fraction == plain.rank_fraction else ["--rank", f"{structure.rank_fraction:g}"]
    return words


def show_search(result: SearchResult, tasks: Sequence[str], out: Path, *, command: str, as_json: bool) -> None:
    """Print a search's choice: mixture, structure, its score on fresh rows, and the next command."""
    if as_json:
        print(json.dumps({**result.to_json(), "next": command}))
        return
    candidate = result.chosen.candidate
    alpha = ", ".join(f"{name} {weight:g}" for name, weight in zip(tasks, candidate.alpha, strict=True))
    accuracy = ", ".join(f"{name} {share:.1%}" for name, share in result.chosen.accuracy.items())
    print(f"chosen: {alpha}; weights {candidate.structure}")
    print(f"on fresh rows of the search split: {accuracy}")
    front = Front.model_validate(result.to_json())
    for note in front.notes():
        print(note)
    print(f"{len(front.front)} on the front: {out / 'front.json'}")
    print(f"next: {command}")


def accuracy_text(scores: Mapping[str, Any]) -> Table:
    """Accuracy of base, experts and mixture by task, with 95 % intervals, and their largest KL(adapted || base)."""
    first = scores["rows"][0]["accuracy"]
    numbers = sorted({count["num_rows"] for count in first.values()})
    rows = " or ".join(map(str, numbers))
    table = Table(title=f"Accuracy, {scores['split']} split, {rows} rows each, 95 % intervals", title_justify="left")
    table.add_column("")
    for name in [*first, "mean", "KL to base"]:
        table.add_column(name, justify="right")
    for row in scores["rows"]:
        counts = row["accuracy"].values()
        mean = sum(count["num_right"] / count["num_rows"] for count in counts) / len(counts)
        style = "bold" if row["kind"] == "mixture" else ""
        cells = [*map(_share, counts), f"{mean:.1%}", _kl(row)]
        table.add_row(row["name"], *cells, style=style)
    return table


def _kl(row: Mapping[str, Any]) -> str:
    """The largest of the tasks' divergences; a table of an older program has none."""
    return f"{max(row['kl_to_base'].values()):.3f}" if "kl_to_base" in row else "-"


def _share(count: Mapping[str, Any]) -> str:
    share = count["num_right"] / count["num_rows"]
    return f"{share:.1%} [dim]{100 * count['low']:.1f}-{100 * count['high']:.1f}[/]"


def _paired(row: Mapping[str, Any]) -> str:
    words = "beats" if row["is_proven"] else "is not proven to beat"
    interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return (
        f"the mixture {words} {row['against']}: {100 * row['margin']:+.1f} points on the mean, paired 95 % {interval}"
    )


def limit_table(name: str, judgement: Judgement) -> Table:
    """One target's limits: the measured values, the proven bounds, and the verdict."""
    table = Table(title=f"Limits of {_plain(name)}", title_justify="left")
    for column in ("", "limit", "measured", "proven", "verdict"):
        table.add_column(column, justify="left" if column in {"", "verdict"} else "right")
    for line in judgement.lines:
        table.add_row(
            f"{line.title}, {line.statistic}",
            f"{line.sign} {show(line.limit, line.unit)}",
            show(line.value, line.unit),
            show_interval(line.low, line.high, line.unit),
            f"[{VERDICTS[line.verdict].terminal}]{line.verdict}[/]",
        )
    return table
