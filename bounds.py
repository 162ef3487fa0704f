"""Confidence bounds from raw samples without an assumed distribution, computed when a record is read.

It uses the standard library only, because loading scipy takes longer than judging a record; the tests compare every
function with scipy's. Each bound is one-sided at `confidence`.

Quantiles use order statistics (David & Nagaraja, Order Statistics, 7.1): the k-th smallest of n samples lies above the
q-quantile with probability Binomial(n, q).cdf(k - 1). Shares use the exact interval of Clopper & Pearson (1934). Rates
use a hierarchical bootstrap, processes before their episodes: of k processes k - 1 are drawn, which makes the variance
between so few unbiased (Rao & Wu, 1988), at levels widened for so few (Hesterberg, The American Statistician 69, 2015).
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TWO_SIDED = 0.975  # one-sided confidence of each end of a 95 % interval
NUM_RESAMPLES = 2000
TAIL_RESAMPLES = 10.0  # a level with fewer resamples beyond it is not carried by them
MAX_BLOCKS = 64
MOST_SAMPLES = 1_000_000
_BISECTIONS = 52  # as many as a double has digits
_WIDEST_T = 1e4


@dataclass(frozen=True, slots=True)
class Bounds:
    """An estimate and its proven lower and upper bound; None if the samples are too few."""

    value: float
    low: float | None
    high: float | None


def binomial_cdf(count: int, *, num_trials: int, probability: float) -> float:
    """Return the chance of at most `count` successes."""
    if count < 0:
        return 0.0
    if count >= num_trials:
        return 1.0
    if probability * num_trials > count:
        return _tail(count, num_trials, probability)
    return 1.0 - _tail(num_trials - count - 1, num_trials, 1.0 - probability)


def _tail(count: int, num_trials: int, probability: float) -> float:
    """Sum the probabilities of 0..count, largest first; `count` lies below the mean, so the terms fall."""
    odds = probability / (1.0 - probability)
    term = math.exp(
        math.lgamma(num_trials + 1)
        - math.lgamma(count + 1)
        - math.lgamma(num_trials - count + 1)
        + count * math.log(probability)
        + (num_trials - count) * math.log1p(-probability)
    )
    total = 0.0
    for successes in reversed(range(count + 1)):
        total += term
        if term <= 1e-18 * total:
            break
        term *= successes / ((num_trials - successes + 1) * odds)
    return min(total, 1.0)


def upper_rank(num_samples: int, *, quantile: float, confidence: float) -> int | None:
    """Smallest rank (from 1) whose order statistic is above the quantile with `confidence`; None if there is none."""
    if binomial_cdf(num_samples - 1, num_trials=num_samples, probability=quantile) < confidence:
        return None
    low, high = 0, num_samples
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(middle - 1, num_trials=num_samples, probability=quantile) >= confidence:
            high = middle
        else:
            low = middle
    return high


def quantile_bounds(samples: Sequence[float], *, quantile: float, confidence: float) -> Bounds:
    """Bound the quantile of the samples' distribution, which may be any, in their unit; at least one sample."""
    ordered = sorted(samples)
    num_samples = len(ordered)
    above = upper_rank(num_samples, quantile=quantile, confidence=confidence)
    mirrored = upper_rank(num_samples, quantile=1.0 - quantile, confidence=confidence)
    return Bounds(
        value=quantile_of(ordered, quantile),
        low=None if mirrored is None else ordered[num_samples - mirrored],
        high=None if above is None else ordered[above - 1],
    )


def quantile_of(ordered: Sequence[float], quantile: float) -> float:
    """Quantile of sorted samples, linear between neighbours."""
    position = (len(ordered) - 1) * quantile
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def share_bounds(num_right: int, num_rows: int, *, confidence: float) -> Bounds:
    """Exact binomial bounds of a share (Clopper & Pearson): 869 right of 1000 prove more than 0.85."""
    low, high = share_ends(num_right, num_rows, confidence=confidence)
    return Bounds(value=num_right / num_rows, low=low, high=high)


def share_ends(num_right: int, num_rows: int, *, confidence: float) -> tuple[float, float]:
    """Only the low and the high bound, which also exist without rows: 0 and 1."""
    error = 1.0 - confidence
    low = 0.0 if num_right == 0 else _solve(lambda p: 1.0 - _cdf(num_right - 1, num_rows, p), error)
    high = 1.0 if num_right == num_rows else _solve(lambda p: 1.0 - _cdf(num_right, num_rows, p), confidence)
    return low, high


def mean_bounds(values: Sequence[float], *, confidence: float) -> Bounds:
    """Bound the mean by Student's t: mean -+ t s / sqrt(n). A single value proves nothing."""
    mean = _mean(values)
    if len(values) == 1:
        return Bounds(value=mean, low=None, high=None)
    reach = student_t(len(values) - 1, confidence=confidence) * _deviation(values) / math.sqrt(len(values))
    return Bounds(value=mean, low=mean - reach, high=mean + reach)


