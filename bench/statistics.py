"""What raw samples prove: confidence bounds without a distribution assumed, computed when a record is read.

Every bound is one-sided at the given confidence, so `low` and `high` of one `Bounds` together hold at twice the error.
Latency quantiles use order statistics (David & Nagaraja, Order Statistics, 7.1): the k-th smallest of n samples lies
above the q-quantile with probability Binomial(n, q).cdf(k - 1). Rates use a hierarchical bootstrap (processes, then
episodes). Shares use the exact binomial interval of Clopper & Pearson (1934). Only `scipy.special` is loaded: fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.80
NUM_RESAMPLES = 4000
_MILD_FENCE, _SEVERE_FENCE = 1.5, 3.0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """An estimate between two one-sided bounds; a bound is None where the samples are too few to prove any."""

    value: float
    low: float | None
    high: float | None
    num_samples: int


def upper_rank(num_samples: int, *, quantile: float, confidence: float = CONFIDENCE) -> int | None:
    """Smallest rank (from 1) whose order statistic bounds the quantile from above; None when none does."""
    return _first_rank(num_samples, quantile, confidence)


def lower_rank(num_samples: int, *, quantile: float, confidence: float = CONFIDENCE) -> int | None:
    """Largest rank (from 1) whose order statistic bounds the quantile from below; None when none does."""
    mirrored = _first_rank(num_samples, 1.0 - quantile, confidence)
    return None if mirrored is None else num_samples + 1 - mirrored


def _first_rank(num_samples: int, quantile: float, confidence: float) -> int | None:
    if num_samples == 0:
        return None
    ranks = np.arange(1, num_samples + 1)
    reached = special.bdtr(ranks - 1, num_samples, quantile) >= confidence
    return int(ranks[reached][0]) if reached.any() else None


def quantile_bounds(samples: Sequence[float], *, quantile: float, confidence: float = CONFIDENCE) -> Bounds:
    """Bound the `quantile` of the distribution the samples came from, in the samples' unit.

    Raises `HavocError` for no samples or a non-finite one.
    """
    ordered = np.sort(_finite(samples))
    high = upper_rank(ordered.size, quantile=quantile, confidence=confidence)
    low = lower_rank(ordered.size, quantile=quantile, confidence=confidence)
    return Bounds(
        value=float(np.quantile(ordered, quantile)),
        low=None if low is None else float(ordered[low - 1]),
        high=None if high is None else float(ordered[high - 1]),
        num_samples=int(ordered.size),
    )


def num_samples_needed(*, quantile: float, confidence: float = CONFIDENCE, num_over: int = 0) -> int:
    """Fewest samples that prove a limit for the quantile when `num_over` of them lie over it (p90: 29, 46, ...)."""
    num_samples = max(num_over + 1, math.ceil(math.log1p(-confidence) / math.log(quantile)))
    while special.bdtr(num_samples - num_over - 1, num_samples, quantile) < confidence:
        num_samples += 1
    return num_samples


def share_bounds(num_right: int, num_rows: int, *, confidence: float = CONFIDENCE) -> Bounds:
    """Exact one-sided binomial bounds of a share: 869 right of 1000 prove more than 0.85."""
    if not 0 <= num_right <= num_rows or num_rows == 0:
        msg = f"{num_right} of {num_rows} is no share"
        raise HavocError(msg)
    num_wrong = num_rows - num_right
    low = 0.0 if num_right == 0 else float(special.betaincinv(num_right, num_wrong + 1, 1.0 - confidence))
    high = 1.0 if num_wrong == 0 else float(special.betaincinv(num_right + 1, num_wrong, confidence))
    return Bounds(value=num_right / num_rows, low=low, high=high, num_samples=num_rows)


def num_right_needed(num_rows: int, *, share: float, confidence: float = CONFIDENCE) -> int | None:
    """Fewest right answers of `num_rows` that prove more than `share`; None when not even all of them would."""
    ranks = np.arange(num_rows + 1)
    proven = special.bdtr(ranks - 1.0, num_rows, share) >= confidence
    return int(ranks[proven][0]) if proven.any() else None


def rate_bounds(
    processes: Sequence[Sequence[tuple[float, float]]],
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Bounds:
    """Bound a rate from (amount, seconds) per episode per process, e.g. tokens and seconds: total amount per second.

    Hierarchical bootstrap: of k processes k - 1 are drawn (which makes the variance between so few unbiased: Rao & Wu,
    1988), then as many episodes of each as it has. The bounds never cross the estimate, so adding a slower episode
    cannot turn a proven miss into a proven hit.
    """
    flat = _finite([value for episodes in processes for episode in episodes for value in episode])
    if (flat <= 0).any() or not all(processes):
        msg = "a rate needs at least one episode in every process, each of a positive amount and time"
        raise HavocError(msg)
    rates = _resampled_rates(processes, num_resamples, np.random.default_rng(seed))
    value = float(flat[0::2].sum() / flat[1::2].sum())
    low, high = np.quantile(rates, [1.0 - confidence, confidence])
    num_episodes = sum(len(episodes) for episodes in processes)
    can_bound = num_episodes > 1
    return Bounds(
        value=value,
        low=min(float(low), value) if can_bound else None,
        high=max(float(high), value) if can_bound else None,
        num_samples=num_episodes,
    )


def _resampled_rates(
    processes: Sequence[Sequence[tuple[float, float]]], num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Rates [num_resamples] of resampled data: processes, then episodes within them, both with replacement."""
    counts = np.array([len(episodes) for episodes in processes])
    padded = np.zeros((len(processes), counts.max(), 2))
    for index, episodes in enumerate(processes):
        padded[index, : counts[index]] = episodes
    num_drawn = max(len(processes) - 1, 1)
    drawn = rng.integers(len(processes), size=(num_resamples, num_drawn))
    picks = rng.random((num_resamples, num_drawn, counts.max()))
    episode_index = (picks * counts[drawn][..., None]).astype(np.int64)
    is_real = np.arange(counts.max()) < counts[drawn][..., None]
    totals = (padded[drawn[..., None], episode_index] * is_real[..., None]).sum(axis=(1, 2))
    rates: NDArray[np.float64] = totals[:, 0] / totals[:, 1]
    return rates


