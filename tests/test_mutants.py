"""The runner of `make mutants` finds what its tests do not see, and its page is what was found."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
mutation = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "mutation.py")))
mutants = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "mutants.py")))
SOURCE = '''
"""A module."""
LIMIT = 3

def is_far(distance: int) -> bool:
    """Whether it is."""
    note()
    if distance < 0 and not LIMIT:
        return False
    return -distance + 0.5 > LIMIT * 2
'''


def test_every_kind_of_change_is_made_and_taken_back() -> None:
    """Each mutant differs from the source in one place and from all others; afterwards the source is as it was."""
    tree = ast.parse(SOURCE)
    before = ast.unparse(tree)
    found = {name: ast.unparse(tree) for name in mutation.mutants(tree)}
    assert ast.unparse(tree) == before
    assert before not in found.values()
    assert len(set(found.values())) == len(found)
    assert {name.removeprefix("is_far: ").partition(":")[0] for name in found} == {
        "dropped",
        "if -> True",
        "if -> False",
        "And -> Or",
        "drop not",
        "drop minus",
        "Lt -> LtE",
        "Lt -> GtE",
        "Gt -> GtE",
        "Gt -> LtE",
        "Add -> Sub",
        "Mult -> Div",
        "False -> True",
        "0 + 1",
        "0.5 + 1",
        "2 + 1",
    }


def test_the_table_names_what_there_is() -> None:
    """Modules and tests exist."""
    for module, entry in mutants.read_table().items():
        assert (ROOT / module).is_file(), module
        for test in entry["tests"]:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), test
            assert not name or f"def {name}(" in (ROOT / file).read_text(), test


def test_a_draw_is_part_of_every_larger_one() -> None:
    """So what was found of a few counts when more are tried."""
    small, large = ({m.name for m in mutants.mutants_of(ROOT / "bounds.py", most=number)} for number in (20, 60))
    assert (len(small), len(large)) == (20, 60)
    assert small < large


def test_the_page_is_what_was_found() -> None:
    """docs/mutants.md is written from reports/mutants.json and the reasons, and nothing in it is red."""
    figures, table = json.loads(mutants.FIGURES.read_text()), mutants.read_table()
    assert mutants.PAGE.read_text() == mutants.page_of(figures, table)
    reasons = {module: entry.get("survivors", {}) for module, entry in table.items()}
    assert [said for module in figures for said in mutants.complaints(module, figures[module], reasons[module])] == []


@pytest.mark.parametrize(
    ("change", "word"),
    [({"killed": 8, "survivors": ["a", "b"]}, "8 of 10 killed"), ({"survivors": ["c"]}, "no reason for c")],
)
def test_what_is_red(change: dict[str, object], word: str) -> None:
    """Too many survivors, and one without a reason."""
    found = {"mutants": 10, "tried": 10, "killed": 9, "by_time": 0, "survivors": ["a"]}
    assert mutants.complaints("m.py", found, {"a": "why"}) == []
    assert any(word in said for said in mutants.complaints("m.py", found | change, {"a": "why"}))


def test_a_reason_does_not_outlive_its_line() -> None:
    """What was written for a line that changed is told."""
    there = next(mutation.mutants(ast.parse((ROOT / "bounds.py").read_text())))
    (said,) = mutants.idle_reasons("bounds.py", [there, "gone: 0 + 1: x = 0"])
    assert said.endswith("gone: 0 + 1: x = 0")


LIBRARY = "def is_far(distance):\n    return distance > 3 and distance != 7\n"
SEES_ALL = (
    "from havoc_core.far import is_far\n\ndef test_far():\n    assert list(map(is_far, (3, 4, 7))) == [0, 1, 0]\n"
)
SEES_LITTLE = "from havoc_core.far import is_far\n\ndef test_far():\n    assert is_far(9)\n"


@pytest.mark.parametrize(("test", "sees_all"), [(SEES_ALL, True), (SEES_LITTLE, False)], ids=["all", "little"])
def test_the_runner_tells_tests_that_see_from_tests_that_do_not(tmp_path: Path, test: str, *, sees_all: bool) -> None:
    """In a checkout of one module: every mutant dies under tests that know it, many live under one that does not."""
    root = tmp_path / "checkout"
    for name in ("mutants.py", "mutation.py"):
        (root / "tests").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, root / "tests" / name)
    for folder in ("reports", "docs"):
        (root / folder).mkdir()
    (root / "__init__.py").touch()
    (root / "far.py").write_text(LIBRARY)
    (root / "tests" / "test_far.py").write_text(test)
    (root / "pyproject.toml").write_text('[tool.pytest]\naddopts = ["--import-mode=importlib"]\n')
    (root / "tests" / "mutants.toml").write_text('["far.py"]\ntests = ["tests/test_far.py"]\n')
    command = [sys.executable, root / "tests" / "mutants.py", "--preload", "json", "."]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads((root / "reports" / "mutants.json").read_text())["far.py"]
    assert found["tried"] == found["mutants"] == 6
    assert done.returncode == (found["killed"] < 6), done.stdout + done.stderr
    assert (found["killed"] == 6) == sees_all
    assert len(found["survivors"]) == 6 - found["killed"]
    assert (root / "far.py").read_text() == LIBRARY
