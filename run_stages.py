"""The stages of a run by number, and the remaining time of all, estimated from the measurements so far.

    progress = StagedProgress(make_progress(), recipe, out)
    progress.enter(SEARCH)                         # bars now show "stage 2 of 6, search", and the total time left

The estimate uses the pace of the search: the seconds to answer a row, and to write and measure a structure. Until the
search has both, there is no estimate for the whole run. Estimates are shown with "about".
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from .adapt.pace import read_pace
from .bench.profiles import profile_named
from .progress import duration
from .storage import read_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from .adapt.pace import Pace
    from .bench.profiles import Profile
    from .config import Recipe
    from .progress import Progress, Stage

STAGES: Final = (
    "experts",
    "search",
    "artifact",
    "the artifact on the gate split",
    "base and experts on the gate split",
    "measurement",
)
EXPERTS, SEARCH, ARTIFACT, GATE_ARTIFACT, GATE_OTHERS, MEASUREMENT = range(1, len(STAGES) + 1)


_ASKED_EVERY_S: Final = 1.0
"""The least seconds between two readings of the file with the pace."""


def stage_of(recipe: Recipe, out: Path) -> int | None:
    """Return the number of the first stage that has not left its result in `out`; None where all have."""
    from .adapt.expert import expert_path
    from .measuring import recipe_tasks

    if not all(expert_path(out / "experts", task.name).exists() for task in recipe_tasks(recipe)):
        return EXPERTS
    left = {
        SEARCH: out / "front.json",
        ARTIFACT: out / "artifact" / "manifest.json",
        GATE_OTHERS: out / "scores.json",
        MEASUREMENT: out / "handoff.json",
    }
    number = next((number for number, path in left.items() if not path.exists()), None)
    return GATE_ARTIFACT if number == GATE_OTHERS and not _is_artifact_scored(out) else number


def _is_artifact_scored(out: Path) -> bool:
    path = out / "gate.jsonl"
    return path.exists() and any(entry.get("kind") == "artifact" for entry in read_journal(path))


def seconds_of(recipe: Recipe, pace: Pace) -> dict[int, float] | None:
    """Estimate each stage after the search; None if the search has not measured enough for it."""
    s_per_cost, s_per_sample = pace.s_per_cost, pace.s_per_sample
    if s_per_cost is None or s_per_sample is None:
        return None
    s_per_gate_rows = s_per_sample * recipe.gate.num_rows / recipe.search.num_rows
    profile = profile_named(recipe.bench.profile)
    longer_s = max(0.0, _busy_s(profile) - _busy_s(profile_named("screen")))
    num_processes = profile.num_processes + profile.num_memory_processes
    return {
        ARTIFACT: s_per_cost,
        GATE_ARTIFACT: s_per_gate_rows,
        GATE_OTHERS: s_per_gate_rows * (len(recipe.experts.tasks) + 1),
        MEASUREMENT: num_processes * (s_per_cost + longer_s),
    }


def _busy_s(profile: Profile) -> float:
    """Seconds that one process measures at least."""
    series = (profile.prefill, profile.ttft, profile.decode, profile.memory)
    return profile.warmup_window_s + sum(one.min_busy_s for one in series)


def left_after(number: int, recipe: Recipe, out: Path) -> float | None:
    """Estimate the seconds of all stages after stage `number`; None if they cannot be known yet."""
    estimates = seconds_of(recipe, read_pace(out / "search"))
    if estimates is None or number < SEARCH:
        return None
    return sum(seconds for stage, seconds in estimates.items() if stage > number)


class StagedProgress:
    """A `Progress` that names the stage of the run, and shows the remaining time of the run once it is known."""

    def __init__(
        self, progress: Progress, recipe: Recipe, out: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show through `progress`; `clock` counts seconds."""
        self._progress, self._recipe, self._out, self._clock = progress, recipe, out, clock
        self._number = EXPERTS
        self._depth = 0

    def enter(self, number: int) -> None:
        """Begin stage `number`."""
        self._number = number

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Stage]:
        """See `Progress.stage`; an outermost one says which stage of the run it is."""
        if self._depth:
            with self._progress.stage(name, total, unit=unit) as stage:
                yield stage
            return
        self._depth += 1
        try:
            title = f"stage {self._number} of {len(STAGES)}, {name}"
            with self._progress.stage(title, total, unit=unit) as stage:
                yield _StageOfRun(stage, total, self._left_behind, self._clock, counts=self._number != SEARCH)
        finally:
            self._depth -= 1

    def _left_behind(self) -> float | None:
        return left_after(self._number, self._recipe, self._out)


class _StageOfRun:
    """One running stage; its remaining time is given to it, or counted in units of equal length (`counts`)."""

    def __init__(
        self,
        stage: Stage,
        total: int | None,
        left_behind: Callable[[], float | None],
        clock: Callable[[], float],
        *,
        counts: bool,
    ) -> None:
        self._stage, self._total, self._left_behind, self._clock = stage, total, left_behind, clock
        self._counts, self._num_done, self._started_s = counts, 0, clock()
        self._told_s: float | None = None
        self._note = ""
        self._asked_s: float = clock() - _ASKED_EVERY_S
        self._behind_s: float | None = None

    def advance(self, n: int = 1, note: str = "") -> None:
        self._num_done += n
        self._note = note or self._note
        left = self._left_in_all()
        self._stage.advance(n, "; ".join(filter(None, (self._note, left))) if left else note)

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        self._told_s = left_s
        self._stage.tell(figures, left_s=left_s)
        self._stage.advance(0, "; ".join(filter(None, (self._note, self._left_in_all()))))

    def _left_in_all(self) -> str:
        own_s = self._told_s
        if own_s is None and self._counts and self._total and self._num_done:
            own_s = (self._clock() - self._started_s) * max(0, self._total - self._num_done) / self._num_done
        if self._clock() - self._asked_s >= _ASKED_EVERY_S:
            self._asked_s, self._behind_s = self._clock(), self._left_behind()
        left_s = None if own_s is None or self._behind_s is None else own_s + self._behind_s
        return f"about {duration(left_s)} left in all" if left_s else ""
