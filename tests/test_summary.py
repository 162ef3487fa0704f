"""What a verb prints for a person: the line to run next must be one that runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from havoc_core.cli import main, parse
from havoc_core.config import Recipe
from havoc_core.export.commands import _structure
from havoc_core.model.structure import Structure
from havoc_core.summary import export_command, show_run

if TYPE_CHECKING:
    from havoc_core.adapt.search import SearchResult


@pytest.mark.parametrize("name", ["fp32", "int8", "int4a-hqq-b64", "int4a-k_quant", "int8-r0.40"])
def test_the_next_line_exports_what_was_chosen(name: str) -> None:
    """It parses to the very structure, and its weights stand in the order in which export reads the experts."""
    candidate = SimpleNamespace(alpha=(0.5, 1.2), structure=Structure.named(name))
    result = cast("SearchResult", cast("Any", SimpleNamespace(chosen=SimpleNamespace(candidate=candidate))))
    recipe = Recipe.model_validate({"experts": {"domains": ["code", "math"]}, "search": {"rule": "renorm"}})
    line = export_command(result, recipe, ["code", "math"], base="my base", experts=Path("experts"))
    args = parse(shlex.split(line)[1:])
    assert (args.base, args.experts, args.rule) == ("my base", Path("experts"), "renorm")
    assert args.alpha == (1.2, 0.5)
    assert _structure(args) == candidate.structure


def test_search_wants_its_experts_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without the recipe's experts is one line (exit 2), and nothing is written."""
    (tmp_path / "z_vectors_math.safetensors").touch()
    words = ["search", "nano", "--experts", str(tmp_path), "--target", "host", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "for code, reasoning, vision" in err
    assert not (tmp_path / "out").exists()


def test_nothing_that_was_read_styles_or_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target's path and a judgement's reason come out as they are, brackets and all, without control characters."""
    score = {"num_right": 1, "num_rows": 2, "low": 0.1, "high": 0.9}
    rows = [{"name": "mixture", "kind": "mixture", "accuracy": {"math": score}}]
    (tmp_path / "scores.json").write_text(json.dumps({"split": "gate", "rows": rows, "paired": []}))
    judgement = SimpleNamespace(lines=(), verdict="invalid", exit_code=4, reason="device [/red] [bold]X[/] \x1b[31m")
    judged = [("my[red]/own.toml", cast("Any", judgement))]
    show_run(tmp_path, judged, as_json=False)
    out = capsys.readouterr().out
    assert "my[red]/own.toml: invalid (exit 4) device [/red] [bold]X[/] \ufffd[31m" in out
    assert "\x1b" not in out
