"""What every test starts from, which tests are fast (`--fast`), and which need the machine alone (`-m alone`).

cpu_seconds.json holds the CPU seconds of each test file, as the last `make durations` found them: setup, calls and
teardown, with the child processes that ended.
"""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# A job in the background starts with Ctrl-C ignored, one under nohup with a hangup, and both hand that on to their
# children; tests that send these signals need them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing here
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).parents[1]
CPU_SECONDS = Path(__file__).with_name("cpu_seconds.json")
FAST_S = 1.0  # the most CPU seconds that a file of the fast tier takes
MEASURING = {"tiny_record"}  # fixtures that measure

_cpu_s: defaultdict[str, float] = defaultdict(float)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"the test files that took at most {FAST_S:g} CPU seconds")
    parser.addoption("--write-cpu-seconds", action="store_true", help=f"write what each file took to {CPU_SECONDS}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a file known to be slow; a file that was never measured is taken."""
    if config.getoption("fast") and collection_path.name.startswith("test_"):
        return known_cpu_s().get(collection_path.relative_to(ROOT).as_posix(), 0.0) > FAST_S or None
    return None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes a measured record measures, if no other has done so before it."""
    for item in items:
        if MEASURING & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.alone)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = cpu_s()
    try:
        return (yield)
    finally:
        _cpu_s[item.nodeid.partition("::")[0]] += cpu_s() - before


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("write_cpu_seconds"):
        known = {name: seconds for name, seconds in known_cpu_s().items() if (ROOT / name).exists()}
        known |= {name: round(seconds, 1) for name, seconds in _cpu_s.items()}
        CPU_SECONDS.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")


def known_cpu_s() -> dict[str, float]:
    found: dict[str, float] = json.loads(CPU_SECONDS.read_text())
    return found


def cpu_s() -> float:
    """CPU seconds of this process and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The base of `make real`: a Hugging Face directory or a GGUF file."""
    return _given("HAVOC_REAL_MODEL", "a Hugging Face directory or a .gguf file")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The data sets of `make real`: a directory laid out as docs/your-own-model.md says."""
    return _given("HAVOC_REAL_DATA", "a directory of public data sets")


def _given(variable: str, what: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names {what} for `make real`")
    path = Path(os.environ[variable])
    assert path.exists(), f"{variable}={path}: no such file or directory"
    return path
