"""Score completions, and say how sure a share of right ones is.

Intervals are Clopper and Pearson's exact ones (Biometrika 26, 1934, 404-413), from the beta distribution: with k of n
right, the lower end is the alpha quantile of Beta(k, n - k + 1), the upper the 1 - alpha one of Beta(k + 1, n - k).
Completions whose judge failed are neither right nor wrong: they are counted and left out of the share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import HavocError, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .task import Prompt, Row, Task


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the judged rows of one domain were right."""

    domain: str
    num_right: int
    num_rows: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_right <= self.num_rows:
            raise HavocError(f"{self.domain}: {self.num_right} right of {self.num_rows} rows cannot be")

    @property
    def share(self) -> float:
        """Right rows over rows; no rows have no share, which is a `MeasurementError`."""
        if self.num_rows == 0:
            raise MeasurementError(f"{self.domain}: no row was judged, so there is no accuracy")
        return self.num_right / self.num_rows

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided exact interval: it misses the truth at most `1 - confidence` of the time, half on each side."""
        one_sided = 1 - (1 - confidence) / 2
        return self.lower_bound(one_sided), self.upper_bound(one_sided)

    def lower_bound(self, confidence: float = 0.95) -> float:
        """One-sided: the true share is above it with at least this confidence."""
        _check_confidence(confidence)
        if self.num_right == 0:
            return 0.0
        return _beta_quantile(self.num_right, self.num_rows - self.num_right + 1, 1 - confidence)

    def upper_bound(self, confidence: float = 0.95) -> float:
        """One-sided: the true share is below it with at least this confidence."""
        _check_confidence(confidence)
        if self.num_right == self.num_rows:
            return 1.0
        return _beta_quantile(self.num_right + 1, self.num_rows - self.num_right, confidence)

    def proves_above(self, limit: float, confidence: float = 0.95) -> bool:
        """Whether these rows prove a true share above `limit`: 869 of 1000 prove 85 %, 868 do not."""
        return self.lower_bound(confidence) > limit


@dataclass(frozen=True, slots=True)
class Scores:
    """One verdict per row, in the order of the rows.

    `right[i]` is False for a failed judgement too; `failed_rows` says which those are, and `reasons` why each row that
    is not right is not.
    """

    domain: str
    right: tuple[bool, ...]
    failed_rows: tuple[int, ...]
    completions: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def failed(self) -> int:
        """Number of rows whose judge failed."""
        return len(self.failed_rows)

    @property
    def accuracy(self) -> Accuracy:
        """Right rows among the judged ones."""
        return Accuracy(self.domain, sum(self.right), len(self.right) - self.failed)


def score(generate: Callable[[Sequence[Prompt]], list[str]], task: Task, rows: Sequence[Row]) -> Scores:
    """Let `generate` complete every row's prompt and judge what it wrote.

    Raises `MeasurementError` when `generate` does not return one text per prompt.
    """
    completions = generate([task.prompt(row) for row in rows])
    if len(completions) != len(rows):
        raise MeasurementError(f"{task.name}: {len(rows)} prompts gave {len(completions)} completions")
    rewards = task.judge(list(zip(rows, completions, strict=True)))
    return Scores(
        domain=task.name,
        right=tuple(reward.outcome == "right" for reward in rewards),
        failed_rows=tuple(place for place, reward in enumerate(rewards) if reward.outcome == "failed"),
        completions=tuple(completions),
        reasons=tuple(reward.reason for reward in rewards),
    )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise HavocError(f"a confidence of {confidence} is not between 0 and 1")


def _beta_quantile(a: int, b: int, probability: float) -> float:
    from scipy.special import betaincinv

    return float(betaincinv(a, b, probability))
