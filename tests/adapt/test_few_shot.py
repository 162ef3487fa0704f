"""Few-shot dispatch reads solved rows that are never the gate's, and finds the same alpha for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from havoc_core.adapt.alpha_search import CrossEntropySettings
from havoc_core.adapt.dispatch import open_mixtures
from havoc_core.adapt.few_shot import find_alpha, mean_log_likelihood, solved_examples
from havoc_core.adapt.next_token import reference_of
from havoc_core.adapt.tasks.evaluation import score
from havoc_core.adapt.tasks.sources import gate_rows_among, problem_hash, rows, split_of
from havoc_core.adapt.tasks.task import Task, load_task
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import Base
from havoc_core.progress import SILENT

MATH = load_task("math")
FEW = CrossEntropySettings(population=6, generations=1)
PARTS = ("train", "validation", "test")


def written(path: Path, some_rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some_rows))
    return path


def test_examples_are_train_rows() -> None:
    """Where no file is given: the first of the train split."""
    found = solved_examples(MATH, 10)
    assert found == rows(MATH, "train", 10)
    assert {split_of(problem_hash(row, MATH)) for row in found} == {"train"}


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    """Its first rows, as many as are asked for."""
    some = rows(MATH, "train", 4, seed=9)
    assert solved_examples(MATH, 3, path=written(tmp_path / "own.jsonl", some)) == some[:3]


def test_a_file_with_gate_rows_is_refused(tmp_path: Path) -> None:
    """However few, and even behind those that would be read: one line with the count."""
    leaking = [*rows(MATH, "train", 3), *rows(MATH, "gate", 2, seed=5)]
    with pytest.raises(HavocError, match=r"2 of 5 rows are rows of math's gate") as caught:
        solved_examples(MATH, 3, path=written(tmp_path / "leak.jsonl", leaking))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_gate_rows_of_a_data_set_are_known_too(tmp_path: Path) -> None:
    """By what may stand in one split only, whatever the row's answer says."""
    (tmp_path / "task.toml").write_text(
        'kind = "generate"\nmetric = "text"\n'
        '[data]\npath = "data"\nproblem = ["question"]\n'
        '[prompt]\ntemplate = "{{ question }} "\n'
        '[generate]\nanswer = "{{ answer }}"\n[[generate.metrics]]\nname = "text"\nis_whole_without = true\n'
    )
    (tmp_path / "data").mkdir()
    parts = {part: [{"question": f"{part} {place}?", "answer": "yes"} for place in range(4)] for part in PARTS}
    for part, some in parts.items():
        written(tmp_path / "data" / f"{part}.jsonl", some)
    task = load_task(tmp_path / "task.toml")
    reworded = {**parts["test"][1], "answer": "no"}
    assert gate_rows_among(task, [*parts["train"], reworded]) == 1
    assert gate_rows_among(task, [*parts["train"], *parts["validation"]]) == 0


def test_a_file_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    """Too few rows, a row that lacks a column, a file that is not there: each in one line."""
    two = rows(MATH, "train", 2)
    with pytest.raises(HavocError, match="holds 2 rows, but --examples asks for 5"):
        solved_examples(MATH, 5, path=written(tmp_path / "two.jsonl", two))
    with pytest.raises(HavocError, match="bad.jsonl"):
        solved_examples(MATH, 1, path=written(tmp_path / "bad.jsonl", [{"question": "what?"}]))
    with pytest.raises(HavocError, match=r"none\.jsonl: no such file"):
        solved_examples(MATH, 1, path=tmp_path / "none.jsonl")


@torch.no_grad()
def test_the_tie_breaker_is_the_likelihood_of_a_right_answer(base: Base) -> None:
    """Nats a token of the reference and its end, mean over the rows, as one plain pass for each row gives it."""
    references = [reference_of(base, MATH, row) for row in rows(MATH, "train", 5)]
    expected = []
    for reference in references:
        (answer,) = reference.branches
        ids = torch.tensor([[*reference.prompt_ids, *answer]])
        log_p_TV = base.model(ids)[0].log_softmax(dim=-1)[len(reference.prompt_ids) - 1 : -1]
        expected.append(log_p_TV[range(len(answer)), answer].mean().item())
    assert mean_log_likelihood(base, references) == pytest.approx(sum(expected) / 5, abs=1e-5)


@pytest.mark.parametrize("task", [MATH, load_task("vision")], ids=lambda task: task.name)
def test_the_alpha_found_is_reproducible_and_no_worse_than_any_alone(
    base: Base, small_experts: Path, task: Task
) -> None:
    """On its own examples; pictures are read as well as text. The same seed gives the same alpha."""
    examples = solved_examples(task, 2)
    mixtures, _ = open_mixtures(base, small_experts, SILENT)
    with mixtures:
        found, again = (find_alpha(mixtures, task, examples, settings=FEW, max_new_tokens=24) for _ in range(2))
        assert found == again
        for place in (None, 0, 1, 2):
            right = score(mixtures.scorer(mixtures.only(place)), task, examples, max_new_tokens=24).right
            assert found.fitness[0] >= sum(right) / 2
