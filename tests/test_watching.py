"""A run is watched from another terminal by what it writes, and nothing of it is touched."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core import run_stages as stages
from havoc_core import watching
from havoc_core.adapt.pace import Pace
from havoc_core.adapt.search import search
from havoc_core.cli import main
from havoc_core.config import Recipe, recipe_toml
from havoc_core.run_stages import StagedProgress, left_after, stage_of
from havoc_core.storage import Journal, write_json

searches = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "adapt" / "test_search.py")))
RECIPE = Recipe.model_validate({"experts": {"tasks": ["math", "code"]}, "search": {"num_rows": 100}})
PACE = Pace(cost_s=40.0, num_costs=4, sample_s=30.0, num_samples=10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search alone, finished but for `front.json`."""
    out = tmp_path_factory.mktemp("search")
    settings = dataclasses.replace(searches.SETTINGS, population=4, generations=3)
    search(searches.KnownLandscape(), settings=settings, journal_path=out / "search" / "journal.jsonl")
    write_json(out / "search" / "pace.json", dataclasses.asdict(PACE))
    return out


@pytest.fixture
def running(whole: Path, tmp_path: Path) -> Path:
    """A search in the middle of its second generation, with a half-written last line."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "search" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:15]) + lines[15][:40])
    return out


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_once(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure the issue asks for, in words and as one JSON document; the folder is as before."""
    before = contents(running)
    assert main(["watch", str(running), "--once"]) == 0
    shown = capsys.readouterr().out
    for words in ("not finished", "generation: 2 of 3", "front: ", "hypervolume: ", "best feasible: "):
        assert words in shown
    assert "evaluations a minute: 20\n" in shown
    assert "evaluated: 6 of 12" in shown
    assert "time left: 27.0 s" in shown  # 6 candidates and 3 finalists, 3 s each
    assert main(["watch", str(running), "--once", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["is_finished"], document["stage"]) == ("search", False, None)
    assert document["search"]["num_evaluated"] == 6
    assert document["search"]["left_s"] == 27.0
    assert contents(running) == before


def test_lines_until_it_is_finished(running: Path, whole: Path) -> None:
    """Without a terminal: a line whenever something changed, and an end when the search has ended."""
    command = [sys.executable, "-m", "havoc_core", "watch", str(running), "--every", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        data = (whole / "search" / "journal.jsonl").read_bytes()
        (running / "search" / "journal.jsonl").write_bytes(data)
        second = child.stdout.readline()
        write_json(running / "front.json", {})
        rest = child.stdout.read()
        assert child.wait(timeout=30) == 0
    assert "evaluated 6 of 12" in first
    assert "evaluated 12 of 12" in second
    assert "this search is finished" in rest
    assert rest.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no script(1)")
def test_a_terminal_gets_a_table(running: Path) -> None:
    """The same figures under one another, drawn once here because the search is finished."""
    if shutil.which("script") is None:
        pytest.skip("no script(1) on this machine")
    write_json(running / "front.json", {})
    line = f"{sys.executable} -m havoc_core watch {running}"
    shown = subprocess.run(["script", "-qec", line, "/dev/null"], capture_output=True, text=True, timeout=60).stdout
    assert "this search is finished" in " ".join(shown.split())  # a long path wraps
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()]
    assert ["generation", "2", "of", "3"] in rows
    assert ["evaluations", "a", "minute", "20"] in rows
    assert ["time", "left", "27.0", "s"] in rows


@pytest.mark.parametrize(("name", "words"), [("none", "no such folder"), ("empty", "has no run and no search")])
def test_a_folder_without_a_run(tmp_path: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit 2."""
    (tmp_path / "empty").mkdir()
    assert main(["watch", str(tmp_path / name), "--once"]) == 2
    assert words in capsys.readouterr().err


def test_report_of_a_running_search(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal so far, said to be unfinished, with the front; nothing is written where another process writes."""
    before = contents(running)
    assert main(["report", str(running)]) == 0
    shown = capsys.readouterr().out
    assert "this search is not finished" in shown
    assert "| structure | alpha math | alpha code | math | code | prefill_ms |" in shown
    assert main(["report", str(running), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["is_finished"] is False
    assert len(document["front"]) == document["search"]["front_size"] > 0
    assert shown.count("\n| fp32-") + shown.count("\n| int") == len(document["front"])
    first = document["front"][0]
    shares = [f"{100 * first['search_accuracy'][name]:.1f} %" for name in ("math", "code")]  # as the head has them
    assert shares[0] != shares[1]
    assert f"| {first['structure']} | {first['alpha'][0]:g} | {first['alpha'][1]:g} | {' | '.join(shares)} |" in shown
    assert contents(running) == before
    assert main(["report", str(running), "--target", "host"]) == 2
    assert "have nothing to judge" in capsys.readouterr().err


def test_a_search_that_has_just_begun(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its opening line half-written: no figures yet, and no error of whoever watches; a report says to ask again."""
    path = running / "search" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:100])
    assert main(["watch", str(running), "--once"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["report", str(running)]) == 2
    assert "has written nothing yet" in capsys.readouterr().err


def test_a_journal_is_watched_while_it_is_written(whole: Path, tmp_path: Path) -> None:
    """A writer appends in pieces as small as they come; a reader beside it never fails and never goes back."""
    out = tmp_path / "out"
    (out / "search").mkdir(parents=True)
    data = (whole / "search" / "journal.jsonl").read_bytes()
    path = out / "search" / "journal.jsonl"
    path.write_bytes(b"")

    def write() -> None:
        with path.open("ab", buffering=0) as file:
            for start in range(0, len(data), 97):
                file.write(data[start : start + 97])

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while writer.is_alive():
        standing = watching.watch(out).standing
        seen.append(0 if standing is None else standing.num_evaluated)
    writer.join()
    standing = watching.watch(out).standing
    assert standing is not None
    assert [*seen, standing.num_evaluated] == sorted([*seen, 12])


def test_stages_of_a_run(tmp_path: Path) -> None:
    """The first stage that has not left its result."""
    (tmp_path / "recipe.toml").write_text(recipe_toml(RECIPE))
    assert stage_of(RECIPE, tmp_path) == stages.EXPERTS
    watched = watching.watch(tmp_path)
    assert (watched.stage, watched.is_finished, watched.left_in_all_s) == (1, False, None)
    assert "stage 1 of 6: experts" in watched.headline
    (tmp_path / "experts").mkdir()
    for name in ("math", "code"):
        (tmp_path / "experts" / f"z_vectors_{name}.safetensors").touch()
    for number, name in (
        (stages.SEARCH, "front.json"),
        (stages.ARTIFACT, "artifact/manifest.json"),
        (stages.GATE_ARTIFACT, "gate.jsonl"),
        (stages.GATE_OTHERS, "scores.json"),
        (stages.MEASUREMENT, "handoff.json"),
    ):
        assert stage_of(RECIPE, tmp_path) == number
        if name == "gate.jsonl":
            Journal(tmp_path / name).append({"kind": "artifact"})
        else:
            write_json(tmp_path / name, {})
    assert stage_of(RECIPE, tmp_path) is None
    assert watching.watch(tmp_path).is_finished


def test_the_whole_is_estimated_once_it_can_be(running: Path) -> None:
    """Nothing before the search has both measured and answered; then its own rest and that of every later stage."""
    (running / "recipe.toml").write_text(recipe_toml(RECIPE))
    (running / "experts").mkdir()
    for name in ("math", "code"):
        (running / "experts" / f"z_vectors_{name}.safetensors").touch()
    behind = left_after(stages.SEARCH, RECIPE, running)
    assert behind is not None
    # a structure to write, 1000 gate rows a task for the artifact, the base and two experts, 6 processes of quick
    assert behind == pytest.approx(10 + 3 * 10 * (1 + 3) + 6 * (10 + 0.47), abs=0.5)
    assert left_after(stages.MEASUREMENT, RECIPE, running) == 0
    assert left_after(stages.EXPERTS, RECIPE, running) is None
    watched = watching.watch(running)
    assert watched.left_in_all_s == pytest.approx(27 + behind)
    assert "stage 2 of 6: search, about 3 min 40 s left in all" in watched.headline
    (running / "search" / "pace.json").unlink()
    assert left_after(stages.SEARCH, RECIPE, running) is None
    assert "left in all" not in watching.watch(running).headline


class Heard:
    """A progress that writes down stages and notes."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None, *, unit: str = "") -> Any:
        import contextlib

        self.names.append(name)
        return contextlib.nullcontext(self)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.notes.append(note)

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        self.notes.append(f"{dict(figures)} {left_s}")


def test_a_run_says_its_stage_and_what_is_left_in_all(whole: Path) -> None:
    """Outermost stages alone are numbered; the search's rest is what it tells, never a count of unlike units."""
    heard, now_s = Heard(), [0.0]
    progress = StagedProgress(heard, RECIPE, whole, clock=lambda: now_s[0])
    with progress.stage("train", 10) as stage, progress.stage("inner", 1):
        now_s[0] += 5
        stage.advance(note="step")
    progress.enter(stages.SEARCH)
    with progress.stage("search", 10) as stage:
        now_s[0] += 5
        stage.advance(note="cost of fp32")
        stage.tell({"front": "3"}, left_s=30.0)
    progress.enter(stages.MEASUREMENT)
    with progress.stage("measure", 4) as stage:
        now_s[0] += 10
        stage.advance()
    assert heard.names == ["stage 1 of 6, train", "inner", "stage 2 of 6, search", "stage 6 of 6, measure"]
    behind = left_after(stages.SEARCH, RECIPE, whole)
    assert behind is not None
    assert heard.notes == [
        "step",
        "cost of fp32",
        "{'front': '3'} 30.0",
        f"cost of fp32; about 3 min {round(behind + 30 - 180):02d} s left in all",
        "about 30.0 s left in all",
    ]
