"""Rows of several tasks in one order, and the answers of mixtures to them: a mixture answers each row at most once.

Several systems choose the same mixture for the same row. The book keeps each verdict and the seconds that the row took,
so all systems are compared on the same answers.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tasks import sources
from .tasks.evaluation import score

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.likelihood import Continuation
    from ..model.prompt import PromptLike
    from ..progress import Stage
    from .alpha_search import Alpha
    from .mixtures import Mixtures
    from .tasks.evaluation import Scorer
    from .tasks.reward import Row
    from .tasks.task import Task


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows of several tasks in the order they are asked: `labels[i]` is the index of row i's task in `tasks`."""

    tasks: tuple[Task, ...]
    labels: tuple[int, ...]
    rows: tuple[Row, ...]

    def of(self, task: int) -> list[int]:
        """Indices of a task's rows in the stream."""
        return [place for place, label in enumerate(self.labels) if label == task]

    def prompts(self) -> list[PromptLike]:
        """Prompt of every row."""
        return [self.tasks[label].prompt(row) for label, row in zip(self.labels, self.rows, strict=True)]


def mixed_stream(
    tasks: Sequence[Task],
    split: str,
    num_rows: int | None,
    *,
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
) -> Stream:
    """Draw `num_rows` rows of every task (None: the task's own number) and shuffle them all by `seed`.

    A data set with fewer rows gives all it has.
    """
    found = [
        (label, row)
        for label, task in enumerate(tasks)
        for row in sources.rows(
            task,
            split,
            num_rows or task.num_rows,
            seed=seed,
            data_dir=data_dir,
            online=online,
            may_be_fewer=True,
        )
    ]
    random.Random(f"havoc stream {seed}").shuffle(found)
    return Stream(tuple(tasks), tuple(label for label, _ in found), tuple(row for _, row in found))


@dataclass(frozen=True, slots=True)
class Answered:
    """One row's verdict, and its share of the seconds that its batch took to generate."""

    is_right: bool
    has_failed: bool
    seconds: float


class AnswerBook:
    """Keeps the known verdicts by mixture and row of the stream."""

    def __init__(self, mixtures: Mixtures, stream: Stream, *, max_new_tokens: int | None, stage: Stage) -> None:
        """Start with no answers; `max_new_tokens` None uses each task's number."""
        self._mixtures, self._stream, self._max_new_tokens, self._stage = mixtures, stream, max_new_tokens, stage
        self._known: dict[tuple[Alpha, int], Answered] = {}

    def answers(self, alphas: Sequence[Alpha]) -> list[Answered]:
        """The answer of the mixture `alphas[i]` to row i of the stream, for each i."""
        wanted: dict[tuple[Alpha, int], list[int]] = {}
        for place, alpha in enumerate(alphas):
            if (alpha, place) not in self._known:
                wanted.setdefault((alpha, self._stream.labels[place]), []).append(place)
        for (alpha, label), places in sorted(wanted.items(), key=lambda item: item[0]):
            self._ask(alpha, self._stream.tasks[label], places)
        return [self._known[alpha, place] for place, alpha in enumerate(alphas)]

    def _ask(self, alpha: Alpha, task: Task, places: Sequence[int]) -> None:
        timed = _Timed(self._mixtures.scorer(alpha))
        rows = [self._stream.rows[place] for place in places]

        def advance(num_rows: int) -> None:
            self._stage.advance(num_rows, note=task.name)

        scores = score(timed, task, rows, max_new_tokens=self._max_new_tokens, advance=advance)
        failed, seconds = set(scores.failed_rows), timed.seconds / len(rows)
        for number, place in enumerate(places):
            self._known[alpha, place] = Answered(scores.right[number], number in failed, seconds)


class _Timed:
    """A scorer that counts its own time; judging the answers is not included."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self.seconds = scorer, 0.0

    def generate_text(
        self, prompts: Sequence[PromptLike], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        started = time.perf_counter()
        texts = self._scorer.generate_text(prompts, max_new_tokens=max_new_tokens, stop=stop)
        self.seconds += time.perf_counter() - started
        return texts

    def log_likelihoods(self, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> list[list[Continuation]]:
        started = time.perf_counter()
        found = self._scorer.log_likelihoods(requests)
        self.seconds += time.perf_counter() - started
        return found
