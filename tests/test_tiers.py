"""Which tests run when: `make test` runs each exactly once, and the fast ones of `make check` reach every room."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
CPU_SECONDS = json.loads((ROOT / "tests" / "cpu_seconds.json").read_text())
MAKE = shutil.which("make")


def pytest_words(goal: str) -> list[list[str]]:
    """The calls of pytest that `make goal` would make."""
    command = [str(MAKE), "--dry-run", "--no-print-directory", goal]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [shlex.split(line) for line in lines if "bin/pytest" in line]


def chosen(expression: str, marks: tuple[str, ...]) -> bool:
    return Expression.compile(expression).evaluate(lambda name, **_: name in marks)


@pytest.mark.skipif(MAKE is None, reason="needs make")
def test_make_test_runs_every_test_exactly_once() -> None:
    """Whatever marks a test carries: one of the two parts takes it if plain `pytest` does, none if it does not."""
    parts = [words[words.index("-m") + 1] for words in pytest_words("test")]
    whole = SETTINGS["pytest"]["addopts"][-1]
    assert len(parts) == 2
    names = [mark.partition(":")[0] for mark in SETTINGS["pytest"]["markers"]]
    for count in range(len(names) + 1):
        for marks in itertools.combinations(names, count):
            assert sum(chosen(part, marks) for part in parts) == chosen(whole, marks), marks


@pytest.mark.skipif(MAKE is None, reason="needs make")
def test_what_measures_runs_in_one_process() -> None:
    """The part with workers takes no test that is marked `alone`, and the other part has no workers."""
    together, alone = pytest_words("test")
    assert not chosen(together[together.index("-m") + 1], ("alone",))
    assert "-n" in together
    assert "-n" not in alone


@pytest.fixture
def fast_files(request: pytest.FixtureRequest) -> list[Path]:
    """Files of the fast tier in which a test may run beside others."""
    limit_s = next(plugin.FAST_S for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "FAST_S"))
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if not {"perf", "gpu"} & set(path.parts)]
    taken = [path for path in files if CPU_SECONDS.get(path.relative_to(ROOT).as_posix(), 0.0) <= limit_s]
    return [path for path in taken if "mark.alone" not in path.read_text()]


@pytest.mark.parametrize("package", SETTINGS["setuptools"]["packages"])
def test_the_fast_tests_reach_every_room(package: str, fast_files: list[Path]) -> None:
    """So that a defect in a room seldom waits for `make test`."""
    assert [path.name for path in fast_files if f"from {package}" in path.read_text()] != []


def test_the_fast_tests_are_fast_and_many(fast_files: list[Path]) -> None:
    """A third of the files, in 30 CPU seconds beside the imports."""
    assert sum(CPU_SECONDS.get(path.relative_to(ROOT).as_posix(), 0.0) for path in fast_files) < 30
    assert len(fast_files) > 60


def test_the_table_of_seconds_names_files_that_exist() -> None:
    assert [name for name in CPU_SECONDS if not (ROOT / name).is_file()] == []
