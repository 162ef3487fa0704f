"""Two models on the same rows: the paired difference of their shares right, and what it proves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .candidate import Answers

_NORMAL_95: Final = 1.959964


def paired_margin(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Mean over the tasks of the paired difference in share right, with its 95 % normal interval.

    Each task weighs the same; the variance is the sum of the tasks' variances of the mean, over the tasks
    squared.
    """
    means, variances = [], []
    for task, right in ours.items():
        differences = [int(a) - int(b) for a, b in zip(right, theirs[task], strict=True)]
        mean = sum(differences) / len(differences)
        means.append(mean)
        variances.append(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    margin = sum(means) / len(means)
    half_width = _NORMAL_95 * math.sqrt(sum(variances)) / len(variances)
    low, high = margin - half_width, margin + half_width
    return {"margin": margin, "low": low, "high": high, "is_proven": low > 0}
