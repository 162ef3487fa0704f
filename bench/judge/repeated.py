"""Bounds of a share that hold for any number of looks and any moment of stopping.

Clopper and Pearson's bound holds only if the number of rows was fixed before. If the number may be chosen afterwards, a
pass comes sooner or later: a model that is right in 84 % proves "more than 85 %" at some number up to 1000 in 16.5 % of
all runs. These bounds hold for all numbers at once, and need a few more rows. For a share of at most p, the likelihood
ratio of every larger share, averaged evenly over all larger shares, is a supermartingale that starts at 1. So the
probability that it ever reaches 1 / error is at most `error` (Ville). Source: Robbins, "Statistical methods related to
the law of the iterated logarithm", 1970; Howard and others, "Time-uniform, nonparametric, nonasymptotic confidence
sequences", 2021.
"""

from __future__ import annotations

import math

from ...bounds import Bounds, binomial_cdf

_BISECTIONS = 60


def any_time_bounds(num_right: int, num_rows: int, *, confidence: float) -> Bounds:
    """One-sided bounds of a share, each valid at every number of rows at once."""
    low = _low(num_right, num_rows, confidence)
    high = 1.0 - _low(num_rows - num_right, num_rows, confidence)
    return Bounds(value=num_right / num_rows, low=low, high=high)


def _low(num_right: int, num_rows: int, confidence: float) -> float:
    """The largest share that the rows exclude at the confidence."""
    wanted = -math.log(1.0 - confidence)
    low, high = 0.0, num_right / num_rows
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_evidence(num_right, num_rows, share=middle) >= wanted else (low, middle)
    return low


def log_evidence(num_right: int, num_rows: int, *, share: float) -> float:
    """Logarithm of the averaged likelihood ratio of all shares above `share` to it; above 0 favours a larger share."""
    if not 0.0 < share < 1.0:
        return math.inf if share <= 0.0 and num_right else -math.inf
    num_wrong = num_rows - num_right
    area = math.lgamma(num_right + 1) + math.lgamma(num_wrong + 1) - math.lgamma(num_rows + 2)
    above = binomial_cdf(num_right, num_trials=num_rows + 1, probability=share)
    if above <= 0.0:
        return -math.inf
    alone = num_right * math.log(share) + num_wrong * math.log1p(-share)
    return area + math.log(above) - math.log1p(-share) - alone
