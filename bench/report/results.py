"""`docs/results.md`: the scores of experts and mixtures, only from the records of stored runs.

    python -m havoc_core.bench.report.results reports docs/results.md

Every folder of `reports` with `scores.json`, `record.json` and `recipe.toml` becomes a section: the score table with
exact 95 % intervals, each expert against its base, the mixture against each expert, and the artifact's figures with the
verdicts. Failures are reported in the same words as successes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ... import storage
from ...config import load_recipe
from ...errors import HavocError
from ..judge.figures import DASH, show
from ..judge.gate import judge
from ..judge.metrics import measured, metric_of
from ..judge.record import Record, load_record
from ..judge.targets import load_target
from .search_files import read_front, read_scores, why_not_its_scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...config import Recipe
    from .search_files import Margin, Score, ScoreFile, ScoreRow

RECIPE, SCORES, RECORD, FRONT = "recipe.toml", "scores.json", "record.json", "front.json"
_HEAD = """# Results

Every number on this page comes from a record under `reports/`; `make results` writes the page again.
Shares are of the gate split, which no training and no search has seen, with exact 95 % intervals (Clopper and Pearson).
If two intervals do not overlap, the shares certainly differ.
"""


def write_results(reports: Path, page: Path) -> list[str]:
    """Write the page of all stored runs under `reports`; return the names of their folders, oldest name first.

    Raises `HavocError` if a run cannot be read or there is no run: every number on the page needs a record.
    """
    folders = sorted(path.parent for path in reports.glob(f"*/{SCORES}") if (path.parent / RECIPE).is_file())
    if not folders:
        raise HavocError(f"{reports}: no folder with {SCORES} and {RECIPE}; `havoc run --out DIR` makes one")
    sections = [section(folder) for folder in folders]
    storage.write_text(page, "\n".join([_HEAD, *sections]))
    return [folder.name for folder in folders]


def section(folder: Path) -> str:
    """Return the section of one run's folder, as Markdown."""
    recipe, record = load_recipe(folder / RECIPE), load_record(folder / RECORD)
    scores = read_scores(folder / SCORES)
    if scores is None or (reason := why_not_its_scores(scores, record)):
        raise HavocError(f"{folder / SCORES}: {reason if scores else 'no such file'}")
    lines = [f"## {folder.name}", "", _what(recipe, folder), "", *score_markdown(scores), ""]
    lines += [f"- {sentence}" for sentence in (*experts_against_base(scores), *mixture_against(scores))]
    lines += ["", *artifact_table(recipe, record), ""]
    return "\n".join(lines)


def _what(recipe: Recipe, folder: Path) -> str:
    settings, front = recipe.experts, read_front(folder / FRONT)
    searched = "no search" if front is None else f"{len(front.candidates)} candidates of the search on record"
    steps = f"{settings.num_steps} steps" if settings.num_steps else "as many steps as the method takes"
    return (
        f"Base `{recipe.model.base}`, experts trained for {steps}, seed {settings.seed}; {searched}. "
        f"The recipe, the record and the report: `reports/{folder.name}`."
    )


def score_markdown(scores: ScoreFile) -> list[str]:
    """Lines of a Markdown table: base, experts and mixture by task, the mean last."""
    tasks = scores.domains
    lines = ["| | " + " | ".join([*tasks, "mean"]) + " |", "|---|" + "---|" * (len(tasks) + 1)]
    for row in scores.rows:
        cells = [_cell(row.accuracy.get(task)) for task in tasks]
        mean = row.mean(tasks)
        name = row.name if row.kind != "expert" else f"{row.name} expert"
        lines.append(f"| {name} | " + " | ".join([*cells, DASH if mean is None else show(mean, "share")]) + " |")
    return lines


def _cell(score: Score | None) -> str:
    if score is None:
        return DASH
    bounds = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
    return f"{show(score.share, 'share')} ({bounds}; {score.num_right:,} of {score.num_rows:,})"


def experts_against_base(scores: ScoreFile) -> Iterator[str]:
    """One sentence for each expert: the difference from its base on its own task."""
    base = next((row for row in scores.rows if row.kind == "base"), None)
    for row in scores.rows:
        if base is None or row.kind != "expert" or not {row.name} <= set(row.accuracy) & set(base.accuracy):
            continue
        ours, theirs = row.accuracy[row.name], base.accuracy[row.name]
        points = 100 * (ours.share - theirs.share)
        yield f"The {row.name} expert: {points:+.1f} points against the base on its task; {_relation(ours, theirs)}."


def _relation(ours: Score, theirs: Score) -> str:
    if ours.low > theirs.high:
        return "the intervals are disjoint, so it is better"
    if ours.high < theirs.low:
        return "the intervals are disjoint, so it is worse"
    return "the intervals overlap, so neither is shown to be better"


def mixture_against(scores: ScoreFile) -> Iterator[str]:
    """One sentence for each comparison of the mixture, paired on the same rows."""
    for margin in scores.paired:
        yield (
            f"The mixture against {_who(margin, scores.rows)}: {100 * margin.margin:+.1f} points of the mean "
            f"(paired 95 % {100 * margin.low:+.1f} to {100 * margin.high:+.1f}); {_paired_relation(margin)}."
        )


def _who(margin: Margin, rows: Sequence[ScoreRow]) -> str:
    kind = next((row.kind for row in rows if row.name == margin.against), "base")
    return "the base" if kind == "base" else f"the {margin.against} expert"


def _paired_relation(margin: Margin) -> str:
    if margin.low > 0:
        return "better"
    return "worse" if margin.high < 0 else "not shown to differ"


def artifact_table(recipe: Recipe, record: Record) -> list[str]:
    """Lines of a Markdown table: the artifact's figures, and each target's verdict on the measured device."""
    figures = {
        metric: value
        for metric, value in measured(record).items()
        if value is not None and not metric.startswith("accuracy/")
    }
    judged = [(name, judge([record], load_target(name), this_cpu=record.device.cpu)) for name in recipe.gate.targets]
    lines = [f"| artifact on {record.device.name} | |", "|---|---|"]
    lines += [f"| {metric} | {show(value, metric_of(metric).unit)} |" for metric, value in figures.items()]
    lines += [f"| verdict for `{name}` | {judgement.verdict}: {judgement.reason} |" for name, judgement in judged]
    return lines


if __name__ == "__main__":
    _reports, _page = (Path(argument) for argument in sys.argv[1:3])
    try:
        write_results(_reports, _page)
    except HavocError as error:
        sys.exit(f"results: {error}")
