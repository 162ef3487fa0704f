"""A duel ends with the first proven answer, holds its error however often it looks, and speaks by its exit code."""

from __future__ import annotations

import json
import math
import random
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.bench import duel
from havoc_core.bench.duel import FEWEST_BLOCKS, judge_until_proven
from havoc_core.bench.judge.paired import Block, Turn, confidence_at_look, judge_blocks, verdict_of
from havoc_core.bench.report.tables import paired_table
from havoc_core.cli import main

pytestmark = pytest.mark.alone

MARGIN = 0.05


def block(ratio: float, generator: random.Random, *, spread: float = 0.01) -> Block:
    """A pair of processes of which the new one takes `ratio` times as long, each a little its own."""
    own = ratio * (1 + generator.gauss(0, spread))
    old, new = (round(1e6 * factor * (1 + generator.gauss(0, 0.01))) for factor in (1.0, own))
    return Block({"prefill": [(Turn([old], old), Turn([new], new))]})


def outcome(ratio: float, *, seed: int, num_blocks: int = 64, spread: float = 0.01) -> duel.DuelOutcome:
    generator = random.Random(seed)
    blocks = (block(ratio, generator, spread=spread) for _ in range(num_blocks))
    return judge_until_proven(blocks, margin=MARGIN)


@pytest.mark.parametrize(("ratio", "word"), [(1.15, "worse"), (1.0, "equal"), (0.85, "better")])
def test_it_stops_at_the_first_proven_answer(ratio: float, word: str) -> None:
    """Far from the margin a few blocks are enough, and no more are asked for."""
    found = [outcome(ratio, seed=seed) for seed in range(20)]
    assert {one.verdict for one in found} == {word}
    assert all(FEWEST_BLOCKS <= one.num_blocks < 40 for one in found)


def test_at_the_margin_it_looks_until_the_end() -> None:
    """What lies at the margin can be proven on neither side."""
    found = outcome(1 + MARGIN, seed=3, num_blocks=20)
    assert (found.verdict, found.num_blocks) == ("undecided", 20)


def test_few_blocks_prove_nothing() -> None:
    """Fewer blocks than the fewest are no answer, whatever they say; none at all are none."""
    assert outcome(2.0, seed=1, num_blocks=FEWEST_BLOCKS - 1).verdict == "undecided"
    assert judge_until_proven([], margin=MARGIN) == duel.DuelOutcome(verdict="undecided", rows=[], num_blocks=0)


def test_the_text_says_what_the_exit_code_says() -> None:
    """Rows of too few blocks may prove something by themselves, and the duel is undecided all the same."""
    found = outcome(2.0, seed=1, num_blocks=FEWEST_BLOCKS - 1, spread=0.0001)
    assert verdict_of(found.rows) == "worse"
    assert paired_table(found.verdict, found.rows, 0.025).startswith("UNDECIDED: slower by more than 2.5%")


def test_two_blocks_that_tell_after_many_that_do_not() -> None:
    """A bound too far away to write as a number is none, and says nothing."""
    wild = [Block({"prefill": [(Turn([10**6], None), Turn([ns], None))]}) for ns in (10**6, 10**9)]
    silent = [Block({"prefill": [(Turn([10**9], 1), Turn([10**9], None))]})] * 6
    found = judge_until_proven([*silent, *wild], margin=MARGIN)
    assert (found.verdict, found.num_blocks) == ("undecided", 8)
    clock = found.rows[1]
    assert (clock.num_blocks, clock.low, clock.high) == (2, None, None)


def test_looking_again_and_again_proves_nothing_false() -> None:
    """Slower by exactly the margin is called worse at most 1 % of the time; looks that spend nothing do far worse."""
    num_duels = 1000

    def share_worse(*, spends: bool) -> float:
        num_worse = 0
        for seed in range(num_duels):
            generator, seen, word = random.Random(seed), [], "undecided"
            while len(seen) < 24 and word != "worse":
                seen.append(block(1 + MARGIN, generator))
                if len(seen) >= FEWEST_BLOCKS:
                    number = len(seen) - FEWEST_BLOCKS + 1
                    confidence = confidence_at_look(number) if spends else 0.99
                    word = verdict_of(judge_blocks(seen, margin=MARGIN, confidence=confidence))
            num_worse += word == "worse"
        return num_worse / num_duels

    assert share_worse(spends=True) <= 0.01
    assert share_worse(spends=False) > 0.015


def test_all_looks_together_hold() -> None:
    """What the looks may get wrong adds up to less than 1 %, however many there are."""
    spent = sum(1 - confidence_at_look(number, 0.99) for number in range(1, 10_000))
    assert 0.0099 < spent < 0.01


