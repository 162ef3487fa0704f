"""docs/seeds.md is what docs/seeds.toml says, and every place and command that it names exists."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

from havoc_core.cli import parse
from havoc_core.errors import HavocError
from havoc_core.seeds import Section, Statement, load_sections, markdown

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "seeds.toml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    return load_sections(DATA)


@pytest.fixture(scope="module")
def rows(sections: list[Section]) -> list[Statement]:
    return [row for section in sections for row in section.rows]


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Every function, class and assigned name of a module, those of a class behind its name and a dot."""
    return frozenset(_names(ast.parse(path.read_text()), ""))


def _names(holder: ast.Module | ast.ClassDef, prefix: str) -> list[str]:
    found = []
    for node in holder.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found += _names(node, f"{prefix}{node.name}.")
    return found


def problem_of_place(where: str) -> str:
    """What is wrong with a `file` or `file:name`; "" where it exists."""
    file, _, name = where.partition(":")
    if not (ROOT / file).exists():
        return f"no file {file}"
    return f"no {name} in {file}" if name and name not in definitions(ROOT / file) else ""


def problem_of_command(command: str) -> str:
    """What is wrong with a command; "" where it can be typed."""
    program, *words = shlex.split(command)
    match program:
        case "pytest":
            return "; ".join(filter(None, map(problem_of_test, words))) if words else "names no test"
        case "havoc":
            try:
                return "" if parse(words).verb == words[0] else "is another verb"
            except SystemExit:
                return "does not parse"
        case "make":
            return "" if words and set(words) <= TARGETS else f"no target {' '.join(words)}"
        case "python":
            return "" if len(words) == 1 and (ROOT / words[0]).is_file() else "runs no file of ours"
    return f"{program} is none of pytest, havoc, make and python"


def problem_of_test(test: str) -> str:
    file, *names = test.split("::")
    if not Path(file).name.startswith("test_"):
        return f"{file} holds no tests"
    is_test = not names or names[-1].startswith(("test_", "Test"))
    return problem_of_place(":".join([file, ".".join(names)]) if names else file) if is_test else f"{test} is no test"


def test_the_page_is_the_data(sections: list[Section]) -> None:
    """It is not edited by hand: `make seeds` writes it."""
    assert (ROOT / "docs" / "seeds.md").read_text() == markdown(sections), "docs/seeds.md is stale: make seeds"


def test_every_place_exists(rows: list[Statement]) -> None:
    """Each file, and each function or class in it."""
    problems = {(row.line, row.says): problem_of_place(row.where) for row in rows if row.where}
    assert {row: problem for row, problem in problems.items() if problem} == {}


def test_every_command_can_be_typed(rows: list[Statement]) -> None:
    """Tests exist under their names, commands of `havoc` parse, words of `make` are there."""
    problems = {(row.line, row.says): problem_of_command(row.shows) for row in rows if row.shows}
    assert {row: problem for row, problem in problems.items() if problem} == {}


def test_no_statement_is_lost(sections: list[Section], rows: list[Statement]) -> None:
    """An audit of both seeds counted 220; each stands there once, in the order of its seed."""
    assert len(rows) >= 220
    assert len({(section.seed, row.line, row.says) for section in sections for row in section.rows}) == len(rows)
    for seed in ("003", "004"):
        lines = [row.line or 0 for section in sections for row in section.rows if section.seed == seed]
        assert lines == sorted(lines)
        assert lines[0] > 0


def test_departures_are_argued() -> None:
    """Whoever reads why HAVOC departs from the seeds finds the table, and the other way round."""
    assert "(seeds.md)" in (ROOT / "docs" / "departures.md").read_text()
    assert "(departures.md)" in (ROOT / "docs" / "seeds.md").read_text()


@pytest.mark.parametrize(
    "place",
    ["adapt/nowhere.py", "adapt/svf.py:fold_matrices", "adapt/svf.py:SingularValueAdapter.nothing", "adapt/svf.py:os"],
)
def test_a_place_that_does_not_exist_is_found(place: str) -> None:
    """The test of the test."""
    assert problem_of_place(place)


@pytest.mark.parametrize(
    "command",
    [
        "pytest",
        "pytest tests/test_seeds.py::test_nothing",
        "pytest tests/test_seeds.py::problem_of_test",
        "pytest tests/test_model.py::TestLoss::test_nothing",
        "pytest seeds.py",
        "havoc dance",
        "havoc gate --dance",
        "make dance",
        "python dance.py",
        "dance",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(command: str) -> None:
    """The test of the test."""
    assert problem_of_command(command)


GOOD = {"line": 7, "says": "It works.", "state": "works", "where": "adapt/svf.py", "shows": "make check"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shows": ""}, "'It works.' is 'works' without saying where it is and what shows it"),
        ({"where": ""}, "without saying where it is"),
        ({"lacks": "All of it."}, "say what it lacks if, and only if"),
        ({"state": "partly"}, "say what it lacks if, and only if"),
        ({"state": "missing", "shows": "", "where": ""}, "say what it lacks if, and only if"),
        ({"state": "soon"}, "state"),
        ({"line": 0}, "line"),
        ({"liens": 1}, "unknown key"),
    ],
)
def test_a_row_that_is_not_whole_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """A row that loses its command is an error that names the file and the row."""
    file = tmp_path / "seeds.toml"
    row = "\n".join(f"{key} = {value!r}" for key, value in {**GOOD, **changes}.items())
    file.write_text(f'[[sections]]\nseed = "003"\ntitle = "All"\n[[sections.rows]]\n{row}\n')
    with pytest.raises(HavocError, match=re.escape(message)) as refusal:
        load_sections(file)
    assert str(file) in str(refusal.value)


def test_states_are_counted_and_what_is_open_is_listed() -> None:
    """A page of three statements: its counts, its list, its table."""
    missing = Statement(line=9, says="It flies.", state="missing", lacks="No wings.")
    good = Statement.model_validate(GOOD)
    card = Statement(says="A | B.", state="works", where="adapt/svf.py:fold_matrix", shows="make check")
    page = markdown(
        [Section(seed="003", title="All", rows=[good, missing]), Section(seed="card", title="Card", rows=[card])]
    )
    assert "| all | 2 | 0 | 1 | 0 | 0 | 3 |" in page
    assert "### Missing\n\n- 003, line 9: It flies. *No wings.*\n" in page
    assert "### Partly" not in page
    assert "| 9 | It flies. | missing |  |  |" in page
    assert r"|  | A \| B. | works | [`adapt/svf.py:fold_matrix`](../adapt/svf.py) | `make check` |" in page
