"""Two models on the same rows: the paired difference of their shares right, and what it proves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..bounds import TWO_SIDED, student_t

if TYPE_CHECKING:
    from .candidate import Answers


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
