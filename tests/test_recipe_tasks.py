"""What a recipe says of tasks is checked before any work: names, pictures, rows, and what the targets pin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from havoc_core.config import Recipe, load_recipe, recipe_toml
from havoc_core.errors import HavocError
from havoc_core.measuring import recipe_tasks
from havoc_core.pipeline import require_inputs, require_rows

TASK = """
kind = "choice"
metric = "acc"
[data]
path = "rows.jsonl"
problem = ["q"]
[prompt]
template = "{{ q }}"
[choice]
choices = "options"
label = "right"
"""
TARGET = """
[mine]
title = "mine"
[mine.device]
kind = "cpu"
is_this_machine = true
[[mine.limits]]
metric = "accuracy/sums"
above = 50
unit = "%"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"q": f"{n} + 1?", "options": [str(n), str(n + 1)], "right": 1} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.toml").write_text(TASK)
    (tmp_path / "target.toml").write_text(TARGET)
    return tmp_path


def recipe(folder: Path, *tasks: str, num_search_rows: int = 10) -> Recipe:
    return Recipe.model_validate(
        {
            "experts": {"tasks": list(tasks), "num_validation_rows": 10},
            "search": {"num_rows": num_search_rows},
            "gate": {"targets": [str(folder / "target.toml")], "num_rows": 10},
        }
    )


def test_any_number_of_tasks_of_any_name(folder: Path) -> None:
    """One's own beside a bundled one, or alone; an older recipe's `domains` means the same."""
    own = str(folder / "sums.toml")
    for names in ([own], ["math", own], ["reasoning"]):
        made = recipe(folder, *names)
        assert [task.name for task in recipe_tasks(made)] == ["sums" if name == own else name for name in names]
        (folder / "saved.toml").write_text(recipe_toml(made))
        assert load_recipe(folder / "saved.toml") == made
    older = Recipe.model_validate({"experts": {"domains": ["code", "math"]}})
    assert older == Recipe.model_validate({"experts": {"tasks": ["code", "math"]}})
    require_inputs(recipe(folder, "math", own))
    require_rows(recipe(folder, "math", own))


def test_two_tasks_of_one_name_are_refused(folder: Path) -> None:
    """Their experts would lie in one file."""
    (folder / "other").mkdir()
    (folder / "other" / "sums.toml").write_text(TASK)
    with pytest.raises(HavocError, match="two tasks have the name sums"):
        recipe_tasks(recipe(folder, str(folder / "sums.toml"), str(folder / "other" / "sums.toml")))


def test_too_few_rows_are_told_first(folder: Path) -> None:
    """With the number there are, for the split that lacks them; so is a row that nobody could be asked."""
    own = str(folder / "sums.toml")
    with pytest.raises(HavocError, match=r"sums: rows.jsonl .*\d\d rows for the search .*310"):
        require_rows(recipe(folder, own, num_search_rows=150))
    rows = [{"q": f"{n} + 1?", "options": ["1", None], "right": 0} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(HavocError, match=r"rows.jsonl, row \d: the choices are \['1', None\]"):
        require_rows(recipe(folder, own))


def test_a_limit_on_another_task_is_refused(folder: Path) -> None:
    """A target that limits a task which this recipe does not score, and nobody knows."""
    with pytest.raises(HavocError, match="accuracy/sums"):
        require_inputs(recipe(folder, "math"))


@pytest.mark.parametrize(
    ("pin", "said"), [("data_sha256", "pinned to data 0000"), ("task_sha256", "pinned to another task file")]
)
def test_what_a_target_pins_is_checked_first(folder: Path, pin: str, said: str) -> None:
    """Other data, or another task file, than the target wants its record to be of."""
    (folder / "target.toml").write_text(f'{TARGET}{pin} = "{"0" * 64}"\n')
    with pytest.raises(HavocError, match=said):
        require_inputs(recipe(folder, str(folder / "sums.toml")))
