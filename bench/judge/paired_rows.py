"""Is the new side right less often? Both answered the same rows, so only rows that one side alone had right count.

The p value is McNemar's, exact: without a difference, each of these rows is equally likely to be on either side. It
says whether there is a difference at all. A release asks whether the new side is no worse within a margin: the interval
of the paired difference (`adapt/paired.py`) answers that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapt.paired import paired_margin
from ...bounds import binomial_cdf
from .paired import CONFIDENCE, Shift

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRows:
    """One task: rows right by each side alone, and the difference in share right (new minus old) with its interval.

    `old_right` and `new_right` have a 0 or 1 for each row, in the order of the rows that `rows_sha256` identifies.
    """

    task: str
    num_rows: int
    num_both: int
    num_old_only: int
    num_new_only: int
    p_value: float
    difference: float
    low: float
    high: float
    shift: Shift
    rows_sha256: str
    old_right: str
    new_right: str


def mcnemar(num_old_only: int, num_new_only: int) -> float:
    """Exact two-sided p value of the numbers of rows that one side alone had right."""
    num_apart = num_old_only + num_new_only
    if num_apart == 0:
        return 1.0
    return min(1.0, 2 * binomial_cdf(min(num_old_only, num_new_only), num_trials=num_apart, probability=0.5))


def judge_rows(
    old: Mapping[str, Sequence[bool]], new: Mapping[str, Sequence[bool]], rows: Mapping[str, str], *, margin: float
) -> list[PairedRows]:
    """Compare the rows of each task of both; `rows` has the hash of each task's rows.

    Worse: fewer right by more than the margin is proven. Better: more right. Equal: no fewer by more than the margin.
    All intervals together hold at `CONFIDENCE`.
    """
    one_sided = 1 - (1 - CONFIDENCE) / max(len(old), 1)
    return [_judged(task, old[task], new[task], rows[task], margin, one_sided) for task in old]


def _judged(
    task: str, old: Sequence[bool], new: Sequence[bool], rows_sha256: str, margin: float, one_sided: float
) -> PairedRows:
    found = paired_margin({task: tuple(new)}, {task: tuple(old)}, one_sided=one_sided)
    pairs = list(zip(old, new, strict=True))
    num_old_only, num_new_only = pairs.count((True, False)), pairs.count((False, True))
    return PairedRows(
        task=task,
        num_rows=len(pairs),
        num_both=pairs.count((True, True)),
        num_old_only=num_old_only,
        num_new_only=num_new_only,
        p_value=mcnemar(num_old_only, num_new_only),
        difference=found["margin"],
        low=found["low"],
        high=found["high"],
        shift=_shift(found["low"], found["high"], margin),
        rows_sha256=rows_sha256,
        old_right="".join("01"[is_right] for is_right in old),
        new_right="".join("01"[is_right] for is_right in new),
    )


def _shift(low: float, high: float, margin: float) -> Shift:
    if high < -margin:
        return "worse"
    if low > 0:
        return "better"
    return "equal" if low > -margin else "undecided"


def joined(words: Sequence[Shift]) -> Shift:
    """Return one word for speed and all tasks: worse if any is, undecided if any is, better if any is, else equal."""
    order: tuple[Shift, ...] = ("worse", "undecided", "better", "equal")
    return next(word for word in order if word in words)
