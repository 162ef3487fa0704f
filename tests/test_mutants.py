"""The runner of `make mutants` finds what its tests do not see, and its page is what was found."""

from __future__ import annotations

import ast
import json
import runpy
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
    [
        ({"killed": 8, "survivors": ["a", "b"]}, "8 of 10 killed"),
        ({"survivors": ["c"]}, "no reason for c"),
        ({"killed": 10, "survivors": []}, "no survivor a"),
    ],
)
def test_what_is_red(change: dict[str, object], word: str) -> None:
    """Too many survivors, one without a reason, and a reason without its survivor."""
    found = {"mutants": 10, "tried": 10, "killed": 9, "by_time": 0, "survivors": ["a"]}
    assert mutants.complaints("m.py", found, {"a": "why"}) == []
    assert any(word in said for said in mutants.complaints("m.py", found | change, {"a": "why"}))
