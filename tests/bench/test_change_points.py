"""Changes of level: by hand, by what must never matter, and on the noise of real benches."""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from havoc_core.bench.judge.change_points import (
    ERROR,
    FEWEST_BEFORE,
    FEWEST_RECORDS,
    WINDOWS,
    Level,
    error_at_look,
    least_step,
    level_changes,
    level_of,
)
from tests.bench import simulated_histories as simulated

BEFORE = [0.0, 0.01, -0.01, -0.01, 0.01, 0.0, 0.01, -0.01, -0.01, 0.01]
AFTER = [0.11, 0.09, 0.10]


def levels(values: list[float], error: float = 0.0) -> list[Level]:
    return [Level(value, error) for value in values]


def test_a_change_by_hand() -> None:
    """Ten records around 0 and three around .1: every figure of the change, worked out with scipy."""
    (change,) = level_changes(levels([*BEFORE, *AFTER]), margin=0.01)
    variance = (8e-4 + 2e-4) / 11  # squares around both means, by 13 - 2 degrees of freedom
    neighbours = (-1e-4 + 1e-4 - 1e-4 - 1e-4 + 1e-4 - 1e-4) + -1e-4  # products before: 5 that are not 0; after: 1
    alike = neighbours / 1e-3 + 2 / 13
    assert alike < 0  # so neighbours are taken for independent
    error = math.sqrt(variance * (1 / 10 + 1 / 3))
    wanted = stats.t.isf(0.02 / 2 / 100 / 2 / 3, 11)
    assert (change.first, change.seen) == (10, 12)
    assert change.ratio == pytest.approx(math.exp(0.1))
    assert change.low == pytest.approx(math.exp(0.1 - wanted * error))
    assert change.high == pytest.approx(math.exp(0.1 + wanted * error))
    assert change.low > 1


def test_alike_neighbours_count_for_less() -> None:
    """The same values in another order: records of one hour that share its load are not as many as they seem."""
    shuffled = [0.01, 0.01, 0.01, 0.01, 0.0, 0.0, -0.01, -0.01, -0.01, -0.01]
    (apart,) = level_changes(levels([*BEFORE, *AFTER]), margin=0.01)
    alike = (3e-4 + 3e-4 - 1e-4) / 1e-3 + 2 / 13  # 3 products of 1e-4 up and 3 down before, -1e-4 after
    factor = math.sqrt((1 + alike) / (1 - alike))
    (change,) = level_changes(levels([*shuffled, *AFTER]), margin=0.01)
    reach = math.log(apart.ratio / apart.low)
    assert math.log(change.ratio / change.low) == pytest.approx(reach * factor)


def test_records_are_no_surer_than_their_own_processes() -> None:
    """Processes that differ by more than the records do widen the interval, until nothing is proven."""
    (sure,) = level_changes(levels([*BEFORE, *AFTER], error=0.001), margin=0.01)
    (less,) = level_changes(levels([*BEFORE, *AFTER], error=0.012), margin=0.01)
    scatter = math.sqrt(1e-3 / 11)
    assert math.log(less.ratio / less.low) == pytest.approx(math.log(sure.ratio / sure.low) * 0.012 / scatter)
    assert level_changes(levels([*BEFORE, *AFTER], error=0.05), margin=0.01) == []


def test_too_few_records_say_nothing() -> None:
    """Whatever the step: fewer than ten before it, or fewer than three after it, are no change."""
    assert FEWEST_RECORDS == FEWEST_BEFORE + min(WINDOWS) == 13
    assert level_changes(levels([*BEFORE[1:], *[5.0] * 3]), margin=0.01) == []
    assert level_changes(levels([*BEFORE, 5.0, 5.0]), margin=0.01) == []
    assert level_changes([], margin=0.01) == []
    assert least_step(levels(BEFORE[1:]), look=9) is None


def test_a_single_bad_record_is_no_change() -> None:
    """However calm and long the time before: what the next records do not confirm was the machine."""
    generator = random.Random(2)
    calm = [generator.gauss(0.0, 0.002) for _ in range(80)]
    for bad in ([0.3], [0.3, 0.3]):
        assert level_changes(levels([*calm, *bad, *calm[:12]]), margin=0.01) == []
    assert level_changes(levels([*calm, 0.3, 0.3, 0.3]), margin=0.01) != []


def test_a_step_within_the_margin_is_none() -> None:
    """Memory that hardly scatters would prove one page more; what is asked for is a step that matters."""
    steady = [*[0.0] * 12, *[0.009] * 8]
    assert level_changes(levels(steady), margin=0.01) == []
    (change,) = level_changes(levels(steady), margin=0.005)
    assert (change.first, change.seen) == (12, 14)
    assert [change.low, change.ratio, change.high] == pytest.approx([math.exp(0.009)] * 3)


def test_the_level_after_a_change_is_the_next_baseline() -> None:
    """Up and down again are two changes, each held against its own level, and found at the third record."""
    generator = random.Random(3)
    values = [generator.gauss(0.1 if 20 <= place < 40 else 0.0, 0.005) for place in range(60)]
    found = level_changes(levels(values), margin=0.01)
    assert [(change.first, change.ratio > 1) for change in found] == [(20, True), (40, False)]
    assert all(change.seen - change.first <= 3 for change in found)


