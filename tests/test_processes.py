"""Jobs in worker processes: results in order, errors of their class, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from havoc_core.errors import HavocError, IdentityError, MeasurementError
from havoc_core.processes import Workers, results_of
from tests.alive import is_running

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _jobs_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def wait_until_gone(pids: list[int]) -> list[int]:
    deadline_s = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def test_results_come_in_the_order_of_the_requests() -> None:
    """The first job is the slowest, and still first; two workers did the work of four, with one thread each."""
    requests = [{"number": number, "delay_s": 0.5 if number == 0 else 0} for number in range(4)]
    with Workers(2) as workers:
        results = list(results_of(workers.run("jobs_for_processes:square", requests)))
        again = list(results_of(workers.run("jobs_for_processes:square", requests[1:2])))
    assert [result["square"] for result in results] == [0, 1, 4, 9]
    assert {result["threads"] for result in results} == {"1"}
    assert len({result["pid"] for result in results}) == 2
    assert {result["session"] for result in results} == {result["pid"] for result in results}  # see sched(7), autogroup
    assert again[0]["pid"] in {result["pid"] for result in results}


def test_progress_of_jobs_is_heard() -> None:
    """Units of the outermost stage count, those beneath it do not; both are named."""
    heard: list[tuple[int, str]] = []
    with Workers(1) as workers:
        run = workers.run("jobs_for_processes:square", [{"number": 3}], listen=lambda n, note: heard.append((n, note)))
        assert next(run)["square"] == 9
    assert heard == [(0, "inner: beneath"), (2, "square: of 3")]


def test_one_error_does_not_stop_the_others() -> None:
    """It stands in its job's place with its class, so the exit code is the job's own; `results_of` raises it."""
    requests = [{"number": number} for number in range(4)]
    with Workers(2) as workers:
        outcomes = list(workers.run("jobs_for_processes:refuse", requests))
        assert [type(outcome) for outcome in outcomes] == [type(None), IdentityError, HavocError, type(None)]
        assert str(outcomes[1]) == "this is another device"
        with pytest.raises(IdentityError, match="another device"):
            list(results_of(workers.run("jobs_for_processes:refuse", requests)))


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGTERM, "by signal 15 without a result: last words"), (signal.SIGKILL, "memory may have run out")],
)
def test_a_worker_that_dies_is_one_line(number: signal.Signals, words: str) -> None:
    """How it ended and what it said last."""
    with Workers(1) as workers, pytest.raises(MeasurementError, match=words):
        list(workers.run("jobs_for_processes:die", [{"signal": int(number)}]))


def test_a_defect_in_a_job_is_told_as_one() -> None:
    """With its class and words, to be reported."""
    with Workers(1) as workers, pytest.raises(MeasurementError, match="ZeroDivisionError: a defect.*report"):
        list(workers.run("jobs_for_processes:fail", [{}]))


PARENT = """
import sys
from havoc_core.processes import Workers
with Workers(2) as workers:
    list(workers.run("jobs_for_processes:sleep", [{"folder": sys.argv[1]}] * 2))
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A process with two workers asleep in their jobs, and the workers' ids."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 60
        while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert len(pids) == 2
        yield process, pids
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_no_worker_outlives_its_parent(
    parent: tuple[subprocess.Popen[bytes], list[int]], number: signal.Signals
) -> None:
    """Killed, interrupted or terminated: the workers are gone, busy as they were."""
    process, pids = parent
    assert all(map(is_running, pids))
    os.kill(process.pid, number)
    process.wait(timeout=30)
    assert wait_until_gone(pids) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_end_with_their_block() -> None:
    """Leaving `with` ends the workers, also when the results were not all taken."""
    with Workers(2) as workers:
        run = workers.run("jobs_for_processes:square", [{"number": 1}, {"number": 2}, {"number": 3, "delay_s": 60}])
        next(run)
        pids = [worker.process.pid for worker in workers._workers]
        assert len(pids) == 2
    assert wait_until_gone(pids) == []
