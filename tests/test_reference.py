"""docs/reference.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from havoc_core.adapt.tasks.definition import Definition
from havoc_core.bench.judge.record import Record
from havoc_core.bench.judge.targets import Target
from havoc_core.bench.report.phase6 import Phase6
from havoc_core.config import Recipe
from havoc_core.reference import markdown

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def test_the_page_is_the_codes() -> None:
    """It is not edited by hand: `make reference` writes it."""
    assert PAGE.read_text() == markdown(), "docs/reference.md is stale: make reference"


@pytest.mark.parametrize("model", [Recipe, Target, Definition, Record, Phase6])
def test_every_part_has_one_table(model: type[BaseModel]) -> None:
    """A part that is met twice is explained once, and every link finds its heading."""
    page = PAGE.read_text()
    parts = [name for name, part in model.model_json_schema()["$defs"].items() if "properties" in part]
    assert parts
    for name in parts:
        assert len(re.findall(rf"^### {name}$", page, re.MULTILINE)) == 1, name
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\(#(\w+)\)", page)) <= headings


def test_rows_of_tables_have_as_many_cells_as_their_head() -> None:
    """A bar inside a cell would shift the rest of the row."""
    widths: list[int] = []
    num_tables = 0
    for line in [*PAGE.read_text().splitlines(), ""]:
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1
            widths.clear()
            num_tables += 1
    assert num_tables > 10