def _cdf(count: int, num_trials: int, probability: float) -> float:
    return binomial_cdf(count, num_trials=num_trials, probability=probability)


def _solve(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if rising(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def proves_share(num_right: int, num_rows: int, *, share: float, confidence: float) -> bool:
    """Whether `num_right` of `num_rows` prove more than `share`: else so many would be rarer than 1 - confidence."""
    return binomial_cdf(num_right - 1, num_trials=num_rows, probability=share) >= confidence


def num_right_needed(num_rows: int, *, share: float, confidence: float) -> int | None:
    """Fewest right answers of `num_rows` that prove more than `share`; None when not even all of them would."""
    return upper_rank(num_rows, quantile=share, confidence=confidence)


def rate_bounds(processes: Sequence[Sequence[tuple[float, float]]], *, confidence: float) -> Bounds:
    """Bound total amount per second from (amount, seconds) of each episode of each process.

    Hierarchical bootstrap: k - 1 of k processes, then the episodes within each, joined to at most `MAX_BLOCKS` blocks
    of neighbours: the work stays bounded, and what slow drift links is drawn together. Bounds never cross the estimate,
    so a slower episode more cannot turn a proven miss into a pass. One episode alone proves nothing, and so do few
    processes at a confidence whose widened level has less than `TAIL_RESAMPLES` beyond it: 3 at 95 %, 5 at 99 %.
    """
    every = [episode for episodes in processes for episode in episodes]
    value = sum(amount for amount, _ in every) / sum(seconds for _, seconds in every)
    level = expanded_level(len(processes) if len(processes) > 1 else len(every), confidence=confidence)
    if (1.0 - level) * NUM_RESAMPLES < TAIL_RESAMPLES:
        return Bounds(value, None, None)
    generator = random.Random(0)
    blocks = [_blocks(episodes) for episodes in processes]
    rates = sorted(_resampled_rate(blocks, generator) for _ in range(NUM_RESAMPLES))
    low, high = quantile_of(rates, 1.0 - level), quantile_of(rates, level)
    return Bounds(value, min(low, value), max(high, value))


def _blocks(episodes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sum neighbours, so that at most `MAX_BLOCKS` of almost equal length remain."""
    num_blocks = min(len(episodes), MAX_BLOCKS)
    edges = [len(episodes) * index // num_blocks for index in range(num_blocks + 1)]
    parts = (episodes[begin:end] for begin, end in itertools.pairwise(edges))
    return [(sum(amount for amount, _ in part), sum(seconds for _, seconds in part)) for part in parts]


def _resampled_rate(processes: Sequence[Sequence[tuple[float, float]]], generator: random.Random) -> float:
    amount = seconds = 0.0
    for episodes in generator.choices(processes, k=max(len(processes) - 1, 1)):
        for drawn_amount, drawn_seconds in generator.choices(episodes, k=len(episodes)):
            amount += drawn_amount
            seconds += drawn_seconds
    return amount / seconds


def next_bound(values: Sequence[float], *, scatter: Sequence[float], confidence: float) -> float:
    """Upper bound of one value more: mean + t s sqrt(1 + 1 / k), the prediction interval; s is that of `scatter`.

    Of a single value nothing is known but itself.
    """
    num_values = len(values)
    reach = _deviation(scatter) * math.sqrt(1 + 1 / num_values)
    return _mean(values) + reach * student_t(num_values - 1, confidence=confidence)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def expanded_level(num_processes: int, *, confidence: float) -> float:
    """Level of a bootstrap quantile that covers at `confidence` with so few processes (Hesterberg, 2015)."""
    return _normal_cdf(student_t(num_processes - 1, confidence=confidence))


def student_t(degrees: int, *, confidence: float) -> float:
    """Quantile of Student's t with that many degrees of freedom, for a confidence of one half or more.

    Without any freedom it is `_WIDEST_T`, which is as good as infinite.
    """
    low, high = 0.0, _WIDEST_T
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < confidence else (low, middle)
    return high


def _student_cdf(t: float, degrees: int) -> float:
    """Chance of at most t >= 0, as a finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    total = 0.0
    for step in range(1 + is_odd, degrees, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return (1 + inside) / 2


def _normal_cdf(sigmas: float) -> float:
    return (1 + math.erf(sigmas / math.sqrt(2))) / 2


def num_samples_needed(share_within: float, *, quantile: float, confidence: float) -> int | None:
    """Fewest samples that would prove the quantile within a limit if `share_within` of them keep being within it.

    None when that share does not exceed the quantile, or a million samples would not do.
    """

    def is_enough(num_samples: int) -> bool:
        return proves_share(int(share_within * num_samples), num_samples, share=quantile, confidence=confidence)

    high = 1
    while not is_enough(high):
        high *= 2
        if high > MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
