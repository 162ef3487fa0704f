"""Threads and processes are chosen, never left to a library: by the job, the cores and the memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from havoc_core import cores
from havoc_core.cores import environment_for, num_physical_cores, num_usable_cores, processes_for, threads_for

NANO, SMOL, LARGE = 1_070_000, 134_515_008, 7_000_000_000


def test_cores_are_counted_as_one_may_use_them() -> None:
    """Affinity is respected, and two threads of one core are one."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_usable_cores() == num_physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= num_physical_cores() <= num_usable_cores()


def test_small_models_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of nano are over before a second thread is awake; those of 135 million parameters are worth several."""
    monkeypatch.setattr(cores, "num_physical_cores", lambda: 8)
    assert threads_for(NANO) == 1
    assert threads_for(SMOL) == 4
    assert threads_for(LARGE) == 8


def test_jobs_share_the_cores_before_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs on eight cores have two threads each; eight or more have one."""
    monkeypatch.setattr(cores, "num_physical_cores", lambda: 8)
    assert [threads_for(LARGE, num_jobs=number) for number in (1, 4, 8, 20)] == [8, 2, 1, 1]
    assert threads_for(NANO, num_jobs=20, num_threads=3) == 3


def test_processes_fit_cores_jobs_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than there are jobs, cores for their threads, or memory; always at least one."""
    monkeypatch.setattr(cores, "num_usable_cores", lambda: 8)
    monkeypatch.setattr(cores, "available_memory_bytes", lambda: 10_000)
    assert processes_for(4, bytes_per_process=10) == 4
    assert processes_for(40, bytes_per_process=10) == 8
    assert processes_for(40, bytes_per_process=10, num_threads=4) == 2
    assert processes_for(40, bytes_per_process=3_000) == 3
    assert processes_for(40, bytes_per_process=30_000) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/meminfo is Linux's")
def test_available_memory_is_read() -> None:
    """More than a megabyte, less than the machine has."""
    available = cores.available_memory_bytes()
    assert available is not None
    assert 1_000_000 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("is_loaded", [False, True])
def test_torch_has_the_threads_it_is_given(is_loaded: bool) -> None:
    """Whether torch is imported before or after, and waiting threads sleep instead of spinning."""
    limit = "from havoc_core.cores import limit_threads; limit_threads(1)"
    first, second = ("import torch", limit) if is_loaded else (limit, "import torch")
    script = f"{first}; {second}; import os; print(torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["1", "PASSIVE"]


def test_a_users_wait_policy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says already is not overruled, except the number of threads."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = environment_for(2)
    assert (environment["OMP_WAIT_POLICY"], environment["OMP_NUM_THREADS"]) == ("ACTIVE", "2")
