"""Two passes from the command line: what is chosen is said, what is compared is shown, what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from havoc_core.adapt import dispatch, dispatch_table
from havoc_core.adapt.dispatch import open_chooser, open_mixtures
from havoc_core.adapt.tasks.sources import rows
from havoc_core.adapt.tasks.task import Prompt, load_task
from havoc_core.arguments import WAYS
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT

PROMPT = load_task("math").prompt(rows("math", "gate", 1)[0]).text
GENERATE = ["generate", "nano", "--prompt", PROMPT, "--max-new-tokens", "8"]
FEW = ["--examples", "2", "--population", "4", "--generations", "1"]


def test_the_command_line_knows_every_way() -> None:
    """It lists them without loading torch."""
    assert WAYS == dispatch.WAYS


def test_generate_answers_with_what_the_first_pass_chose(
    small_experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The expert stands on stderr and in the document, with the time of each pass; stdout holds the answer."""
    words = [*GENERATE, "--experts", str(small_experts), "--dispatch", "prompt"]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    (chosen,) = [name for name, weight in document["alpha"].items() if weight]
    assert document["alpha"] == {**dict.fromkeys(document["alpha"], 0.0), chosen: 1.0}
    assert said.err == f"note: prompt chose {chosen} 1\n"
    assert document["first_pass_ms"] > 0
    assert document["second_pass_ms"] > 0
    base = load_base("nano")
    mixtures, basis = open_mixtures(base, small_experts, SILENT)
    with mixtures:
        (place,) = open_chooser("prompt", mixtures, small_experts, basis).places([Prompt(PROMPT)])
        assert mixtures.names[place] == chosen
    assert main(words) == 0
    assert capsys.readouterr().out == document["completion"] + "\n"


def test_generate_finds_a_mixture_on_solved_rows(
    small_experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the task's train split or of a file; the same seed is the same mixture, and a leak ends in 2."""
    words = [*GENERATE, "--experts", str(small_experts), "--dispatch", "few-shot", "--task", "math", *FEW]
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["alpha"]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows("math", "train", 2)))
    assert main([*words, "--examples-from", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alpha"] == first
    with file.open("a") as more:
        more.write(json.dumps(rows("math", "gate", 1)[0]) + "\n")
    assert main([*words, "--examples-from", str(file)]) == 2
    said = capsys.readouterr()
    assert "1 of 3 rows are rows of math's gate" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_eval_shows_every_system(
    small_experts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each with its interval, the confusion of the first pass and its cost; and the same as JSON."""
    monkeypatch.setattr(dispatch_table, "_SELECTION_ROWS", 2)
    words = ["eval", "nano", "--experts", str(small_experts), "--dispatch", "prompt,few-shot", *FEW, "--quiet"]
    words += ["--task", "math", "--task", "code", "--n", "3", "--max-new-tokens", "8"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for system in ("base", "best single expert", "fixed mixture", "prompt", "few-shot", "oracle"):
        assert f"\n{system} " in said
    for heading in (
        "mixed",
        "only it right",
        "prompt: rows of",
        "to reasoning",
        "first pass per row",
        "mixtures tried",
    ):
        assert heading in said
    assert "not a measurement" in said
    assert main([*words, "--alpha", "math=1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["selection"]["fixed_mixture"] == {"math": 1.0, "code": 0.0, "reasoning": 0.0}
    assert document["model"] == "nano"


def test_experts_alone_are_compared_without_a_first_pass(
    small_experts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, best single expert, fixed mixture and oracle."""
    monkeypatch.setattr(dispatch_table, "_SELECTION_ROWS", 1)
    words = ["eval", "nano", "--experts", str(small_experts), "--task", "math", "--n", "1", "--max-new-tokens", "2"]
    assert main([*words, "--quiet", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["systems"]) == ["base", "best single expert", "fixed mixture", "oracle"]
    assert document["first_pass"] == document["few_shot"] == {}


def test_mixed_pools_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Of any model: the counts of its tasks together, with their interval."""
    words = ["eval", "nano", "--mixed", "--task", "math", "--task", "code", "--n", "4", "--quiet"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    counts = document["accuracy"].values()
    assert document["mixed"]["num_rows"] == 8
    assert document["mixed"]["num_right"] == sum(row["num_right"] for row in counts)
    assert main(words) == 0
    assert "all rows of all tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["eval", "nano", "--dispatch", "prompt"], "give --experts DIR"),
        (["eval", "nano", "--dispatch", "promt", "--experts", "DIR"], "did you mean prompt?"),
        (["eval", "nano", "--alpha", "math=1"], "--alpha mixes the experts of a live artifact"),
        (["eval", "nano", "--examples", "3"], "--examples has no effect without --experts DIR"),
        (
            ["eval", "nano", "--dispatch", "prompt", "--experts", "DIR", "--examples", "3"],
            "without --dispatch few-shot",
        ),
        (["eval", "nano", "--dispatch", "prompt", "--experts", "nowhere"], "--experts nowhere: no such directory"),
        (["eval", "nano", "--dispatch", "few-shot", "--experts", "DIR", "--alpha-bounds", "1"], "0,1"),
        (["eval", "nano", "--dispatch", "few-shot", "--experts", "DIR", "--elite-share", "0"], "an elite share of 0"),
        (["eval", "ARTIFACT", "--dispatch", "prompt", "--experts", "DIR"], "an artifact holds one mixture"),
        ([*GENERATE, "--dispatch", "prompt"], "give --experts DIR"),
        ([*GENERATE, "--experts", "DIR"], "--dispatch prompt, classifier or few-shot"),
        ([*GENERATE, "--task", "math"], "--task has no effect without --experts DIR"),
        ([*GENERATE, "--online"], "--online has no effect without --experts DIR"),
        ([*GENERATE, "--experts", "DIR", "--dispatch", "few-shot"], "needs --task NAME"),
        ([*GENERATE, "--experts", "DIR", "--dispatch", "prompt", "--task", "math"], "leave --task out"),
        ([*GENERATE, "--experts", "DIR", "--dispatch", "classifier"], "havoc train BASE --classifier"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], complaint: str, small_experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "manifest.json").write_text("{}")
    places = {"DIR": str(small_experts), "ARTIFACT": str(artifact)}
    with_exit = main([places.get(word, word) for word in words])
    said = capsys.readouterr()
    assert (with_exit, said.out) == (2, "")
    assert complaint in said.err
    assert said.err.count("\n") == 1


def test_experts_that_cannot_be_chosen_from_are_refused(small_experts: Path, tmp_path: Path) -> None:
    """One expert alone; and few-shot, which reads no prompt."""
    for name in ("basis.safetensors", "z_vectors_math.safetensors"):
        shutil.copy(small_experts / name, tmp_path / name)
    mixtures, basis = open_mixtures(load_base("nano"), tmp_path, SILENT)
    with mixtures:
        with pytest.raises(HavocError, match="at least 2 experts; found math"):
            open_chooser("prompt", mixtures, tmp_path, basis)
        with pytest.raises(HavocError, match="reads solved examples"):
            open_chooser("few-shot", mixtures, tmp_path, basis)
