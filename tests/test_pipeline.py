"""The whole story in small: it runs, it can be stopped anywhere, and what is wrong with its input is one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from havoc_core.config import Recipe
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import BUNDLED_NANO
from havoc_core.model.structure import Structure
from havoc_core.pipeline import run
from havoc_core.progress import SILENT
from havoc_core.storage import only_writer
from havoc_core.track.metrics_file import points_of

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.alone

SMALL = """
[experts]
domains = ["code", "vision"]
num_steps = 2
validate_every = 1
learning_rate = 0.03
prompts_per_step = 12
samples_per_prompt = 4
num_validation_rows = 24
[search]
population = 4
generations = 1
num_rows = 4
weight_formats = ["fp32", "int8"]
[export]
weights = "int4"
compute = "fp32"
dialect = "contrib"
[gate]
num_rows = 8
"""
ALL_OF_IT = {
    "artifact",
    "badge.json",
    "basis.safetensors",
    "experts",
    "front.json",
    "handoff.json",
    "junit.xml",
    "metrics.jsonl",
    "recipe.toml",
    "record.json",
    "report.html",
    "report.md",
    "gate.jsonl",
    "scores.json",
    "search",
    "telemetry.csv",
    "SHA256SUMS",
}


def havoc(*words: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "havoc_core", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=300)


def run_command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "havoc_core", "run", str(recipe), "--out", str(out)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "finished"
    done = havoc("run", recipe, "--out", out)
    assert done.returncode in {0, 1, 3, 4}, done.stderr  # 4 where this machine is too busy to measure
    return out


def test_run_leaves_everything_and_no_scraps(finished: Path) -> None:
    """Every file of the design is there, nothing temporary is, and the seed's hand-off has exactly its keys."""
    assert {path.name for path in finished.iterdir()} == ALL_OF_IT
    assert not [path for path in finished.rglob("*") if re.search(r"\.(tmp|old)$", path.name)]
    handoff = json.loads((finished / "handoff.json").read_text())
    assert set(handoff) == {
        "success",
        "experts",
        "best_mixture",
        "adapted_model",
        "metrics",
        "verdict",
        "evidence",
        "criteria",
        "targets",
        "artifact",
        "phase6",
    }
    assert {name: one["exit_code"] for name, one in handoff["targets"].items()}["gtx1660"] == 5
    assert set(handoff["metrics"]) == {"latency_ms", "accuracy", "vram_gb", "throughput_tps"}
    assert handoff["metrics"]["vram_gb"] is None  # not measured on a CPU, so not a number
    assert all((finished / path).is_file() for path in handoff["experts"].values())


def test_experts_that_learned_nothing_end_the_run_at_once(tmp_path: Path) -> None:
    """An exit code of its own and what each scored, before any search; the experts are kept."""
    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    path.write_text('[experts]\ntasks = ["code"]\nnum_steps = 1\nlearning_rate = 1e-9\nnum_validation_rows = 4\n')
    done = havoc("run", path, "--out", out)
    assert done.returncode == 6, done.stderr
    assert "no state of code" in done.stderr
    assert "of 4" in done.stderr.splitlines()[-1]
    assert (out / "experts" / "z_vectors_code.safetensors").is_file()
    assert not (out / "search").exists()
    searched = havoc(
        "search",
        "nano",
        "--experts",
        out / "experts",
        "--recipe",
        path,
        "--target",
        "host",
        "--out",
        tmp_path / "searched",
    )
    assert searched.returncode == 6, searched.stderr


def test_finished_run_is_read_back(finished: Path, recipe: Path) -> None:
    """The same command again measures nothing and writes the same record, scores, front and metrics."""
    names = ("record.json", "scores.json", "front.json", "metrics.jsonl")
    before = {name: (finished / name).read_bytes() for name in names}
    start = time.perf_counter()
    again = havoc("run", recipe, "--out", finished, "--json")
    assert again.returncode in {0, 1, 3, 4}, again.stderr
    assert json.loads(again.stdout)["judgements"]["gtx1660"]["exit_code"] == 5
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert time.perf_counter() - start < 60


def test_a_finished_run_does_not_vouch_for_another_artifact(finished: Path, recipe: Path, tmp_path: Path) -> None:
    """Its artifact replaced after the measurement, whole and with right hashes: exit 5, and no hand-off says success.

    The same command said "pass" for an artifact that answers nothing right.
    """
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "artifact")
    done = havoc("export", "nano", "--out", out / "artifact", "--quiet")
    assert done.returncode == 0, done.stderr
    done = havoc("run", recipe, "--out", out, "--quiet")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "not the mixture that" in done.stderr
    shutil.rmtree(out / "artifact")
    shutil.copytree(finished / "artifact", out / "artifact")
    readme = out / "artifact" / "README.md"
    content = readme.read_bytes() + b"x"
    readme.write_bytes(content)
    manifest = out / "artifact" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"]["README.md"] = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    manifest.write_text(json.dumps(document))
    done = havoc("run", recipe, "--out", out, "--quiet")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "is not the file that" in done.stderr


