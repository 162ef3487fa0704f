"""Live artifacts on the command line: exported, verified, asked and scored at any mixture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from havoc_core.adapt.expert import save_expert
from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.bench.accuracy import AccuracyRun, run_accuracy
from havoc_core.bench.subject import identify_subject
from havoc_core.cli import main
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.live_table import EXPERTS_FILE
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.storage import sha256_file, write_json
from tests.commands import run_and_read as run


@pytest.fixture(scope="module")
def reader(text_base_directory: Path) -> Path:
    return text_base_directory


@pytest.fixture(scope="module")
def experts_directory(reader: Path, experts_for, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from havoc_core.export.source import open_source

    folder = tmp_path_factory.mktemp("experts")
    for expert in experts_for(open_source(reader)):
        save_expert(expert, folder)
    return folder


@pytest.fixture(scope="module")
def live(reader: Path, experts_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("live") / "artifact"
    words = ("export", reader, "--experts", experts_directory, "--live", "--out", out, "--quiet")
    assert main([str(word) for word in words]) == 0
    return out


def changed(live: Path, to: Path, change: Any) -> Path:
    """A copy whose experts' file is changed and whose manifest says so: a forgery that no hash gives away."""
    copy = Path(shutil.copytree(live, to))
    values = np.fromfile(copy / EXPERTS_FILE, np.float32)
    change(values)
    values.tofile(copy / EXPERTS_FILE)
    document = json.loads((copy / "manifest.json").read_text())
    document["files"][EXPERTS_FILE]["sha256"] = sha256_file(copy / EXPERTS_FILE)
    write_json(copy / "manifest.json", document)
    return copy


