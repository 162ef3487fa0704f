"""A comparison of ways of adapting as pages: one JSON document, Markdown, HTML with a chart, and the page in docs.

    python -m havoc_core.bench.report.baselines reports docs/baselines.md

A difference is called better or worse only if its 95 % interval excludes 0. Seconds are shown only if no other work
disturbed the training.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, NullFormatter

from ... import storage
from ...errors import HavocError
from ..judge.figures import DASH, count, show, show_interval
from .drawing import MUTED, SERIES, drawing_board
from .folder import refuse_links
from .page import environment
from .tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOCUMENT: Final = "baselines.json"
WRITTEN: Final = (DOCUMENT, "baselines.md", "baselines.html")
_FORMAT = "havoc-baselines/1"
_MOST_SWITCHES_PER_S: Final = 20
"""Most involuntary context switches per CPU second of an undisturbed training. A process that shares its core has more,
and its seconds depend on the other work."""
_HEAD = """# Baselines

This page compares singular-value scales (SVF) with LoRA and with the scales of one kind of matrix. `havoc baselines`
trains each on the same rows, with the same number of prompts and the same seeds, and scores it on the same gate rows.
Every number below comes from a `baselines.json` under `reports/`; `make baselines` writes this page.

```sh
pip install "havoc-core[baselines]"
havoc baselines nano --task math --out baselines
```

- **One loop.** LoRA uses `peft`'s own layers inside HAVOC's decoder, on the same matrices as the scales. Rows, prompts,
  loss mask, KL term, optimizer, validation and scoring are the same code.
- **One budget.** Every arm sees the same number of prompts. An arm trained by reward samples answers to them and never
  sees a reference; an arm trained by next-token reads the references.
- **Rates are tuned alike.** Each arm tries the same number of learning rates. For each seed the search split chooses
  the rate and the step; the gate split chooses nothing.
- **Differences** are paired on the same gate rows. Their 95 % intervals cover other rows and, with several seeds, other
  seeds. Shares of single runs have exact 95 % intervals (Clopper and Pearson). No interval is corrected for the number
  of comparisons.
- **The bundled base is an easy case.** It knows more than it answers
  ([decision 7](decisions/0007-a-base-that-knows-better.md)), so these results may not hold for another base.
- **It can continue.** A stopped comparison continues where it stopped; you can add seeds and arms to its folder.