def test_the_gate_says_of_the_record_what_the_run_said(finished: Path) -> None:
    """`host` decides, `gtx1660` was not measured, and an edited record is refused."""
    record = finished / "record.json"
    assert havoc("gate", record, "--target", "host").returncode in {1, 3, 4}  # 8 rows prove no accuracy
    assert havoc("gate", record, "--target", "gtx1660").returncode == 5
    edited = finished.parent / "edited.json"
    edited.write_text(record.read_text().replace('"run_id": "', '"run_id": "x', 1))
    assert havoc("gate", edited, "--target", "host").returncode == 5


def test_eval_repeats_the_table_from_the_artifact_alone(finished: Path) -> None:
    """A copy of the artifact somewhere else gives the same counts of right answers."""
    copy = finished.parent / "elsewhere"
    shutil.copytree(finished / "artifact", copy)
    words = ("eval", copy, "--domain", "code", "--domain", "vision", "--n", 8, "--json")
    found = json.loads(havoc(*words, check=True).stdout)
    (mixture,) = [row for row in json.loads((finished / "scores.json").read_text())["rows"] if row["kind"] == "mixture"]
    counts = {domain: accuracy["num_right"] for domain, accuracy in mixture["accuracy"].items()}
    assert {domain: row["num_right"] for domain, row in found["accuracy"].items()} == counts


def test_the_artifact_is_the_one_that_the_recipe_names(finished: Path) -> None:
    """Weights, what they compute in and the dialect are those of [export], not the search's choice."""
    manifest = json.loads((finished / "artifact" / "manifest.json").read_text())
    assert Structure.from_fields(manifest["structure"]) == Structure("int4", compute="fp32")
    assert manifest["graph"]["dialect"] == "contrib"
    assert manifest["graph"]["accuracy_level"] == 1


