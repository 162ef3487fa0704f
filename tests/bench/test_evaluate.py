"""`havoc eval` scores the rows and the lengths it is told, so that a recipe's scores can be repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.sources import rows, rows_hash
from havoc_core.bench import evaluate as room
from havoc_core.cli import main, parse
from havoc_core.config import Recipe
from havoc_core.export.package import export_artifact


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["eval", *map(str, words), "--n", "6", "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)["accuracy"]["math"]


def test_defaults_are_the_recipes() -> None:
    """Without options it is the recipe's own seed and completion length that count."""
    args, recipe = parse(["eval", "nano"]), Recipe()
    assert (args.seed, args.max_new_tokens) == (recipe.data.seed, recipe.experts.max_new_tokens)


def test_base_and_artifact_are_asked_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed is other rows, with torch here and in the artifact's child; two tokens are too few to be right."""
    seen = []
    monkeypatch.setattr("havoc_core.adapt.tasks.sources.rows", lambda *words, **more: keep(rows(*words, **more)))

    def keep(found: list) -> list:
        seen.append(rows_hash(found))
        return found

    words = ("--domain", "math", "--seed", 3)
    base = evaluated(capsys, "nano", *words)
    assert seen == [rows_hash(rows("math", "gate", 6, seed=3))] != [rows_hash(rows("math", "gate", 6))]
    artifact = export_artifact("nano", tmp_path / "a")
    assert evaluated(capsys, artifact, *words) == base
    assert base["num_right"] > 0
    for model in ("nano", artifact):
        assert evaluated(capsys, model, *words, "--max-new-tokens", 2)["num_right"] == 0
    run = room.run_accuracy(artifact, Scoring(tasks=("math",), num_rows=6, seed=3))
    assert run.tasks["math"].rows_sha256 == seen[0]
