"""How certain a change between two records is: the ratio of two figures, its bounds, and the least detectable change.

numpy is loaded only if samples are resampled; `bounds.py` judges limits without it. Bounds are one-sided at
`confidence`.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

from ...bounds import NUM_RESAMPLES, Bounds, expanded_level, quantile_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

POWER = 0.80


def ratio_bounds(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, confidence: float) -> Bounds:
    """Bound `median(after) / median(before)` from positive samples per process.

    Hierarchical bootstrap of both sides, as for rates. A single sample on a side has no spread and proves nothing.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    value = _median_of(after) / _median_of(before)
    if sum(map(len, before)) == 1 or sum(map(len, after)) == 1:
        return Bounds(value, None, None)
    ratios = _resampled_medians(after, rng) / _resampled_medians(before, rng)
    num_processes = min(len(before), len(after))
    level = expanded_level(num_processes, confidence=confidence) if num_processes > 1 else confidence
    low, high = np.quantile(ratios, [1.0 - level, level])
    return Bounds(value, min(float(low), value), max(float(high), value))


def _median_of(processes: Sequence[Sequence[float]]) -> float:
    return quantile_of(sorted(value for samples in processes for value in samples), 0.5)


def _resampled_medians(processes: Sequence[Sequence[float]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Medians [NUM_RESAMPLES] of resampled data: processes, then the samples of each, both with replacement."""
    import numpy as np

    arrays = [np.asarray(samples, dtype=np.float64) for samples in processes]
    num_drawn = max(len(arrays) - 1, 1)
    medians = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):
        chosen = [arrays[process] for process in rng.integers(len(arrays), size=num_drawn)]
        medians[index] = np.median(
            np.concatenate([array[rng.integers(array.size, size=array.size)] for array in chosen])
        )
    return medians


def detectable_change(low: float, high: float, *, confidence: float) -> float:
    """Least relative change that a ratio with these bounds would have shown in 8 of 10 cases: the effect at POWER.

    The half-width of the interval is z(confidence) standard errors of the log ratio; a change of z(confidence) +
    z(POWER) would show. For independent samples that is the well-known 2.8 * variation * sqrt(2 / n).
    """
    quantile = NormalDist().inv_cdf
    error = math.log(high / low) / 2 / quantile(confidence)
    return math.expm1((quantile(confidence) + quantile(POWER)) * error)


def ratio_of_paired_shares(
    old: Sequence[bool], new: Sequence[bool], *, confidence: float
) -> tuple[float, float] | None:
    """Bound `new / old` of two shares right of the same rows, answered row by row.

    The hybrid Wilson score interval of Bonett & Price, Statistics in Medicine 25 (2006), equations 6 to 8: rows that
    both answer alike do not show a change, so the interval is narrower than that of two independent shares. None if the
    old share may be 0.
    """
    pairs = list(zip(old, new, strict=True))
    num_old, num_new = sum(was for was, _ in pairs), sum(now for _, now in pairs)
    num_moved, num_either = sum(was != now for was, now in pairs), sum(was or now for was, now in pairs)
    if not num_either:
        return None
    joint = math.sqrt((num_moved + 2) / ((num_new + 1) * (num_old + 1)))
    parts = [math.sqrt((1 - (count + 1) / (num_either + 2)) / (count + 1)) for count in (num_new, num_old)]
    z = NormalDist().inv_cdf(confidence) * joint / sum(parts)
    (new_low, new_high), (old_low, old_high) = (_wilson(count, num_either, z) for count in (num_new, num_old))
    return (new_low / old_high, new_high / old_low) if old_low > 0 else None


def _wilson(num_right: int, num_rows: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    middle, reach = 2 * num_right + z**2, z * math.sqrt(z**2 + 4 * num_right * (1 - num_right / num_rows))
    return (middle - reach) / (2 * (num_rows + z**2)), (middle + reach) / (2 * (num_rows + z**2))


def ratio_of_shares(old: Bounds, new: Bounds) -> tuple[float, float] | None:
    """Bound `new / old` of two independent shares from their own bounds (MOVER-R: Donner & Zou, 2012, equation 9).

    None if the old share may be 0, because then any ratio is possible.
    """
    if not old.low or old.high is None or new.low is None or new.high is None:
        return None
    product = old.value * new.value
    least = _root(product, new.value, new.low, old.value, old.high)
    most = _root(product, new.value, new.high, old.value, old.low)
    low = (product - least) / (old.high * (2 * old.value - old.high))
    return low, (product + most) / (old.low * (2 * old.value - old.low))


def _root(product: float, new: float, new_bound: float, old: float, old_bound: float) -> float:
    return math.sqrt(max(product**2 - new_bound * old_bound * (2 * new - new_bound) * (2 * old - old_bound), 0.0))