@pytest.mark.timeout(900)  # each attempt is longer than the one before
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_stopped_anywhere_it_goes_on(recipe: Path, finished: Path, tmp_path: Path, kill: signal.Signals) -> None:
    """Stopped again and again until it is done: the choices and scores are those of a run that was never stopped."""
    out = tmp_path / "out"
    num_stops, wait_s = 0, 3.0
    while True:
        process = subprocess.Popen(run_command(recipe, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(kill)
            _, errors = process.communicate()
            num_stops += 1
            wait_s *= 1.4
            if kill == signal.SIGINT and process.returncode == 130:
                assert "run the same command" in errors.splitlines()[-1]
            continue
        break
    assert process.returncode in {0, 1, 3, 4}, errors
    assert num_stops > 0
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp") and path.is_file()]
    for domain in ("code", "vision"):
        name = f"experts/z_vectors_{domain}.safetensors"
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert trained_metrics(out) == trained_metrics(finished)


def trained_metrics(out: Path) -> dict[tuple[str, int | None], float]:
    """What the trainings logged, by name and step, but what the processes took for it; no step stands there twice."""
    found: dict[tuple[str, int | None], float] = {}
    for _, step, values in points_of((out / "metrics.jsonl").read_bytes()):
        told = {(name, step): value for name, value in values.items() if name.startswith("svf/")}
        assert not found.keys() & told.keys()
        found |= {key: value for key, value in told.items() if "/process/" not in key[0]}
    return found


def test_folder_of_another_recipe_is_refused(finished: Path, tmp_path: Path) -> None:
    """Results of two recipes never mix in one folder."""
    other = tmp_path / "other.toml"
    other.write_text(SMALL.replace("num_rows = 8", "num_rows = 9"))
    refused = havoc("run", other, "--out", finished)
    assert refused.returncode == 2
    assert "another recipe" in refused.stderr.splitlines()[-1]


def _with_byte_changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_with_byte_changed, lambda path: path.write_bytes(path.read_bytes()[:500])])
def test_damaged_expert_is_one_line(finished: Path, recipe: Path, tmp_path: Path, damage: object) -> None:
    """A changed or cut expert file ends the run with its name, exit 2, and nothing else is touched."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "artifact")
    assert callable(damage)
    damage(out / "experts" / "z_vectors_code.safetensors")
    refused = havoc("run", recipe, "--out", out)
    assert refused.returncode in {2, 5}
    assert "z_vectors_code.safetensors" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_expert_of_another_base_is_refused(finished: Path, tmp_path: Path) -> None:
    """z vectors fit only the base they were trained on: both hashes are named."""
    refused = havoc("export", "pico", "--experts", finished / "experts", "--alpha", "1,1", "--out", tmp_path / "a")
    assert refused.returncode == 2
    assert "base" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_is_one_line_and_the_run_goes_on(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """On a disk of 200 kB the run stops with one line; given room, the same command trains the same expert."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        stopped = havoc("run", recipe, "--out", small / "out")
        assert stopped.returncode == 2
        assert "disk is full" in stopped.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        name = "experts/z_vectors_code.safetensors"
        again = subprocess.Popen(run_command(recipe, small / "out"), stderr=subprocess.PIPE, text=True)
        while again.poll() is None and not (small / "out" / name).exists():
            time.sleep(0.1)
        again.send_signal(signal.SIGINT)
        _, errors = again.communicate()
        assert again.returncode == 130, errors
        assert (small / "out" / name).read_bytes() == (finished / name).read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[gate]\ntargets = ["nope"]', "unknown target 'nope'"),
        ('[data]\nsource = "/no/such"', "'/no/such': no such directory"),
        ('[model]\nbase = "/no/such"', "/no/such: not a directory"),
    ],
    ids=["target", "data", "base"],
)
def test_a_wrong_name_is_told_before_any_work(tmp_path: Path, text: str, words: str) -> None:
    """Not after minutes of training, and the folder stays free for the corrected recipe."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    done = havoc("run", recipe, "--out", tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def _handed(folder: Path, model: object) -> Path:
    path = folder / "phase6.json"
    metrics = {"tool_success_rate": 0.94, "persona_consistency": 0.89}
    path.write_text(json.dumps({"model": str(model), "metrics": metrics}))
    return path


def test_phase_6_hands_a_model_over(tmp_path: Path, finished: Path, recipe: Path) -> None:
    """Its model is the base, its shares are in handoff.json beside the .pt files that the recipe asks for.

    Then neither file nor flag is needed to go on.
    """
    out, handed = tmp_path / "out", _handed(tmp_path, "baked")
    shutil.copytree(BUNDLED_NANO, tmp_path / "baked")
    shutil.copytree(finished, out)
    saved = (out / "recipe.toml").read_text()
    saved = saved.replace('base = "nano"', f'base = "{tmp_path / "baked"}"').replace("pt = false", "pt = true")
    (out / "recipe.toml").write_text(saved)
    (out / "gate.jsonl").unlink()  # it names the base by its path
    command = ("run", out / "recipe.toml", "--out", out, "--quiet")
    given = havoc(*command, "--handoff", handed)
    assert given.returncode in {0, 1, 3, 4}, given.stderr
    first = json.loads((out / "handoff.json").read_text())
    assert first["phase6"]["metrics"] == {"tool_success_rate": 0.94, "persona_consistency": 0.89}
    assert (out / "phase6.json").read_bytes() == handed.read_bytes()
    assert first["adapted_model"] == "pt/svf_adapted_model.pt"  # on request, as phase 8 reads it
    assert first["experts"] == {name: f"pt/z_vectors_{name}.pt" for name in ("code", "vision")}
    assert all((out / name).is_file() for name in (first["adapted_model"], *first["experts"].values()))
    assert (out / first["artifact"] / "manifest.json").is_file()
    handed.unlink()
    assert havoc(*command).returncode == given.returncode
    assert json.loads((out / "handoff.json").read_text()) == first


def test_a_recipe_of_another_base_than_the_handoff(tmp_path: Path) -> None:
    """One line with both, exit 2, nothing written; so it is where the model is not there."""
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    (tmp_path / "baked").mkdir()
    recipe.write_text('[model]\nbase = "nano"')
    for model, words in (("baked", "the recipe adapts 'nano', but"), ("gone", "model 'gone' is missing")):
        done = havoc("run", recipe, "--handoff", _handed(tmp_path, model), "--out", out)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert words in done.stderr
        assert not out.exists()


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    """What HAVOC did not write it does not write into."""
    (tmp_path / "mine.txt").write_text("mine")
    done = havoc("run", "--out", tmp_path)
    assert done.returncode == 2
    assert "is not the result of a run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_two_runs_in_one_folder(recipe: Path, tmp_path: Path) -> None:
    """The second is refused before it writes, so two searches never share a journal."""
    with only_writer(tmp_path / "run"):
        second = havoc("run", recipe, "--out", tmp_path / "run", "--quiet")
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "another process" in second.stderr
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_enough_is_refused_first(tmp_path: Path) -> None:
    """Rows that search and gate will need are asked for before anything is trained or written."""
    (tmp_path / "data").mkdir()
    recipe = Recipe.model_validate({"data": {"source": str(tmp_path / "data")}, "experts": {"domains": ["code"]}})
    with pytest.raises(HavocError, match=r"mbpp/full/train-\*.\{parquet,jsonl,json,csv\}: no such files"):
        run(recipe, tmp_path / "out", progress=SILENT)
    assert not (tmp_path / "out").exists()
