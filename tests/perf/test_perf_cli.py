"""The command answers at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from pytest_benchmark.fixture import BenchmarkFixture

BARE = [sys.executable, "-c", "pass"]
NUM_ROUNDS = 15


def seconds(command: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started_s


def test_help_against_a_bare_interpreter(benchmark: BenchmarkFixture) -> None:
    """`havoc --help` costs a few starts of Python, far below the import of any library that computes."""
    command = [sys.executable, "-m", "havoc_core", "--help"]
    pairs = [(seconds(command), seconds(BARE)) for _ in range(NUM_ROUNDS)]
    benchmark.extra_info["help_s"] = statistics.median(ours_s for ours_s, _ in pairs)
    benchmark.extra_info["ratio"] = statistics.median(ours_s / bare_s for ours_s, bare_s in pairs)
    benchmark.extra_info["goal"] = "help_s < 0.15"
    benchmark.pedantic(subprocess.run, args=(command,), kwargs={"check": True, "capture_output": True}, rounds=5)
    assert benchmark.extra_info["ratio"] < 8
