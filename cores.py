"""Which devices may compute, how many cores a job has, and how they are divided into processes and threads.

By default a library starts one thread for each core, whatever else runs. The threads of one matrix product wait for
each other, so beside other work each product is as slow as its slowest thread. torch's waiting threads also spin, and a
step of a small model that should take seconds then takes a minute. So HAVOC always sets the number of threads:
independent jobs run in processes with one thread each. Only a single job over large matrices uses several threads,
which sleep while they wait.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from pathlib import Path
from typing import Literal

from .cgroups import cpu_quota_cores

TorchDevice = Literal["cpu", "cuda"]
"""The devices that torch can compute on (`model.device`)."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_WAIT_POLICY = "OMP_WAIT_POLICY"
_MIN_PARAMETERS_PER_THREAD = 30_000_000
"""A model with fewer parameters runs as fast on one thread: its products end before a second thread wakes up."""


def num_usable_cores() -> int:
    """Cores that this process may keep busy: limited by its affinity and by the whole cores of its CPU quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota_cores()
    return available if quota is None else min(available, max(1, math.floor(quota)))


def num_physical_cores() -> int:
    """Physical cores among the usable ones: two threads of one core share its arithmetic units."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    folder = Path("/sys/devices/system/cpu")
    siblings = {_read_line(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in usable}
    return max(1, min(len(siblings), num_usable_cores()))


def _read_line(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return None


def processor_fields() -> dict[str, str]:
    """Linux's facts about the first processor, by Linux's names; empty on another system."""
    text = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def cpu_name() -> str:
    """Name of the processor, or of the board if the system names only the board."""
    if name := processor_fields().get("model name"):
        return name
    with contextlib.suppress(OSError):
        if name := Path("/proc/device-tree/model").read_text(errors="replace").strip("\0 \n"):
            return name
    return platform.processor() or platform.machine() or "unknown"


def available_memory_bytes() -> int | None:
    """Memory that is available without swapping, as Linux estimates it; None if it is unknown."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None


def threads_for(num_parameters: int, *, num_jobs: int = 1, num_threads: int | None = None) -> int:
    """Threads for each of `num_jobs` independent jobs over a model of this size; `num_threads` is the user's choice.

    The result depends on the model, the jobs and the physical cores only, not on the number of processes or on other
    work: the number of threads changes rounding, and the same command should give the same result.
    """
    if num_threads is not None:
        return num_threads
    worth = max(1, num_parameters // _MIN_PARAMETERS_PER_THREAD)
    return max(1, min(worth, num_physical_cores() // max(1, num_jobs)))


def processes_for(num_jobs: int, *, bytes_per_process: int, num_threads: int = 1) -> int:
    """Processes that share `num_jobs` jobs: as many as the usable cores and the memory allow."""
    fitting = (available_memory_bytes() or sys.maxsize) // max(1, bytes_per_process)
    return max(1, min(num_jobs, num_usable_cores() // num_threads, fitting))


def let_threads_sleep() -> None:
    """Make waiting threads sleep instead of spin; must be called before a library starts threads."""
    os.environ.setdefault(_WAIT_POLICY, "PASSIVE")


def limit_threads(num_threads: int) -> None:
    """Set the number of threads of this process's libraries, also of those loaded later; waiting threads sleep."""
    for name in THREAD_VARIABLES:
        os.environ[name] = str(num_threads)
    let_threads_sleep()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)


def environment_for(num_threads: int) -> dict[str, str]:
    """Environment of a child process that computes with `num_threads` threads."""
    own = {name: str(num_threads) for name in THREAD_VARIABLES}
    return {_WAIT_POLICY: "PASSIVE", **os.environ, **own}
