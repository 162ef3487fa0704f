"""The command answers at once, and a verdict costs less than half a second."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from havoc_core.bench.device import identify_cpu
from tests.bench import sample_records as samples

BARE = [sys.executable, "-c", "pass"]
NUM_ROUNDS = 15
NUM_RECORD_BYTES = 5_000_000


def seconds(command: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started_s


def pairs(command: list[str]) -> tuple[float, float]:
    """Median seconds of a command, and of its ratio to a bare interpreter's start, taken in turns."""
    times = [(seconds(command), seconds(BARE)) for _ in range(NUM_ROUNDS)]
    return statistics.median(ours for ours, _ in times), statistics.median(ours / bare for ours, bare in times)


def test_help_against_a_bare_interpreter(benchmark: Any, row: Callable[..., None]) -> None:
    """`havoc --help` costs a few starts of Python, far below the import of any library that computes."""
    command = [sys.executable, "-m", "havoc_core", "--help"]
    benchmark.pedantic(subprocess.run, args=(command,), kwargs={"check": True, "capture_output": True}, rounds=3)
    help_s, ratio = pairs(command)
    detail = f"{ratio:.1f} starts of a bare interpreter"
    row("havoc --help", help_s, goal=0.15, is_upper_goal=True, unit="s", detail=detail)
    assert ratio < 8


def test_gate_against_a_bare_interpreter(benchmark: Any, row: Callable[..., None], large_record: Path) -> None:
    """`havoc gate` reads, checks, judges and explains a record of 5 MB: half of it bounds on thousands of samples."""
    command = [sys.executable, "-m", "havoc_core", "gate", str(large_record), "--target", "host"]
    benchmark.pedantic(subprocess.run, args=(command,), kwargs={"check": True, "capture_output": True}, rounds=3)
    gate_s, ratio = pairs(command)
    detail = f"{large_record.stat().st_size / 1e6:.1f} MB, {ratio:.1f} starts of a bare interpreter"
    row("havoc gate", gate_s, goal=0.5, is_upper_goal=True, unit="s", detail=detail)
    assert ratio < 60


@pytest.fixture(scope="module")
def large_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record that passes here, with as many samples as make 5 MB: 5,900 calls of each kind in every process."""
    cpu = identify_cpu().model_dump(mode="json")
    document = samples.changed(samples.document("cpu"), device__cpu=cpu, device__name=cpu["name"])
    num_calls, spacing_ns, random = 5_900, 100_000_000, Random(0)
    for process in document["samples"]:
        run = process["decode"][0]
        num_runs = num_calls // 10
        start_ns = iter(range(spacing_ns, 10**15, spacing_ns))
        for name, lowest_ns in (("prefill", 20_000_000), ("ttft", 30_000_000)):
            durations = [lowest_ns + random.randrange(5_000_000) for _ in range(num_calls)]
            process[name] = {"start_ns": [next(start_ns) for _ in durations], "duration_ns": durations}
        steps = [[duration + random.randrange(1000) for duration in run["step_ns"]] for _ in range(num_runs)]
        first_ns = next(start_ns)
        process["decode"] = [
            {**run, "start_ns": first_ns + 10**9 * place, "step_ns": own} for place, own in enumerate(steps)
        ]
    path = tmp_path_factory.mktemp("large") / "record.json"
    samples.sealed(document).save(path)
    assert path.stat().st_size >= NUM_RECORD_BYTES
    return path
