"""Children: their words reach the parent, their deaths are one line, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from havoc_core.bench.judge.record import Workload
from havoc_core.bench.profiles import PROFILES
from havoc_core.bench.requests import LATENCY, Mark, MeasureRequest
from havoc_core.bench.watched_run import open_session
from havoc_core.errors import HavocError, IdentityError, MeasurementError
from havoc_core.export.runtime.child import run_worker
from tests.alive import is_running

pytestmark = pytest.mark.alone

QUICK = PROFILES["quick"]
ENDLESS = replace(QUICK, prefill=replace(QUICK.prefill, min_busy_s=1e6, max_s=1e6))


@pytest.fixture
def endless_request(tiny_artifact: Path, small_workload: Workload) -> Iterator[MeasureRequest]:
    with open_session(tiny_artifact, profile=ENDLESS, workload=small_workload, num_threads=1) as session:
        yield session.request(0)


def test_killed_child_is_a_measurement_error(endless_request: MeasureRequest) -> None:
    """A child killed in mid-run ends in one line that names the signal (exit 4)."""
    pids: list[int] = []

    def kill_at_prefill(mark: Mark) -> None:
        if mark.name == "prefill":
            os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(MeasurementError, match=r"killed \(signal 9\)") as caught:
        run_worker(LATENCY, endless_request, timeout_s=60, on_start=pids.append, listen=kill_at_prefill)
    assert "\n" not in str(caught.value)


def test_crashed_child_says_where(endless_request: MeasureRequest) -> None:
    """A child that fails with a bug of ours ends in one line with the exception (exit 4)."""
    broken = replace(endless_request, workload=replace(endless_request.workload, seed="x"))
    with pytest.raises(MeasurementError, match=r"TypeError: request.workload.seed is 'x'"):
        run_worker(LATENCY, broken, timeout_s=60)


def test_hanging_child_is_ended(endless_request: MeasureRequest) -> None:
    """A child that outlives its time is ended and reported."""
    pids: list[int] = []
    with pytest.raises(MeasurementError, match="gave no result within 2 s"):
        run_worker(LATENCY, endless_request, timeout_s=2, on_start=pids.append)
    assert not is_running(pids[0])


def test_interrupt_leaves_no_child(endless_request: MeasureRequest) -> None:
    """Ctrl-C in the parent ends the child too."""
    pids: list[int] = []

    def interrupt(_: Mark) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(LATENCY, endless_request, timeout_s=60, on_start=pids.append, listen=interrupt)
    assert not is_running(pids[0])


def test_errors_keep_their_kind(endless_request: MeasureRequest, tmp_path: Path) -> None:
    """A HavocError of the child is raised in the parent as the same class with the same words."""
    with pytest.raises(HavocError, match="no such artifact") as caught:
        run_worker(LATENCY, replace(endless_request, artifact=tmp_path / "none"), timeout_s=60)
    assert type(caught.value) is HavocError
    with pytest.raises(IdentityError, match="NoSuchProvider"):
        run_worker(LATENCY, replace(endless_request, provider="NoSuchProvider"), timeout_s=60)


def test_child_dies_with_its_parent(tiny_artifact: Path) -> None:
    """When the harness is killed outright, its child does not go on measuring."""
    script = (
        "import sys; from dataclasses import replace; from pathlib import Path\n"
        "from havoc_core.bench.requests import LATENCY\n"
        "from havoc_core.bench.profiles import PROFILES; from havoc_core.bench.watched_run import open_session\n"
        "from havoc_core.export.runtime.child import run_worker\n"
        "endless = replace(PROFILES['quick'], prefill=replace(PROFILES['quick'].prefill, min_busy_s=1e6, max_s=1e6))\n"
        "with open_session(Path(sys.argv[1]), profile=endless, num_threads=1) as session:\n"
        "    run_worker(LATENCY, session.request(0), timeout_s=60, on_start=lambda pid: print(pid, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tiny_artifact)], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and is_running(child):
        time.sleep(0.05)
    assert not is_running(child)