"""


def write_baselines(document: Mapping[str, Any], out: Path) -> Path:
    """Write the document, with `model` and `command`, and its pages into `out`; return the HTML page."""
    refuse_links(out, WRITTEN)
    storage.write_text(out / "baselines.md", markdown(document))
    storage.write_text(out / "baselines.html", html(document))
    storage.write_json(out / DOCUMENT, document)
    return out / "baselines.html"


def write_docs(reports: Path, page: Path) -> list[str]:
    """Write the page of all stored comparisons; return the names of their folders. No comparison is a `HavocError`."""
    folders = sorted(path.parent for path in reports.rglob(DOCUMENT))
    if not folders:
        raise HavocError(f"{reports}: holds no {DOCUMENT}; `havoc baselines` makes one")
    sections = []
    for folder in folders:
        name = folder.relative_to(reports).as_posix()
        text = markdown(read_baselines(folder / DOCUMENT), has_seconds=False)
        sections.append(f"{text}\nThe record: `reports/{name}`.\n")
    storage.write_text(page, _HEAD + "\n".join(sections))
    return [folder.relative_to(reports).as_posix() for folder in folders]


def read_baselines(path: Path) -> dict[str, Any]:
    """Read a stored comparison; a file in another format is a `HavocError`."""
    found = storage.read_json(path)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise HavocError(f"{path}: not a comparison of baselines ({_FORMAT})")
    return found


def markdown(document: Mapping[str, Any], *, has_seconds: bool = True) -> str:
    """Return the comparison as a section of Markdown."""
    template = environment().get_template("baselines.md.jinja")
    return template.render(**content(document), has_seconds=has_seconds)


def html(document: Mapping[str, Any]) -> str:
    """Return the page for people."""
    chart = Markup(picture(document))  # noqa: S704 - our own drawing
    return environment().get_template("baselines.html.jinja").render(**content(document), chart=chart)


def lines(document: Mapping[str, Any]) -> str:
    """Return the comparison as a table for a terminal, with notes that a reader needs."""
    said = content(document)
    cells = [
        [row["title"], row["parameters"], row["accuracy"], row["spread"], row["points"], row["interval"], row["word"]]
        for row in said["arms"]
    ]
    columns = ("arm", "trained values", "right", "by seed", "points against the base", "95 % interval", "")
    return "\n".join([table(columns, cells, numbers=(1, 2, 3, 4, 5)), "", *said["notes"]])


def content(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the pages say, as strings and plain lists."""
    base, training, rows = document["base"], document["training"], document["rows"]
    titles = {arm["name"]: arm["title"] for arm in document["arms"]}
    prompts = f"{training['num_steps']} steps of {count(training['prompts_per_step'], 'prompt')}"
    facts = [
        ("base", f"{document['model']}, {base['num_parameters']:,} parameters"),
        ("task", f"{document['task']['name']}, {document['task']['metric']}"),
        ("budget of every arm", f"{document['num_training_prompts']:,} prompts: {prompts}"),
        ("seeds", ", ".join(map(str, document["seeds"]))),
        ("gate rows", f"{rows['gate']['num_rows']:,}"),
        ("search rows", f"{rows['search']['num_rows']:,}"),
    ]
    ratio = document["lora_over_svf"]
    if ratio is not None:
        facts.append(("LoRA : SVF", f"{ratio:.1f} times as many trained values"))
    return {
        "title": f"{document['task']['name']} on {document['model']}",
        "facts": facts,
        "base": {
            "parameters": "0",
            "accuracy": show(base["num_right"] / base["num_rows"], "share"),
            "interval": show_interval(base["low"], base["high"], "share"),
            "right": f"{base['num_right']:,} of {base['num_rows']:,}",
        },
        "arms": [_arm(arm) for arm in document["arms"]],
        "runs": [_run(arm, run) for arm in document["arms"] for run in arm["runs"]],
        "pairs": [
            {"ours": titles[pair["ours"]], "theirs": titles[pair["theirs"]], **_difference(pair)}
            for pair in document["pairs"]
        ],
        "notes": notes(document),
        "command": document["command"],
    }


def _arm(arm: Mapping[str, Any]) -> dict[str, str]:
    shares = [run["num_right"] / run["num_rows"] for run in arm["runs"]]
    return {
        "title": arm["title"],
        "matrices": "all projections" if len(arm["matrices"]) > 1 else f"{arm['matrices'][0]} only",
        "parameters": f"{arm['num_parameters']:,}",
        "accuracy": show(arm["mean"], "share"),
        "spread": show_interval(min(shares), max(shares), "share") if len(shares) > 1 else DASH,
        **_difference(arm["difference"]),
        "seconds": _seconds(arm["runs"]),
    }


def _difference(pair: Mapping[str, Any]) -> dict[str, str]:
    word = "better" if pair["low"] > 0 else "worse" if pair["high"] < 0 else "not shown to differ"
    interval = f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
    return {"points": f"{100 * pair['margin']:+.1f}", "interval": interval, "word": word}


