"""Speed and memory, as ratios within one run: only when asked for (`make bench`), since a busy machine would lie.

A test hands its figures to the fixture `row`; at the end they are printed as one Markdown table with goal, verdict and
the machine. `make bench TABLE=docs/benchmarks.md` also puts that table between the file's two `make bench` comments.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

GENAI = Path(os.environ.get("HAVOC_GENAI_PYTHON") or Path(__file__).parents[2] / ".venv" / "genai" / "bin" / "python")
"""The interpreter of an environment of its own, since onnxruntime-genai's onnxruntime overwrites onnxruntime-gpu."""
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "onnx-ir", "numpy")
FIRST, LAST = "<!-- make bench -->", "<!-- /make bench -->"
EVEN = 0.03  # what the same two programs, timed again, differ by
SAMPLE_EVERY_S = 0.005
_ANON = re.compile(rb"RssAnon:\s+(\d+) kB")
_PEAK = re.compile(rb"VmHWM:\s+(\d+) kB")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--perf-table", type=Path, help="a Markdown file that receives the table of tests/perf")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name.startswith("test_") and not config.getoption("benchmark_only"):
        return True
    return None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure: a ratio in units of "x", or a value with its unit; `goal` is the least it should be, or the most."""

    what: str
    value: float
    goal: float | None = None
    is_upper_goal: bool = False
    unit: str = "x"
    detail: str = ""

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        bound = "at most" if self.is_upper_goal else "at least"
        goal = "" if self.goal is None else f"{bound} {self.goal:g} {self.unit}"
        return self.what, f"{_short(self.value)} {self.unit}", goal, self.verdict, self.detail

    @property
    def verdict(self) -> str:
        """Whether the goal was met; nothing where there is none. A ratio this near to a goal of 1 is neither."""
        if self.goal is None:
            return ""
        if self.unit == "x" and self.goal == 1 and abs(self.value - 1) < EVEN:
            return "even"
        is_met = self.value <= self.goal if self.is_upper_goal else self.value >= self.goal
        return "met" if is_met else "missed"


@pytest.fixture
def row(benchmark: Any) -> Callable[..., None]:
    """`row("fold, 960 x 960", 9.3, goal=8, detail="...")` adds a line to the table."""
    rows = benchmark.extra_info.setdefault("rows", [])

    def add(what: str, value: float, **fields: Any) -> None:
        rows.append(asdict(Row(what=what, value=value, **fields)))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [Row(**row) for bench in session.benchmarks for row in bench.extra_info.get("rows", ())] if session else []
    if not found:
        return
    terminalreporter.section("speed and memory")
    table = "\n".join([*markdown(found), "", machine()])
    terminalreporter.line(table)
    path = config.getoption("perf_table", None)
    if path is not None:
        _put(path, table)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """The table, its columns padded so that it can be read as plain text too."""
    lines = [("what", "measured", "goal", "verdict", "how"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for index, line in enumerate(lines):
        cells = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        yield "| " + " | ".join(cells) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def machine() -> str:
    """The machine and the software the figures were taken with, in one line."""
    lines = [*Path("/proc/cpuinfo").read_text().splitlines(), *Path("/proc/meminfo").read_text().splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    memory_gib = int(facts["MemTotal"].split()[0]) / (1 << 20)
    cores = len(os.sched_getaffinity(0))
    software = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    ask = "from importlib.metadata import version; print(', onnxruntime-genai', version('onnxruntime-genai'), end='')"
    genai = subprocess.run([GENAI, "-c", ask], capture_output=True, text=True, check=False) if GENAI.exists() else None
    return (
        f"{time.strftime('%Y-%m-%d')}, {cores} cores of {facts['model name']}, {memory_gib:.0f} GiB, load "
        f"{os.getloadavg()[2]:.1f}, Python {platform.python_version()}, {software}{genai.stdout if genai else ''}"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _put(path: Path, table: str) -> None:
    text = path.read_text() if path.exists() else f"{FIRST}\n{LAST}\n"
    before, first, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not (first and last):
        pytest.exit(f"{path}: has no {FIRST} ... {LAST} to put the table between", returncode=2)
    path.write_text(f"{before}{FIRST}\n{table}\n{LAST}{after}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Child:
    """One run of a process. `said` is the JSON object it printed last, with moments of the clock of `started_s`."""

    started_s: float
    wall_s: float
    anon_bytes: tuple[tuple[float, int], ...]
    peak_rss_bytes: int
    said: dict[str, Any]

    def peak_anon_bytes(self, *, before_s: float = float("inf")) -> int:
        """Most anonymous memory (what no file backs) in samples every 5 ms, until a moment."""
        return max(num_bytes for moment_s, num_bytes in self.anon_bytes if moment_s <= before_s)


@pytest.fixture(scope="session")
def genai_python() -> Path:
    """An interpreter that runs onnxruntime-genai's model builder; without one the test is skipped with the reason."""
    if not GENAI.exists():
        pytest.skip(f"no environment with onnxruntime-genai at {GENAI}: `make genai` makes one")
    builder = [GENAI, "-c", "import onnxruntime_genai.models.builder"]
    found = subprocess.run(builder, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        pytest.skip(f"its builder cannot start ({reason}): {GENAI} -m pip install torch transformers onnx-ir")
    return GENAI


@pytest.fixture(scope="session")
def run_child() -> Callable[..., Child]:
    """Run a command in a process of its own to its end and watch its memory; its failure fails the test."""

    def run(*command: str | Path) -> Child:
        # another environment's interpreter must not see this one's packages
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["HF_HUB_OFFLINE"] = "1"
        started_s = time.monotonic()
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        watch = _Watch(process)
        stdout, stderr = process.communicate()
        wall_s = time.monotonic() - started_s
        watch.join()
        assert process.returncode == 0, stderr[-2000:]
        said = json.loads(stdout.strip().splitlines()[-1])
        return Child(
            started_s=started_s,
            wall_s=wall_s,
            anon_bytes=tuple(watch.anon_bytes),
            peak_rss_bytes=watch.peak_rss_bytes,
            said=said,
        )

    return run


class _Watch(threading.Thread):
    """Samples a process's memory until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__()
        self._process = process
        self.anon_bytes: list[tuple[float, int]] = []
        self.peak_rss_bytes = 0
        self.start()

    def run(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        while self._process.returncode is None:
            try:
                text = status.read_bytes()
            except OSError:  # it was waited for
                return
            anon, peak = _ANON.search(text), _PEAK.search(text)
            if anon and peak:  # a process that has ended has neither
                self.anon_bytes.append((time.monotonic(), int(anon[1]) * 1024))
                self.peak_rss_bytes = int(peak[1]) * 1024
            time.sleep(SAMPLE_EVERY_S)