def test_export_says_what_is_live(
    reader: Path, experts_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without weights it is the base until one is chosen; a folder of another kind is not replaced."""
    words = ("export", reader, "--experts", experts_directory, "--out", tmp_path / "a", "--quiet")
    code, out, _ = run(capsys, *words, "--live")
    assert code == 0
    assert "mixture     math 0, code 0 (rule delta)" in out
    assert f"matrices of each expert in {EXPERTS_FILE}" in out
    code, _, err = run(capsys, *words, "--alpha", "0,0")
    assert (code, "another kind" in err) == (2, True)
    assert "--alpha" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--live",), "give them with --experts DIR"),
        (("--live", "--experts", "EXPERTS", "--weights", "int8"), "rounded again at every switch"),
        (("--live", "--experts", "EXPERTS", "--to", "hf"), "--to hf writes no artifact"),
        (("--live", "--experts", "EXPERTS", "--alpha", "1"), "one weight for each expert"),
    ],
)
def test_what_cannot_be_live_is_refused(
    reader: Path,
    experts_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    """One line, exit code 2, and nothing is written."""
    given = [str(experts_directory) if word == "EXPERTS" else word for word in words]
    code, _, err = run(capsys, "export", reader, *given, "--out", tmp_path / "a", "--quiet")
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_verify_folds_every_expert_again(live: Path, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each expert's answers are compared on the device, its folds with base and experts where there is a base."""
    code, out, _ = run(capsys, "verify", live, "--json")
    assert code == 0
    assert [check["name"] for check in json.loads(out)["checks"]][-1] == "live"
    code, out, _ = run(capsys, "verify", live, "--base", reader, "--json", "--quiet")
    assert code == 0
    assert [check["name"] for check in json.loads(out)["checks"]][-2:] == ["fold", "live folds"]


def test_a_forged_expert_is_found(live: Path, reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another fold changes the logits of that expert; one that hardly does is found by folding again."""

    def doubled(values: Any) -> None:
        values *= 2

    def nudged(values: Any) -> None:
        values[0] += 1e-3

    code, _, err = run(capsys, "verify", changed(live, tmp_path / "a", doubled))
    assert code == 5
    assert "logits of the math expert" in err
    code, _, err = run(capsys, "verify", changed(live, tmp_path / "b", nudged), "--base", reader, "--quiet")
    assert code == 5
    assert "off base + experts" in err


@pytest.mark.parametrize("exchange", ["places", "matrices"])
def test_a_forged_table_is_found(
    live: Path, reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], exchange: str
) -> None:
    """Places that lead to another expert, with the fingerprints to match, and a matrix that is left out."""
    copy = Path(shutil.copytree(live, tmp_path / "a"))
    document = json.loads((copy / "manifest.json").read_text())
    if exchange == "places":
        for matrix in document["live"]["matrices"]:
            places = matrix["places"]
            places["expert/math"], places["expert/code"] = places["expert/code"], places["expert/math"]
        prints = document["live"]["fingerprints"]
        prints["math"], prints["code"] = prints["code"], prints["math"]
    else:
        del document["live"]["matrices"][0]
    write_json(copy / "manifest.json", document)
    code, _, err = run(capsys, "verify", copy, "--base", reader, "--quiet")
    assert code == 5
    assert ("something else than an export does" if exchange == "places" else "not the graph") in err


def test_generate_answers_at_the_alpha_asked_for(
    live: Path, reader: Path, experts_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a live artifact writes is what an artifact of that mixture writes."""
    fresh = tmp_path / "fresh"
    run(capsys, "export", reader, "--experts", experts_directory, "--alpha", "1,0.5", "--out", fresh, "--quiet")
    words = ("--prompt", "the quick", "--max-new-tokens", "12", "--temperature", "9", "--seed", "1")
    texts = [run(capsys, "generate", live, *options, *words)[1] for options in ((), ("--alpha", "math=1,code=0.5"))]
    assert texts[1] == run(capsys, "generate", fresh, *words)[1]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("model", "alpha", "message"),
    [
        ("live", "vision=1", "no expert is called vision; it holds math, code"),
        ("live", "math", "does not name each expert once"),
        ("live", "math=1,math=2", "does not name each expert once"),
        ("live", "math=nan", "is not a number"),
        ("base", "math=1", "is a base: export it with --live"),
        ("fresh", "math=1", "holds one mixture, folded: export it with --live"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "eval", "bench"])
def test_an_alpha_that_cannot_be_is_refused(
    live: Path,
    reader: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    model: str,
    alpha: str,
    message: str,
) -> None:
    """One line and exit code 2, before anything is run or measured."""
    if verb == "bench" and model == "base":
        return
    if model == "fresh":
        export_artifact(reader, tmp_path / "fresh")
    path = {"live": live, "base": reader, "fresh": tmp_path / "fresh"}[model]
    rest = {"generate": ("--prompt", "a"), "eval": ("--task", "math", "--n", "2"), "bench": ("--out", tmp_path / "r")}
    try:
        code, _, err = run(capsys, verb, path, "--alpha", alpha, *rest[verb])
    except SystemExit as stopped:
        code, err = stopped.code, capsys.readouterr().err
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_score_names_its_mixture(live: Path) -> None:
    """The mixture that answered goes along; one of another mixture is not joined to a record."""
    scoring = Scoring(tasks=("math",), num_rows=2)
    runs = [run_accuracy(live, scoring, alpha=alpha) for alpha in (None, {"math": 1})]
    assert [found.alpha for found in runs] == [{"math": 0.0, "code": 0.0}, {"math": 1.0, "code": 0.0}]
    assert AccuracyRun.from_json(runs[1].to_json()) == runs[1]


def test_eval_says_at_which_alpha(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mixture that was asked for stands among the notes, the experts that it leaves out with 0."""
    code, out, _ = run(capsys, "eval", live, "--alpha", "math=1", "--task", "math", "--n", "2", "--quiet", "--json")
    assert code == 0
    assert "answered at alpha math 1, code 0" in json.loads(out)["notes"]


def test_weights_of_other_mixtures_are_not_counted(live: Path, reader: Path, tmp_path: Path) -> None:
    """A record's bytes of weights are those of one mixture, as in an artifact that holds no other."""
    plain = export_artifact(reader, tmp_path / "a")
    assert identify_subject(live).weight_bytes == identify_subject(plain).weight_bytes


def test_other_programs_read_the_exported_mixture(live: Path, reader: Path, tmp_path: Path) -> None:
    """Without the runtime's bindings the graph answers with the weights of its file: here the base's."""
    plain = DecoderSession.open(export_artifact(reader, tmp_path / "a"), num_threads=1)
    manifest = read_manifest(live)
    graphs = {"model.onnx": live / "model.onnx"}
    unaware = DecoderSession(plain.config, graphs, num_threads=1)
    ids = np.arange(20, 40)[None]
    np.testing.assert_allclose(unaware.prefill(ids)[0], plain.prefill(ids)[0], rtol=0, atol=1e-5)
    assert manifest.alpha == {"math": 0.0, "code": 0.0}
