"""Speed and memory, as ratios within one run: only when asked for (`make bench`), since a busy machine would lie.

A test puts its figures into `benchmark.extra_info`, say `{"ratio": 9.3, "goal": 8}`; they are printed at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name.startswith("test_") and not config.getoption("benchmark_only"):
        return True
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    figures = {bench.name: bench.extra_info for bench in session.benchmarks if bench.extra_info} if session else {}
    if figures:
        terminalreporter.section("figures")
        width = max(map(len, figures))
        for name, info in figures.items():
            terminalreporter.line(f"{name:{width}}  " + "  ".join(f"{key} {_short(info[key])}" for key in info))


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
