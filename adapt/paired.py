"""Two models on the same rows: the paired difference of their shares right, and whether it is proven."""

from __future__ import annotations

import math
from statistics import variance
from typing import TYPE_CHECKING, Any

from ..bounds import TWO_SIDED, student_t

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .candidate import Answers

_ROUNDING = 1e-6  # of degrees of freedom that are a whole number


def paired_margin(ours: Answers, theirs: Answers, *, one_sided: float = TWO_SIDED) -> dict[str, Any]:
    """Mean over the tasks of the paired difference in share right, with its interval: of 95 %, `one_sided` at each end.

    Each task weighs the same. The interval is Agresti and Min's (Statistics in Medicine 24, 2005): half a row is added
    to each of the four outcomes of a pair, so that models which answer alike on all rows have no interval of width
    zero; with Student's t of the smallest task, so that a handful of rows proves nothing.
    """
    margins, shifts, variances = [], [], []
    for task, right in ours.items():
        num_won = sum(a > b for a, b in zip(right, theirs[task], strict=True))
        num_lost = sum(a < b for a, b in zip(right, theirs[task], strict=True))
        num_pairs, lead = len(right) + 2, num_won - num_lost
        margins.append(lead / len(right))
        shifts.append(lead / num_pairs)
        variances.append((num_won + num_lost + 1 - lead**2 / num_pairs) / num_pairs**2)
    degrees = max(min(map(len, ours.values())) - 1, 1)
    reach = student_t(degrees, confidence=one_sided) * math.sqrt(sum(variances)) / len(variances)
    centre = sum(shifts) / len(shifts)
    low, high = max(centre - reach, -1.0), min(centre + reach, 1.0)
    return {"margin": sum(margins) / len(margins), "low": low, "high": high, "is_proven": low > 0}


def paired_over_seeds(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Mean paired difference in share right of several runs on the same rows, with its 95 % interval.

    There is one list of rows per run; run i of ours is compared with run i of theirs, trained with the same seed. The
    interval covers other rows and other seeds: it adds the variance of the mean over the rows, as in `paired_margin`,
    and the variance of the mean over the seeds, with the degrees of freedom of Welch and Satterthwaite. The differences
    of rows already contain a part of the scatter of the seeds, so the interval is too wide rather than too narrow. One
    run says nothing about other seeds: the interval is then that of `paired_margin`.
    """
    num_seeds, num_rows = len(ours), len(ours[0])
    differences = [
        [int(a) - int(b) for a, b in zip(mine, other, strict=True)] for mine, other in zip(ours, theirs, strict=True)
    ]
    by_row = [sum(row) / num_seeds for row in zip(*differences, strict=True)]
    by_seed = [sum(run) / num_rows for run in differences]
    num_pairs, lead = num_rows + 2, sum(by_row)
    of_rows = (sum(one**2 for one in by_row) + 1 - lead**2 / num_pairs) / num_pairs**2
    of_seeds = variance(by_seed) / num_seeds if num_seeds > 1 else 0.0
    parts = [(of_rows, num_rows - 1), (of_seeds, num_seeds - 1)]
    spread = sum(part**2 / degrees for part, degrees in parts if degrees > 0)
    degrees = max(int((of_rows + of_seeds) ** 2 / spread + _ROUNDING), 1) if spread else 1
    reach = student_t(degrees, confidence=0.975) * math.sqrt(of_rows + of_seeds)
    low, high = max(lead / num_pairs - reach, -1.0), min(lead / num_pairs + reach, 1.0)
    return {"margin": lead / num_rows, "low": low, "high": high, "by_seed": by_seed}
