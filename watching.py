"""`havoc watch`: the status of a run or a search, from another terminal; also for `havoc report` during a run.

Everything is read from the files of the run, and nothing is written: the journal of the search and its pace, the
recipe, and the existing results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from . import run_stages as stages
from .adapt.front import front_of
from .adapt.standing import read_so_far
from .bench.judge.figures import show
from .config import load_recipe
from .errors import HavocError, printable
from .progress import duration, figure_table
from .storage import read_journal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from .adapt.candidate import Evaluation
    from .adapt.standing import JournalSoFar, Standing

_JOURNAL: Final = ("search", "journal.jsonl")
_SHOWN_OF_COST: Final = {"prefill_ms": "ms", "peak_bytes": "bytes", "decode_tok_per_s": "tok/s"}


@dataclass(frozen=True, slots=True)
class Watched:
    """The status of the run in a folder. `stage` is None for a search without a run, and if every stage is done.

    `left_in_all_s` is the remaining time of the whole run, None: unknown; `quiet_s` are the seconds since its files
    changed.
    """

    folder: Path
    is_run: bool
    is_finished: bool
    stage: int | None
    standing: Standing | None
    left_in_all_s: float | None
    quiet_s: float

    @property
    def headline(self) -> str:
        """The run and its status in one line."""
        what = "run" if self.is_run else "search"
        if self.is_finished:
            return f"{self.folder}: this {what} is finished"
        where = f", stage {self.stage} of {len(stages.STAGES)}: {stages.STAGES[self.stage - 1]}" if self.stage else ""
        whole = "" if self.left_in_all_s is None else f", about {duration(self.left_in_all_s)} left in all"
        return f"{self.folder}: this {what} is not finished{where}{whole}; last change {duration(self.quiet_s)} ago"

    def figures(self) -> dict[str, str]:
        """Return the figures of the search, by name."""
        if self.standing is None:
            return {}
        one = self.standing
        left = "-" if one.left_s is None else duration(one.left_s)
        costs = {"costs": f"{one.num_costs} of {one.num_costs_planned}"} if not one.num_evaluated else {}
        evaluated = f"{one.num_evaluated} of {one.num_planned}" + (
            f", {one.num_failed} failed" if one.num_failed else ""
        )
        figures = {**costs, **one.figures(), "evaluated": evaluated, "time left": left}
        return {name: value for name, value in figures.items() if value != "-"}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "folder": str(self.folder),
            "kind": "run" if self.is_run else "search",
            "is_finished": self.is_finished,
            "stage": self.stage,
            "num_stages": len(stages.STAGES) if self.is_run else None,
            "search": None if self.standing is None else self.standing.to_json(),
            "left_in_all_s": self.left_in_all_s,
            "quiet_s": round(self.quiet_s, 1),
        }


def handle_watch(args: argparse.Namespace) -> int:
    """Show the status of the run in a folder repeatedly until it is finished, or once."""
    watched = watch(args.directory)
    if args.once:
        print(json.dumps(watched.to_json()) if args.json else _text(watched))
        return 0
    try:
        if args.json or not sys.stdout.isatty():
            _follow_in_lines(watched, args.every, as_json=args.json)
        else:
            _follow_on_terminal(watched, args.every)
    except KeyboardInterrupt:  # ends the watching; the run continues
        return 0
    return 0


def watch(folder: Path) -> Watched:
    """Read the status of the run or the search in `folder`; a folder without either is a `HavocError`."""
    journal, recipe_path = folder.joinpath(*_JOURNAL), folder / "recipe.toml"
    if not folder.is_dir():
        raise HavocError(f"{folder}: no such folder; give the --out of a `havoc run` or a `havoc search`")
    if not journal.exists() and not recipe_path.exists():
        raise HavocError(f"{folder}: has no run and no search; give the --out of one")
    has_begun = journal.exists() and bool(read_journal(journal))  # its very first line may be half-written
    standing = read_so_far(journal).standing if has_begun else None
    quiet_s = max(0.0, time.time() - _last_change_s(folder))
    if not recipe_path.exists():
        is_finished = (folder / "front.json").exists()
        return Watched(folder, False, is_finished, None, standing, None, quiet_s)
    recipe = load_recipe(recipe_path)
    stage = stages.stage_of(recipe, folder)
    behind_s = None if stage is None else stages.left_after(stage, recipe, folder)
    own_s = standing.left_s if standing is not None and stage == stages.SEARCH else None
    in_all_s = None if own_s is None or behind_s is None else own_s + behind_s
    return Watched(folder, True, stage is None, stage, standing, in_all_s, quiet_s)


def _last_change_s(folder: Path) -> float:
    """When a run last changed one of its files, in seconds of the clock; some come and go while they are looked at."""
    changes_s = [folder.stat().st_mtime]
    for pattern in ("*.json*", "*.toml", "search/*", "experts/*", "artifact/manifest.json"):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                changes_s.append(path.stat().st_mtime)
    return max(changes_s)


def _text(watched: Watched) -> str:
    lines = [printable(watched.headline)]
    lines += [f"  {name}: {value}" for name, value in watched.figures().items()]
    return "\n".join(lines)


def _follow_in_lines(watched: Watched, every_s: float, *, as_json: bool) -> None:
    """Print a line whenever something has changed."""
    said = None
    while True:
        seen = dataclasses.replace(watched, quiet_s=0.0)
        if seen != said:
            said = seen
            print(json.dumps(watched.to_json()) if as_json else _line(watched), flush=True)
        if watched.is_finished:
            return
        time.sleep(every_s)
        watched = watch(watched.folder)


def _line(watched: Watched) -> str:
    figures = "".join(f", {name} {value}" for name, value in watched.figures().items())
    return f"{printable(watched.headline)}{figures}"


def _follow_on_terminal(watched: Watched, every_s: float) -> None:
    """Draw the same table again until the run is finished."""
    from rich.live import Live

    with Live(_drawn(watched), auto_refresh=False) as live:
        while not watched.is_finished:
            time.sleep(every_s)
            watched = watch(watched.folder)
            live.update(_drawn(watched), refresh=True)


def _drawn(watched: Watched) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    figures = watched.figures()
    return Group(Text(printable(watched.headline)), *([figure_table(figures)] if figures else []))


def search_report(folder: Path, *, as_json: bool) -> str:
    """Return the journal of a search so far, as Markdown or one JSON document; nothing is written."""
    watched = watch(folder)
    if watched.standing is None:
        raise HavocError(f"{folder}: its search has written nothing yet; try again in a moment")
    so_far = read_so_far(folder.joinpath(*_JOURNAL))
    front = _front(so_far)
    if as_json:
        return json.dumps({**watched.to_json(), "front": [_plain(one) for one in front]})
    figures = watched.figures()
    domains = so_far.settings.domains
    head = ["structure", *(f"alpha {name}" for name in domains), *domains, *_SHOWN_OF_COST]
    lines = [f"# {printable(watched.headline)}", ""]
    lines += [_cells(list(figures)), _cells(["---"] * len(figures)), _cells(list(figures.values())), ""]
    if front:
        lines += ["The front so far, on rows of the search split:", "", _cells(head), _cells(["---"] * len(head))]
        lines += [_cells(_front_row(one, domains)) for one in front]
    return "\n".join(lines)


def _front(so_far: JournalSoFar) -> list[Evaluation]:
    measured = [one for one in so_far.evaluations if not one.reason]
    if not measured:
        return []
    costs = so_far.costs
    frozen, set_aside = ((), ()) if costs is None else (costs.frozen, costs.set_aside)
    return front_of(measured, so_far.settings, frozen, set_aside)


def _plain(one: Evaluation) -> dict[str, Any]:
    return {
        "key": one.candidate.key(),
        "alpha": list(one.candidate.alpha),
        "structure": str(one.candidate.structure),
        "search_accuracy": one.accuracy,
        "cost": {name: one.cost[name] for name in _SHOWN_OF_COST},
    }


def _front_row(one: Evaluation, domains: Sequence[str]) -> list[str]:
    alpha = [f"{weight:g}" for weight in one.candidate.alpha]
    accuracy = [show(one.accuracy[name], "share") for name in domains]
    return [
        str(one.candidate.structure),
        *alpha,
        *accuracy,
        *(show(one.cost[name], unit) for name, unit in _SHOWN_OF_COST.items()),
    ]


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