def ratio_bounds(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    quantile: float = 0.5,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Bounds:
    """Bound `quantile(after) / quantile(before)` from samples per process, resampling processes and then samples."""
    rng = np.random.default_rng(seed)
    pooled_before, pooled_after = (
        _finite([value for process in side for value in process]) for side in (before, after)
    )
    if (pooled_before <= 0).any() or (pooled_after <= 0).any():
        msg = "a ratio needs positive samples"
        raise HavocError(msg)
    ratios = _resampled_quantiles(after, quantile, num_resamples, rng) / _resampled_quantiles(
        before, quantile, num_resamples, rng
    )
    value = float(np.quantile(pooled_after, quantile) / np.quantile(pooled_before, quantile))
    low, high = np.quantile(ratios, [1.0 - confidence, confidence])
    num_samples = int(pooled_before.size + pooled_after.size)
    return Bounds(value=value, low=min(float(low), value), high=max(float(high), value), num_samples=num_samples)


def _resampled_quantiles(
    processes: Sequence[Sequence[float]], quantile: float, num_resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    arrays = [np.asarray(process, dtype=np.float64) for process in processes if len(process)]
    num_drawn = max(len(arrays) - 1, 1)
    values = np.empty(num_resamples)
    for index in range(num_resamples):
        chosen = [arrays[process] for process in rng.integers(len(arrays), size=num_drawn)]
        pooled = np.concatenate([array[rng.integers(array.size, size=array.size)] for array in chosen])
        position = min(int(quantile * pooled.size), pooled.size - 1)
        values[index] = np.partition(pooled, position)[position]
    return values


def minimal_detectable_effect(variation: float, num_samples: int, *, power: float = POWER) -> float:
    """Smallest relative difference two sets of `num_samples` would show: 2.8 * cv * sqrt(2 / n) at 95 % and 80 % power.

    `variation` is the coefficient of variation of one set; print this beside every "no change".
    """
    two_sided = (1.0 + CONFIDENCE) / 2.0
    return float((special.ndtri(two_sided) + special.ndtri(power)) * variation * math.sqrt(2.0 / num_samples))


def variation(samples: Sequence[float]) -> float | None:
    """Coefficient of variation (sample standard deviation over mean); None for fewer than two samples."""
    values = _finite(samples)
    return float(values.std(ddof=1) / values.mean()) if values.size > 1 else None


def num_outliers(samples: Sequence[float]) -> tuple[int, int]:
    """Mild and severe outliers by Tukey's fences (1.5 and 3 interquartile ranges). They are reported, never dropped."""
    values = _finite(samples)
    first, third = np.quantile(values, [0.25, 0.75])
    distance = np.maximum(first - values, values - third)
    severe = int((distance > _SEVERE_FENCE * (third - first)).sum())
    return int((distance > _MILD_FENCE * (third - first)).sum()) - severe, severe


def _finite(samples: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        msg = "no samples" if values.size == 0 else "a sample is not a finite number"
        raise HavocError(msg)
    return values