def test_loads_that_are_held_up_now_and_then() -> None:
    """One load in ten takes twice as long: a side with itself is worse at most 1 % of the time, 30 % more is found."""

    def told(load: float, generator: random.Random) -> Block:
        def held(of: float) -> float:
            return of * math.exp(generator.gauss(0, 0.03)) * (2.0 if generator.random() < 0.1 else 1.0)

        found = block(1.0, generator)
        turns = found.turns["prefill"]
        once = {"load": (held(5e8), held(5e8 * load)), "peak memory": (4e8, 4e8 * math.exp(generator.gauss(0, 0.002)))}
        return Block({"prefill": turns, "decode step": turns}, once)

    def words(load: float, num: int) -> list[str]:
        found = []
        for seed in range(num):
            generator = random.Random(seed)
            blocks = (told(load, generator) for _ in range(24))
            found.append(judge_until_proven(blocks, margin=MARGIN, on=("latency", "memory", "load")).verdict)
        return found

    assert words(1.0, 300).count("worse") <= 3
    assert words(2.0, 40).count("worse") >= 38


def test_beside_neighbours() -> None:
    """On simulated machines with load that comes and goes a side with itself is never worse, and 30 % are found."""
    simulated = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("simulated_pairs.py"))))

    def judge(blocks: list[Block]) -> str:
        return judge_until_proven(blocks, margin=simulated.MARGIN).verdict

    same = simulated.verdicts(60, seed=5, prefill=1.0, step=1.0, judge=judge)
    slow = simulated.verdicts(60, seed=6, prefill=1.0, step=1.3, judge=judge)
    assert same["worse"] == 0
    assert slow["worse"] >= 50


def test_an_artifact_against_itself(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: a wide margin is soon proven, the document says so, and that both are the same."""
    options = "--prompt-tokens 16 --decode-tokens 8 --margin 1 --max-time 60 --json --quiet".split()
    code = main(["duel", str(tiny_artifact), str(tiny_artifact), *options])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["verdict"], found["exit_code"]) == (0, "equal", 0)
    assert found["num_blocks"] >= FEWEST_BLOCKS
    assert "same artifact or model" in found["notes"][0]
    assert {row["quantity"] for row in found["rows"] if row["decides"]} == {"prefill", "decode step"}
    shown = {row["quantity"]: row for row in found["rows"] if not row["decides"]}
    assert set(shown) == {"time to first token", "load", "peak memory"}
    assert shown["peak memory"]["unit"] == "MB"
    assert all(
        row["num_blocks"] == found["num_blocks"] for row in shown.values() if row["quantity"] != "time to first token"
    )
    assert found["on"] == ["latency"]


@pytest.mark.parametrize(("word", "code"), [("worse", 1), ("better", 0), ("equal", 0), ("undecided", 3)])
def test_the_exit_code_is_the_answer(
    word: str, code: int, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script reads the answer from the exit code."""
    monkeypatch.setattr(duel, "duel", lambda *_, **__: duel.DuelOutcome(verdict=word, rows=[], num_blocks=9))
    assert (
        main(["duel", str(tiny_artifact), str(tiny_artifact), "--decode-tokens", "4", "--prompt-tokens", "4"]) == code
    )
    assert ("are not enough" in capsys.readouterr().out) == (word == "undecided")


def test_answers_are_compared_row_by_row(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides answer the same rows; an artifact against itself differs in none, and too few rows prove nothing."""
    proven = duel.DuelOutcome(verdict="equal", rows=[], num_blocks=9)
    monkeypatch.setattr(duel, "duel", lambda *_, **__: proven)
    words = [
        "duel",
        str(tiny_artifact),
        str(tiny_artifact),
        "--task",
        "math",
        "--n",
        "12",
        "--decode-tokens",
        "4",
        "--quiet",
    ]
    assert main([*words, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    (row,) = found["accuracy"]
    assert (found["verdict"], row["task"], row["num_rows"], row["p_value"]) == ("undecided", "math", 12, 1.0)
    assert (row["num_old_only"], row["num_new_only"], row["difference"]) == (0, 0, 0.0)
    assert row["old_right"] == row["new_right"]
    assert len(row["old_right"]) == 12
    assert main([*words, "--accuracy-margin", "0.9"]) == 0
    assert "12 rows" in capsys.readouterr().out


def test_bad_requests_are_one_line(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No artifact, a changed byte, a context that is too short, a margin of 0: before anything is measured."""
    changed = Path(shutil.copytree(tiny_artifact, tmp_path / "changed"))
    with (changed / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for words, code, said in (
        ([str(tiny_artifact), str(tmp_path)], 2, "no manifest.json"),
        ([str(tiny_artifact), str(changed)], 5, "model.onnx"),
        ([str(tiny_artifact), str(tiny_artifact), "--prompt-tokens", "100000"], 2, "need a context of 100128"),
        ([str(tiny_artifact), str(tiny_artifact), "--margin", "0"], 2, "a margin of 0"),
        ([str(tiny_artifact), "http://127.0.0.1:9", "--on", "memory"], 2, "does not report memory"),
        ([str(tiny_artifact), "http://127.0.0.1:9", "--task", "math"], 2, "only answers of artifacts are scored"),
        ([str(tiny_artifact), str(tiny_artifact), "--n", "5"], 2, "give --task"),
    ):
        assert main(["duel", *words]) == code, words
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
