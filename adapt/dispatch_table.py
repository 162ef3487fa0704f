"""Compare two-pass inference with simpler systems on the same rows: a table of systems, and differences of pairs.

    base                  no expert at all
    best single expert    one expert for every row
    fixed mixture         one alpha for every row: the given one, else equal weights, the best of a few values
    prompt, classifier    two passes; the first pass names the expert
    few-shot              one alpha for each task, found on solved examples of its train split
    oracle                each row gets the expert of its own task, so there is no first pass that could be wrong

No choice uses the rows that are scored. Search rows choose the best single expert and the weight of the fixed mixture;
where search rows are scored, train rows choose. The oracle is not an upper bound: another task's expert, or a mixture,
may answer a row that the task's own expert does not. Shares have exact 95 % intervals (Clopper & Pearson). Differences
of two systems on the same rows have normal 95 % intervals.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..bounds import TWO_SIDED, share_ends
from ..errors import HavocError
from ..progress import SILENT
from .alpha_search import CrossEntropySettings
from .answer_book import AnswerBook, Answered, mixed_stream
from .dispatch import open_chooser
from .few_shot import NUM_EXAMPLES, find_alpha, solved_examples
from .paired import paired_margin
from .tasks.sources import problem_hash, rows_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..progress import Progress, Stage
    from .alpha_search import Alpha
    from .basis import Basis
    from .dispatch import Way
    from .mixtures import Mixtures
    from .tasks.task import Task

MIXED: Final = "mixed"
BASE, SINGLE, FIXED, ORACLE = "base", "best single expert", "fixed mixture", "oracle"
_SELECTION_ROWS: Final = 100
"""Rows of each task that choose the best single expert and the best equal weight."""
_EQUAL_WEIGHTS: Final = (0.5, 1.0)
"""Equal weights that are tried for all experts, in addition to one over their number."""
_FEWEST_PAIRS: Final = 2


@dataclass(frozen=True, kw_only=True)
class DispatchSettings:
    """What is compared, and on which rows.

    `fixed` holds the weights of the fixed mixture by expert; experts that it does not name get 0. None: search rows
    choose one equal weight.
    """

    ways: tuple[Way, ...] = ()
    split: str = "gate"
    num_rows: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    fixed: Mapping[str, float] | None = None
    num_examples: int = NUM_EXAMPLES
    examples_file: Path | None = None
    search: CrossEntropySettings = field(default_factory=CrossEntropySettings)
    data_dir: Path | None = None
    online: bool = False


def compare_dispatch(
    mixtures: Mixtures,
    basis: Basis,
    directory: Path,
    tasks: Sequence[Task],
    settings: DispatchSettings,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Score every system on the same rows of `tasks`; plain JSON values.

    systems              shares right by task and over the mixed stream
    pairs                differences between two systems
    first_pass           confusion and cost of each first pass that reads the prompt
    few_shot             the mixtures found
    order                the task of each row of the stream
    right                0 or 1 for each row of the stream, by system
    change_of_scales_ms  mean time of folding other scales into the model; the times of rows do not include it, because
                         rows of one mixture are asked together

    Raises `HavocError` for what cannot be compared, before any row is answered.
    """
    return _Comparison(mixtures, basis, directory, tuple(tasks), settings, progress).document()


