"""The page about the house names what is there: every stop of a walk is a file and a name in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = ("track", "model", "adapt", "export", "bench", "cluster")
WALKS = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
STOP = re.compile(r"^\d+\. `([\w/]+\.py)` `([\w.]+)`", re.MULTILINE)


def names(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """What a module or a class defines, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("walk", WALKS, ids=[walk.splitlines()[0] for walk in WALKS])
def test_every_stop_is_there(walk: str) -> None:
    """At most eight stops, each found."""
    stops = STOP.findall(walk)
    assert 5 <= len(stops) == len(re.findall(r"^\d+\. ", walk, re.MULTILINE)) <= 8
    for file, name in stops:
        tree = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            assert part in names(tree), f"{file} has no {name}"
            tree = names(tree)[part]


def test_there_are_five_walks() -> None:
    """As many as the page promises."""
    assert len(WALKS) == 5


def test_the_drawing_names_every_folder_and_only_files_that_exist() -> None:
    """A row a folder; its last column names modules of it."""
    drawing = PAGE.split("```")[1]
    columns = [re.split(r"\s{2,}", line) for line in drawing.splitlines()]
    rows = [(row[0], row[-1]) for row in columns if row[0].partition("/")[0] in ROOMS]
    folders = {str(path.parent.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert {folder for folder, _ in rows} == folders
    assert [
        f"{folder}/{name}"
        for folder, held in rows
        for name in held.split(", ")
        if not (ROOT / folder / f"{name}.py").exists()
    ] == []
