"""Score a model on a task, and give the interval of its share of right rows.

    evaluate   reads the rows that a `Scoring` names, scores them     eval, bench, gate, the card of a base
    score      asks and judges given rows                             `evaluate`, training, search
    Accuracy   counts and their exact interval                        every table of shares

No other code scores a model's answers. A task of kind `choice` takes the likeliest choice, the first of equally likely
ones, as lm-evaluation-harness does: by the log-likelihood of its tokens (acc), or by that divided by its number of
characters (acc_norm).

Completions whose judge failed are neither right nor wrong: they are counted, and left out of the share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...bounds import TWO_SIDED, share_ends
from ...errors import HavocError, MeasurementError
from . import sources
from .names import DOMAINS
from .sight import require_fitting_pictures
from .task import load_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...model.config import HavocConfig
    from ...model.likelihood import Continuation
    from ...model.prompt import PromptLike
    from .task import Row, Task

_CHUNK_ROWS, _BATCH_ROWS, _CHUNK_CHOICES, _CHUNK_TOKENS = 256, 64, 64, 20_480
"""Most rows that are asked together, in tasks that write and in choices, and most tokens that they may write.

Progress is reported after each chunk, so a chunk of long answers must not take minutes. A chunk is whole batches of an
artifact's session, because a few remaining rows take as long as a batch. Sizes depend only on the task.
"""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Number of right rows among the judged rows of one task."""

    task: str
    num_right: int
    num_rows: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_right <= self.num_rows:
            raise HavocError(f"{self.task}: {self.num_right} right of {self.num_rows} rows is impossible")

    @property
    def share(self) -> float:
        """Right rows divided by rows; without rows there is no share: a `MeasurementError`."""
        if self.num_rows == 0:
            raise MeasurementError(f"{self.task}: no row was judged, so there is no accuracy")
        return self.num_right / self.num_rows

    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the exact 95 % interval of the share; (0, 1) if no row was judged."""
        return share_ends(self.num_right, self.num_rows, confidence=TWO_SIDED)

    def document(self) -> dict[str, float]:
        """Return counts and interval as JSON values."""
        low, high = self.interval()
        return {"num_right": self.num_right, "num_rows": self.num_rows, "low": low, "high": high}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """The tasks and rows on which a model is scored, and how it is asked.

    `tasks` are names of bundled tasks or paths of TOML files; None means those of the four domains that the model can
    read. `num_rows` is the number for each task, None the task's own number; with `may_be_fewer` a data set with fewer
    rows gives all its rows. `seed` is for the built-in rows. If `few_shot` or `max_new_tokens` is None, the task's own
    value is used.
    """

    tasks: tuple[str, ...] | None = None
    num_rows: int | None = None
    split: str = "gate"
    seed: int = 0
    data_dir: Path | None = None
    online: bool = False
    may_be_fewer: bool = False
    few_shot: int | None = None
    max_new_tokens: int | None = None
    is_chat: bool = True

    def __post_init__(self) -> None:
        """Refuse less than one row."""
        if self.num_rows is not None and self.num_rows < 1:
            raise HavocError(f"num_rows must be at least 1, not {self.num_rows}")

    def load(self, config: HavocConfig) -> tuple[Task, ...]:
        """Load the tasks; None means those of the four domains that the model can read.

        Pictures are a `HavocError` if the model is text-only, or if its patches or context do not fit them.
        """
        asked = self.tasks or DOMAINS
        tasks = load_tasks(asked, data_dir=self.data_dir, online=self.online, few_shot=0)
        unseen = [task.name for task in tasks if task.needs_pictures and config.vision is None]
        if self.tasks and unseen:
            raise HavocError(f"the model reads text only: {', '.join(unseen)} cannot be scored")
        for task in tasks:
            require_fitting_pictures(task, config)
        seen = [name for name, task in zip(asked, tasks, strict=True) if task.name not in unseen]
        return load_tasks(seen, data_dir=self.data_dir, online=self.online, few_shot=self.few_shot)

    def rows(self, task: Task) -> list[Row]:
        """Read the rows of one task, see `sources.rows`."""
        return sources.rows(
            task,
            self.split,
            self.num_rows or task.num_rows,
            seed=self.seed,
            data_dir=self.data_dir,
            online=self.online,
            may_be_fewer=self.may_be_fewer,
        )


class Scorer(Protocol):
    """A model that writes texts and gives log-likelihoods: `TorchScorer` with torch, or an artifact's session."""

    def generate_text(
        self, prompts: Sequence[PromptLike], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Complete every prompt greedily, up to the first of the `stop` strings; return the new texts in order."""

    def log_likelihoods(self, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> list[list[Continuation]]:
        """The likelihood of each text of each request after the request's prompt, in order."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One verdict per row and metric, in the order of the rows.

    `metric` is the one of `accuracy/<task>`. A row whose judgement failed is not right by any metric; `failed_rows`
    says which rows these are, and `reasons` why a row is not right by `metric`. `completions` are the model's texts, or
    its likeliest choices. `num_cut` prompts lost their beginning because they were longer than the model's context.
    """

    task: str
    metric: str
    right_by: dict[str, tuple[bool, ...]]
    failed_rows: tuple[int, ...]
    completions: tuple[str, ...]
    reasons: tuple[str, ...]
    num_cut: int = 0

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each row is right by `metric`."""
        return self.right_by[self.metric]

    @property
    def failed(self) -> int:
        """Number of rows whose judge failed."""
        return len(self.failed_rows)

    @property
    def metrics(self) -> dict[str, Accuracy]:
        """Right rows among the judged ones, by each metric of the task."""
        return {
            name: Accuracy(self.task, sum(right), len(right) - self.failed) for name, right in self.right_by.items()
        }

    @property
    def accuracy(self) -> Accuracy:
        """Right rows among the judged ones, by `metric`."""
        return self.metrics[self.metric]


def evaluate(
    scorer: Scorer, task: Task, scoring: Scoring, *, advance: Callable[[int], None] = lambda _: None
) -> tuple[list[Row], Scores]:
    """Read the rows of a task and score them, see `score`; return the rows and the verdicts."""
    rows = scoring.rows(task)
    return rows, score(scorer, task, rows, max_new_tokens=scoring.max_new_tokens, advance=advance)


def score(
    scorer: Scorer,
    task: Task,
    rows: Sequence[Row],
    *,
    max_new_tokens: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Ask `scorer` every row and judge its answers; the verdict of a row does not depend on the other rows.

    `max_new_tokens` None uses the task's number. `advance` is called with the number of rows done. Raises
    `MeasurementError` if `scorer` does not answer every prompt, and `HavocError` for a task of kind `choice` that shows
    pictures.
    """
    longest, verdicts = max_new_tokens or task.max_new_tokens, list[_Verdict]()
    size = _CHUNK_CHOICES if task.kind == "choice" else _chunk_rows(longest)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        verdicts += _choose(scorer, task, chunk) if task.kind == "choice" else _write(scorer, task, chunk, longest)
        advance(len(chunk))
    return Scores(
        task=task.name,
        metric=task.metric,
        right_by={name: tuple(verdict.is_right[name] for verdict in verdicts) for name in task.metrics},
        failed_rows=tuple(place for place, verdict in enumerate(verdicts) if verdict.has_failed),
        completions=tuple(verdict.completion for verdict in verdicts),
        reasons=tuple(verdict.reason for verdict in verdicts),
        num_cut=sum(verdict.is_cut for verdict in verdicts),
    )


def _chunk_rows(max_new_tokens: int) -> int:
    num_rows = max(1, min(_CHUNK_ROWS, _CHUNK_TOKENS // max_new_tokens))
    return num_rows if num_rows < _BATCH_ROWS else num_rows - num_rows % _BATCH_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """The verdict of one row; `reason` is empty if it is right."""

    is_right: dict[str, bool]
    completion: str
    reason: str
    has_failed: bool = False
    is_cut: bool = False


def _write(scorer: Scorer, task: Task, rows: Sequence[Row], max_new_tokens: int) -> list[_Verdict]:
    """Let the model write an answer to each row, and judge it by every metric."""
    prompts = [task.prompt(row) for row in rows]
    completions = scorer.generate_text(prompts, max_new_tokens=max_new_tokens, stop=task.stop)
    _require_answers(task, len(prompts), len(completions))
    rewards = task.judge_all(list(zip(rows, completions, strict=True)))
    return [
        _Verdict(
            is_right={name: reward.outcome == "right" for name, reward in by_metric.items()},
            completion=completion,
            reason=by_metric[task.metric].reason,
            has_failed=any(reward.outcome == "failed" for reward in by_metric.values()),
        )
        for completion, by_metric in zip(completions, rewards, strict=True)
    ]


def _choose(scorer: Scorer, task: Task, rows: Sequence[Row]) -> list[_Verdict]:
    """Take the likeliest choice of each row: by likelihood (acc), and by likelihood per character (acc_norm)."""
    requests = [(task.prompt(row), task.choices(row)) for row in rows]
    found = scorer.log_likelihoods(requests)
    _require_answers(task, len(requests), len(found))
    return [
        _verdict_of(task, row, choices, items) for row, (_, choices), items in zip(rows, requests, found, strict=True)
    ]


def _verdict_of(task: Task, row: Row, choices: Sequence[str], found: Sequence[Continuation]) -> _Verdict:
    _require_answers(task, len(choices), len(found))
    right, num_before = task.right_choice(row), len(_delimiter(task))
    log_p = [item.log_likelihood for item in found]
    if any(math.isnan(value) for value in log_p):
        reason = "a choice's log-likelihood is not a number"
        return _Verdict(is_right=dict.fromkeys(task.metrics, False), completion="", reason=reason, has_failed=True)
    best = log_p.index(max(log_p))
    by_length = [value / (len(text) - num_before) for value, text in zip(log_p, choices, strict=True)]
    chosen = {"acc": best, "acc_norm": by_length.index(max(by_length))}
    given = chosen[task.metric]
    return _Verdict(
        is_right={name: place == right for name, place in chosen.items()},
        completion=choices[given][num_before:],
        reason="" if given == right else f"choice {given + 1} is not choice {right + 1}",
        is_cut=any(item.num_dropped for item in found),
    )


def _delimiter(task: Task) -> str:
    """The text before each choice."""
    return "" if task.definition.choice is None else task.definition.choice.delimiter


def _require_answers(task: Task, num_asked: int, num_given: int) -> None:
    if num_given != num_asked:
        raise MeasurementError(f"{task.name}: {num_asked} prompts gave {num_given} answers")