def test_a_change_stays_found() -> None:
    """What was said of the first records is still said when more have come: each look sees only those before it."""
    generator = random.Random(4)
    values = [generator.gauss(0.06 if place >= 30 else 0.0, 0.01) for place in range(50)]
    whole = level_changes(levels(values), margin=0.01)
    assert whole
    for num in range(len(values)):
        assert level_changes(levels(values[:num]), margin=0.01) == [one for one in whole if one.seen < num]


def test_all_looks_share_what_may_go_wrong() -> None:
    """Half in the first hundred, the rest later: it never adds up to more."""
    assert sum(error_at_look(number) for number in range(1, 101)) == pytest.approx(ERROR / 2)
    assert sum(error_at_look(number) for number in range(1, 5000)) == pytest.approx(ERROR)


@settings(max_examples=50)
@given(st.floats(1e-6, 1e12), st.integers(0, 60))
def test_a_constant_series_never_alarms(value: float, num: int) -> None:
    """Nothing moves, so nothing changed, however long it is looked at."""
    assert level_changes([level_of([value, value])] * num, margin=0.0) == []


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(1e-9, 1e9))
def test_the_unit_does_not_matter(seed: int, scale: float) -> None:
    """In ns or in s: the same records are named, with the same ratio."""
    generator = random.Random(seed)
    values = [math.exp(generator.gauss(0.1 if place >= 18 else 0.0, 0.01)) for place in range(26)]
    plain, scaled = (
        level_changes([level_of([factor * value]) for value in values], margin=0.01) for factor in (1.0, scale)
    )
    assert [(change.first, change.seen) for change in plain] == [(change.first, change.seen) for change in scaled]
    for one, other in zip(plain, scaled, strict=True):
        assert (one.ratio, one.low) == pytest.approx((other.ratio, other.low), rel=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_slower_and_faster_are_one_test(seed: int) -> None:
    """Turned upside down, the same places change by one over the ratio."""
    generator = random.Random(seed)
    values = [generator.gauss(0.05 if place >= 18 else 0.0, 0.01) for place in range(30)]
    up, down = (level_changes(levels([sign * value for value in values]), margin=0.0) for sign in (1, -1))
    assert [change.first for change in up] == [change.first for change in down]
    assert [change.ratio for change in up] == pytest.approx([1 / change.ratio for change in down])


def test_a_record_is_the_mean_of_its_processes() -> None:
    """On the scale of logarithms; a single process tells no error."""
    found = level_of([math.exp(0.1), math.exp(0.3), math.exp(0.2)])
    assert (found.log_value, found.error) == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert level_of([7.0]) == Level(math.log(7.0))


def test_the_least_step_is_found_nine_times_in_ten() -> None:
    """What "five more would show" promises, on normal noise."""
    generator, num_found = random.Random(8), 0
    for _ in range(200):
        values = [generator.gauss(0.0, 0.02) for _ in range(35)]
        step = math.log1p(least_step(levels(values[:30]), look=30) or 0.0)
        moved = [*values[:30], *(value + step for value in values[30:])]
        num_found += bool(level_changes(levels(moved), margin=0.01))
    assert num_found / 200 >= 0.85


# On real noise. `make simulate` does the same at length.


def test_few_false_alarms_on_real_noise() -> None:
    """Histories of 60 real benches, drawn anew: at most 2 % alarm."""
    for quantity in simulated.QUANTITIES:
        assert simulated.false_alarms(simulated.benches(quantity), 150, seed=11) <= 0.02


def test_steps_of_five_percent_are_found_within_five_records() -> None:
    """Where benches scatter by 1.25 %, nine in ten and more."""
    for quantity in simulated.QUANTITIES:
        assert simulated.found(simulated.benches(quantity, scatter=0.0125), 100, seed=12) >= 0.9


def naive(history: list[Level]) -> list[tuple[int, float]]:
    """The known-bad twin: each record against the one before, slower by more than 5 %."""
    steps = [now.log_value - before.log_value for before, now in pairwise(history)]
    return [(place, math.exp(step)) for place, step in enumerate(steps, start=1) if step > math.log(1.05)]


def uncorrected(history: list[Level]) -> list[tuple[int, float]]:
    """The known-bad twin: the newest five against all before, at 95 % each time that somebody looks."""
    found = []
    for seen in range(14, len(history)):
        old, new = ([level.log_value for level in part] for part in (history[: seen - 4], history[seen - 4 : seen + 1]))
        step = statistics.fmean(new) - statistics.fmean(old)
        spread = math.sqrt((statistics.pvariance(old) * len(old) + statistics.pvariance(new) * 5) / (seen - 1))
        if step > stats.t.isf(0.025, seen - 1) * spread * math.sqrt(1 / len(old) + 1 / 5):
            found.append((seen, math.exp(step)))
    return found


def test_what_others_do_alarms_falsely() -> None:
    """The same noise, judged as benchmark pages often do: most histories without any change have an alarm."""
    noise = simulated.benches(simulated.QUANTITIES[0], scatter=0.03)
    assert simulated.false_alarms(noise, 40, seed=13, finds=naive) > 0.5
    assert simulated.false_alarms(noise, 12, seed=13, finds=uncorrected) > 0.3