def _seconds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean CPU seconds of a training at the chosen rate; empty if a training had to share a core."""
    if any(run["train_involuntary_switches"] > _MOST_SWITCHES_PER_S * run["train_cpu_s"] for run in runs):
        return "disturbed"
    return show(statistics.fmean(run["train_cpu_s"] for run in runs), "s")


def _run(arm: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    tried = ", ".join(f"{rate:g}: {num_right}" for rate, num_right in run["validation_by_rate"])
    return {
        "title": arm["title"],
        "seed": str(run["seed"]),
        "rate": f"{run['rate']:g}",
        "step": str(run["validation"]["step"]),
        "tried": f"{tried} of {run['validation']['num_rows']}",
        "accuracy": show(run["num_right"] / run["num_rows"], "share"),
        "interval": show_interval(run["low"], run["high"], "share"),
        "right": f"{run['num_right']:,} of {run['num_rows']:,}",
    }


def notes(document: Mapping[str, Any]) -> list[str]:
    """Notes that a reader of the figures needs."""
    samples = document["training"]["samples_per_prompt"]
    found = []
    if any(arm["method"] == "reinforce" for arm in document["arms"]):
        found.append(f"reinforce samples {samples} answers to each of its prompts; next-token reads one reference")
    if len(document["seeds"]) == 1:
        found.append("one seed: the intervals cover other rows only, not other seeds")
    unmoved = [
        f"{arm['title']}, seed {run['seed']}"
        for arm in document["arms"]
        for run in arm["runs"]
        if run["validation"]["step"] == 0
    ]
    if unmoved:
        found.append(f"no step beat the base on the search rows, so the base was kept: {'; '.join(unmoved)}")
    at_end = [
        f"{arm['title']}, seed {run['seed']}"
        for arm in document["arms"]
        for run in arm["runs"]
        if len(run["validation_by_rate"]) > 1
        and run["rate"] in {run["validation_by_rate"][0][0], run["validation_by_rate"][-1][0]}
        and run["validation"]["step"]
    ]
    if at_end:
        found.append(f"the best rate was the lowest or highest tried, so another might do better: {'; '.join(at_end)}")
    failed = sum(run["num_failed"] for arm in document["arms"] for run in arm["runs"])
    if failed:
        found.append(f"the judge failed on {count(failed, 'answer')} of all runs; they count as not right")
    return found


def picture(document: Mapping[str, Any]) -> str:
    """Draw accuracy over trained values: a dot with its exact interval for each run, a bar for each arm's mean."""
    base = document["base"]
    with drawing_board("baselines", height=3.4) as (figure, axes):
        axes.axhspan(100 * base["low"], 100 * base["high"], color=MUTED, alpha=0.15, linewidth=0)
        axes.axhline(100 * base["num_right"] / base["num_rows"], color=MUTED, linewidth=1.1, label="base")
        for index, arm in enumerate(document["arms"]):
            colour = SERIES[index % len(SERIES)]
            low, high = _places(document["arms"], index)
            for step, run in enumerate(arm["runs"], start=1):
                x = low * (high / low) ** (step / (len(arm["runs"]) + 1))
                axes.plot([x, x], [100 * run["low"], 100 * run["high"]], color=colour, linewidth=1, alpha=0.5)
                axes.plot(x, 100 * run["num_right"] / run["num_rows"], "o", color=colour, markersize=4.5)
            axes.plot([low, high], [100 * arm["mean"]] * 2, color=colour, linewidth=2, label=arm["title"])
        axes.set_xscale("log")
        sizes = [math.log10(arm["num_parameters"]) for arm in document["arms"]]
        axes.set_xlim(10 ** math.floor(min(sizes) - _MARGIN), 10 ** math.ceil(max(sizes) + _MARGIN))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trained values, logarithmic")
        axes.set_ylabel("gate rows right, %")
        axes.margins(y=0.1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, columnspacing=1.0, handletextpad=0.4)
    return figure.svg


_MARGIN = 0.2  # decades
_WIDTH = 1.5
"""An arm's marks are spread over this factor of trained values; arms with equal numbers are drawn side by side."""


def _places(arms: Sequence[Mapping[str, Any]], index: int) -> tuple[float, float]:
    """Lowest and highest trained values at which an arm's marks are drawn; arms of one size share the width."""
    size = arms[index]["num_parameters"]
    same = [place for place, arm in enumerate(arms) if arm["num_parameters"] == size]
    slot = same.index(index)
    low = math.log(size) - math.log(_WIDTH) * len(same) / 2 + math.log(_WIDTH) * slot
    return math.exp(low), math.exp(low + math.log(_WIDTH))


if __name__ == "__main__":
    _reports, _page = (Path(argument) for argument in sys.argv[1:3])
    try:
        write_docs(_reports, _page)
    except HavocError as error:
        sys.exit(f"baselines: {error}")
