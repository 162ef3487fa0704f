"""Disturbed calls: found by what else ran and by the CPU time of the call; slow is told from "was not running"."""

from __future__ import annotations

from typing import Any

import pytest

from havoc_core.bench.judge import disturbance
from havoc_core.bench.judge.record import Calls, ProcessSamples
from tests.bench import sample_records as samples


def process(**changes: Any) -> ProcessSamples:
    """Return the good process with changes by name."""
    return ProcessSamples.model_validate(samples.process(0, "CPUExecutionProvider") | changes, strict=False)


def flags(found: ProcessSamples) -> list[bool]:
    return [call.is_disturbed for call in disturbance.calls_of(found, found.prefill)]


@pytest.mark.parametrize("what", ["foreign", "waited", "stolen"])
def test_calls_are_disturbed_while_something_else_ran(what: str) -> None:
    """Of prefills from 0.1 to 0.52 s, those that touch the stretch from 0.2 to 0.3 s, and no other."""
    found = process(surroundings=samples.surroundings(**{what: (0.2, 0.3)}))
    assert disturbance.disturbed_spans(found) == ((200_000_000, 300_000_000),)
    touched = [start < 300_000_000 and start + 20_200_000 > 200_000_000 for start in found.prefill.start_ns]
    assert flags(found) == touched
    assert any(touched)
    assert not all(touched)


@pytest.mark.parametrize(("what", "limit"), [("foreign", 0.2 / 8), ("waited", 0.05), ("stolen", 0.05)])
def test_the_least_that_disturbs(what: str, limit: float) -> None:
    """Just under the share nothing is disturbed, just over it everything is."""
    for share, is_disturbed in ((0.95 * limit, False), (1.1 * limit, True)):
        found = process(surroundings=samples.surroundings(**{what: (0.0, 1e9)}, share=share))
        assert set(flags(found)) == {is_disturbed}


def test_one_neighbour_is_as_much_on_a_large_machine() -> None:
    """A fifth of a core beside the model counts on 2 CPUs and on 64: it holds up the thread whose core it shares."""
    for num_cpus in (2, 64):
        for cores, is_disturbed in ((0.19, False), (0.25, True)):
            around = samples.surroundings(foreign=(0.0, 1e9), num_cpus=num_cpus, share=cores / num_cpus)
            assert set(flags(process(surroundings=around))) == {is_disturbed}


def test_a_tick_is_no_neighbour() -> None:
    """Where readings lie near each other, a clock that counts in steps of 10 ms shows work that may not have been."""
    for ticks_ns, is_disturbed in ((20_000_000, False), (20_000_001, True)):
        around = {
            "num_cpus": 2,
            "t_ns": [0, 50_000_000, 10**9],
            "own_ns": [0, 0, 0],
            "busy_ns": [0, ticks_ns, ticks_ns],
        }
        found = process(surroundings=around)
        assert bool(disturbance.disturbed_spans(found)) is is_disturbed


def test_slow_and_not_running_are_told_apart() -> None:
    """Two calls took twice as long: one used the CPU all the while, the other did not. Only that one is disturbed."""
    usual = 20_000_000
    durations = [usual] * 8 + [2 * usual] * 2
    cpu = [2 * usual] * 8 + [4 * usual, 2 * usual]
    calls = Calls(start_ns=tuple(10**9 * i for i in range(10)), duration_ns=tuple(durations), cpu_ns=tuple(cpu))
    assert disturbance.off_cpu(calls) == [False] * 9 + [True]
    assert disturbance.off_cpu(calls.model_copy(update={"cpu_ns": ()})) == [False] * 10
    few = Calls(start_ns=(0, 10**9), duration_ns=(usual, usual), cpu_ns=(usual, 1))
    assert disturbance.off_cpu(few) == [False, False]


def test_an_older_record_has_only_the_whole_process() -> None:
    """Without counters, the share of the process decides for all of its calls."""
    assert set(flags(process(foreign_cpu_share=0.11))) == {True}
    assert set(flags(process(foreign_cpu_share=0.10))) == {False}
    assert set(flags(process(steal_share=0.06))) == {True}
    assert set(flags(process())) == {False}
    nothing = {"num_cpus": 1, "t_ns": [0, 10**9]}
    assert set(flags(process(foreign_cpu_share=0.11, surroundings=nothing))) == {True}


def test_steps_and_loads_have_their_own_time() -> None:
    """The decode runs begin at 13.7, 14 and 14.3 s; the load is what the process does first."""
    found = process(surroundings=samples.surroundings(foreign=(14.0, 14.2)))
    runs = [[step.is_disturbed for step in run] for run in disturbance.runs_of(found)]
    assert (any(runs[0]), any(runs[1]), any(runs[2])) == (False, True, False)
    assert 80 < sum(runs[1]) < 127
    assert not disturbance.is_load_disturbed(found)
    assert disturbance.is_load_disturbed(process(surroundings=samples.surroundings(foreign=(0.0, 0.1))))


def test_the_share_is_of_the_timed_time() -> None:
    """All, none, and about a half; without calls there is no share."""
    assert disturbance.disturbed_share([process(surroundings=samples.surroundings())]) == 0.0
    everything = process(surroundings=samples.surroundings(foreign=(0.0, 1e9)))
    assert disturbance.disturbed_share([everything]) == 1.0
    half = process(surroundings=samples.surroundings(foreign=(0.0, 7.1)))
    assert disturbance.disturbed_share([half]) == pytest.approx(0.5, abs=0.05)
    assert disturbance.disturbed_share([]) is None


def test_cores_that_computed() -> None:
    """CPU time over wall time: two threads that compute all the while are two cores."""
    calls = {"start_ns": [0, 10**9], "duration_ns": [10**7] * 2, "cpu_ns": [2 * 10**7] * 2}
    assert disturbance.cpu_share([process(prefill=calls)]) == 2.0
    assert disturbance.cpu_share([process()]) is None