class _Comparison:
    """One comparison: the stream of rows, the answers so far, and one alpha for each row and system."""

    def __init__(
        self,
        mixtures: Mixtures,
        basis: Basis,
        directory: Path,
        tasks: tuple[Task, ...],
        settings: DispatchSettings,
        progress: Progress,
    ) -> None:
        self._mixtures, self._tasks, self._settings, self._progress = mixtures, tasks, settings, progress
        if unknown := sorted(set(settings.fixed or ()) - set(mixtures.names)):
            raise HavocError(f"--alpha: no expert is named {unknown[0]}; there are {', '.join(mixtures.names)}")
        self._choosers = {
            way: open_chooser(way, mixtures, directory, basis) for way in settings.ways if way != "few-shot"
        }
        self._examples = self._solved() if "few-shot" in settings.ways else {}
        self._where: dict[str, Any] = {
            "seed": settings.seed,
            "data_dir": settings.data_dir,
            "online": settings.online,
        }
        self._stream = mixed_stream(tasks, settings.split, settings.num_rows, **self._where)
        self._require_other_examples()

    def _solved(self) -> dict[str, list[dict[str, Any]]]:
        settings = self._settings
        if settings.examples_file is not None and len(self._tasks) > 1:
            raise HavocError(
                f"{settings.examples_file}: a file holds examples of one task, but {len(self._tasks)} are scored: "
                "give one --task"
            )
        return {
            task.name: solved_examples(
                task,
                settings.num_examples,
                path=settings.examples_file,
                seed=settings.seed,
                data_dir=settings.data_dir,
                online=settings.online,
            )
            for task in self._tasks
        }

    def _require_other_examples(self) -> None:
        """Refuse examples that are also scored: a file may hold search rows, and --split search scores these."""
        for place, task in enumerate(self._tasks):
            scored = {problem_hash(self._stream.rows[index], task) for index in self._stream.of(place)}
            examples = self._examples.get(task.name, [])
            num_leaked = sum(problem_hash(row, task) in scored for row in examples)
            if num_leaked:
                raise HavocError(
                    f"{self._settings.examples_file}: {num_leaked} of {len(examples)} examples are rows of {task.name} "
                    "that are scored too (a leak): give other rows, or score another split"
                )

    def document(self) -> dict[str, Any]:
        """Choose, answer and count."""
        settings, stream = self._settings, self._stream
        with self._progress.stage("dispatch", None, unit="rows") as stage:
            single, fixed, selection = self._selected(stage)
            constant = {BASE: self._mixtures.only(None), SINGLE: single, FIXED: fixed}
            systems = {name: [alpha] * len(stream.rows) for name, alpha in constant.items()}
            chosen, costs = self._first_passes()
            systems |= {way: [self._mixtures.only(place) for place in places] for way, places in chosen.items()}
            found: dict[str, Any] = {}
            if self._examples:
                systems["few-shot"], found = self._few_shot(stage)
            if {task.name for task in self._tasks} <= set(self._mixtures.names):
                own = [self._mixtures.names.index(self._tasks[label].name) for label in stream.labels]
                systems[ORACLE] = [self._mixtures.only(place) for place in own]
            book = AnswerBook(self._mixtures, stream, max_new_tokens=settings.max_new_tokens, stage=stage)
            answers = {name: book.answers(alphas) for name, alphas in systems.items()}
        return {
            "split": settings.split,
            "seed": settings.seed,
            "experts": {expert.domain: expert.hash for expert in self._mixtures.experts},
            "tasks": {task.name: self._task_facts(place) for place, task in enumerate(self._tasks)},
            "systems": {name: self._shares(found) for name, found in answers.items()},
            "pairs": self._pairs({name: [item.is_right for item in found] for name, found in answers.items()}),
            "first_pass": {
                way: self._first_pass_facts(places, costs[way], answers[way]) for way, places in chosen.items()
            },
            "few_shot": found,
            "selection": selection,
            "change_of_scales_ms": 1000 * self._mixtures.fold_s / self._mixtures.num_folds,
            "order": [self._tasks[label].name for label in stream.labels],
            "right": {name: "".join("01"[item.is_right] for item in found) for name, found in answers.items()},
        }

    def _selected(self, stage: Stage) -> tuple[Alpha, Alpha, dict[str, Any]]:
        """Choose the best single expert and the fixed mixture on rows that are not scored; return the figures too."""
        split = "train" if self._settings.split == "search" else "search"
        stream = mixed_stream(self._tasks, split, _SELECTION_ROWS, **self._where)
        book = AnswerBook(self._mixtures, stream, max_new_tokens=self._settings.max_new_tokens, stage=stage)
        names = self._mixtures.names

        def best_of(alphas: Sequence[Alpha]) -> tuple[Alpha, list[int]]:
            answers = [book.answers([alpha] * len(stream.rows)) for alpha in alphas]
            num_right = [sum(item.is_right for item in some) for some in answers]
            return alphas[num_right.index(max(num_right))], num_right

        single, right_alone = best_of([self._mixtures.only(place) for place in range(len(names))])
        weights = sorted({1 / len(names), *_EQUAL_WEIGHTS})
        facts: dict[str, Any] = {
            "split": split,
            "num_rows": len(stream.rows),
            "best_single": names[single.index(1.0)],
            "num_right_alone": dict(zip(names, right_alone, strict=True)),
        }
        if self._settings.fixed is not None:
            fixed: Alpha = tuple(self._settings.fixed.get(name, 0.0) for name in names)
        else:
            fixed, right_alike = best_of([(weight,) * len(names) for weight in weights])
            facts["num_right_alike"] = [list(pair) for pair in zip(weights, right_alike, strict=True)]
        return single, fixed, facts | {"fixed_mixture": dict(zip(names, fixed, strict=True))}

    def _first_passes(self) -> tuple[dict[str, list[int]], dict[str, float]]:
        """For each first pass: the index of each row's expert, and the seconds that all rows took."""
        prompts, chosen, seconds = self._stream.prompts(), dict[str, list[int]](), dict[str, float]()
        for way, chooser in self._choosers.items():
            with self._progress.stage(f"first pass {way}", len(prompts), unit="rows") as stage:
                chooser.places(prompts[:1])  # fold before the clock starts: once, not for each row
                started = time.perf_counter()
                chosen[way] = chooser.places(prompts)
                seconds[way] = time.perf_counter() - started
                stage.advance(len(prompts))
        return chosen, seconds

    def _few_shot(self, stage: Stage) -> tuple[list[Alpha], dict[str, Any]]:
        """The alpha of each row's task, and the facts of each search."""
        alphas, facts = [], {}
        for task in self._tasks:
            stage.advance(0, note=f"few-shot {task.name}")
            started = time.perf_counter()
            found = find_alpha(
                self._mixtures,
                task,
                self._examples[task.name],
                settings=self._settings.search,
                max_new_tokens=self._settings.max_new_tokens,
            )
            alphas.append(found.alpha)
            facts[task.name] = {
                "alpha": dict(zip(self._mixtures.names, found.alpha, strict=True)),
                "share_right": found.fitness[0],
                "log_likelihood_per_token": found.fitness[1],
                "num_examples": len(self._examples[task.name]),
                "num_asked": found.num_asked,
                "search_s": time.perf_counter() - started,
            }
        return [alphas[label] for label in self._stream.labels], facts

    def _task_facts(self, place: int) -> dict[str, Any]:
        task, rows = self._tasks[place], [self._stream.rows[index] for index in self._stream.of(place)]
        return {"num_rows": len(rows), "rows_sha256": rows_hash(rows), "metric": task.metric}

    def _shares(self, answers: Sequence[Answered]) -> dict[str, dict[str, Any]]:
        """Shares right by task and over the stream."""
        parts = {task.name: self._stream.of(place) for place, task in enumerate(self._tasks)}
        parts[MIXED] = list(range(len(answers)))
        return {name: _share([answers[index] for index in places]) for name, places in parts.items()}

    def _pairs(self, right: Mapping[str, Sequence[bool]]) -> list[dict[str, Any]]:
        """Compare each two-pass system and the oracle with base, best single expert and fixed mixture."""
        return [
            {"ours": ours, "theirs": theirs, **_pair(right[ours], right[theirs])}
            for ours in right
            if ours not in (BASE, SINGLE, FIXED)
            for theirs in (BASE, SINGLE, FIXED)
        ]

    def _first_pass_facts(self, places: Sequence[int], seconds: float, answers: Sequence[Answered]) -> dict[str, Any]:
        """Confusion, how often a row got its own task's expert, and the first pass's share of the cost."""
        names, num_rows = self._mixtures.names, len(places)
        own = [self._tasks[label].name for label in self._stream.labels]
        counts = {task.name: dict.fromkeys(names, 0) for task in self._tasks}
        for task, place in zip(own, places, strict=True):
            counts[task][names[place]] += 1
        num_own = sum(counts[task.name].get(task.name, 0) for task in self._tasks)
        low, high = share_ends(num_own, num_rows, confidence=TWO_SIDED)
        second = sum(item.seconds for item in answers)
        return {
            "confusion": counts,
            "own_expert": {"num_right": num_own, "num_rows": num_rows, "low": low, "high": high},
            "first_pass_ms_per_row": 1000 * seconds / num_rows,
            "second_pass_ms_per_row": 1000 * second / num_rows,
            "first_pass_share": seconds / (seconds + second),
        }


def _share(answers: Sequence[Answered]) -> dict[str, Any]:
    num_right, num_rows = sum(item.is_right for item in answers), len(answers)
    low, high = share_ends(num_right, num_rows, confidence=TWO_SIDED)
    num_failed = sum(item.has_failed for item in answers)
    return {"num_right": num_right, "num_rows": num_rows, "num_failed": num_failed, "low": low, "high": high}


def _pair(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, Any]:
    """Rows that only one of two systems answers right, and the difference of the two shares with its interval."""
    counts = {
        "num_only_ours": sum(a and not b for a, b in zip(ours, theirs, strict=True)),
        "num_only_theirs": sum(b and not a for a, b in zip(ours, theirs, strict=True)),
    }
    if len(ours) < _FEWEST_PAIRS:
        return {**counts, "margin": int(ours[0]) - int(theirs[0]), "low": None, "high": None, "is_proven": False}
    return {**counts, **paired_margin({MIXED: tuple(ours)}, {MIXED: tuple(theirs)})}
