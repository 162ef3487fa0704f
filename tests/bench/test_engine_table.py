"""The table of all engines: a row for each, whether it is installed, refuses a model, or was given none."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core.bench import contender, engine_table
from havoc_core.bench.engines import ENGINES
from havoc_core.bench.judge.record import load_record
from havoc_core.cli import main
from havoc_core.errors import MeasurementError
from tests.bench import sample_records as samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from havoc_core.bench.judge.record import Record


@pytest.fixture
def models(tiny_artifact: Path, tmp_path: Path) -> tuple[str, str]:
    """An artifact, which genai opens too, and a Hugging Face directory."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(tiny_artifact / "config.json", folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    artifact = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    (artifact / "genai_config.json").write_text("{}")
    return str(artifact), str(folder)


@contextmanager
def entered(word: str, *, pythons: Sequence[Path], engine: str) -> Iterator[Any]:
    python, _ = contender.interpreter_with(engine, pythons)
    yield SimpleNamespace(engine=engine, place=word, python=python, identity={"version": "1.2"})


def scripted(monkeypatch: pytest.MonkeyPatch, *, installed: set[str], fails: str = "") -> list[Any]:
    """Let engines be installed or not, and measure nothing: each gives the sample record, or fails."""
    asked: list[Any] = []

    def version(engine: str, python: Path) -> str | None:
        is_here = engine in installed if python == Path(sys.executable) else engine == python.name
        return "1.2" if is_here else None

    def measure(model: Any, **options: Any) -> Record:
        asked.append((model, options))
        if getattr(model, "engine", None) == fails:
            raise MeasurementError("the process that runs the model ended by signal 11")
        return samples.record("cpu", run_id=f"run-{len(asked)}")

    monkeypatch.setattr(contender, "engine_version", version)
    monkeypatch.setattr(engine_table, "measure", measure)
    monkeypatch.setattr(engine_table, "enter", entered)
    return asked


def rows(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["bench", *words, "--engine", "all", "--json", "--quiet", "--wait", "0"])
    return code, {row["engine"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_engine_has_a_row(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that open a model have a record; one that is missing names its extra, one without a model what it opens."""
    asked = scripted(monkeypatch, installed={"hugging_face", "llama_cpp"})
    code, found = rows(*models, "--out", str(tmp_path / "out"), "--threads", "1", capsys=capsys)
    assert code == 0
    assert set(found) == {"HAVOC", *ENGINES.values()}
    assert len(asked) == 2
    assert all(options["num_threads"] == 1 for _, options in asked)
    for engine, model in (("HAVOC", models[0]), ("transformers", models[1])):
        row = found[engine]
        assert (row["model"], row["is_valid"], row["reason"]) == (model, True, "")
        assert load_record(Path(row["record"])).run_id.startswith("run-")
        assert row["metrics"]["prefill_ms"] > 0
    assert 'pip install "havoc-core[genai]"' in found["onnxruntime-genai"]["reason"]
    assert "opens a .gguf file" in found["llama.cpp"]["reason"]
    assert main(["bench", *models, "--engine", "all", "--quiet", "--out", str(tmp_path / "out")]) == 2
    assert "holds records already" in capsys.readouterr().err


def test_another_interpreter_has_the_engine(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine runs in the first of the named interpreters that has it, else in this one."""
    asked = scripted(monkeypatch, installed={"hugging_face"})
    pythons = ("--engine-python", "openvino", "--engine-python", "genai")
    words = (*models, *pythons, "--out", str(tmp_path / "out"))
    code, found = rows(*words, capsys=capsys)
    assert code == 0
    assert found["onnxruntime-genai"]["is_valid"]
    here = Path(sys.executable)
    assert [getattr(model, "python", None) for model, _ in asked] == [None, Path("genai"), here]


def test_one_engine_that_fails_is_a_row(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured all the same; where none is, the exit code says so, and the table why."""
    scripted(monkeypatch, installed={"hugging_face", "genai"}, fails="hugging_face")
    code, found = rows(*models, "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 0
    assert "signal 11" in found["transformers"]["reason"]
    assert found["transformers"]["record"] is None
    assert main(["bench", models[1], "--engine", "all", "--quiet", "--out", str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["engine", "version"]
    assert any(line.startswith("transformers") and "signal 11" in line for line in lines)


def test_what_is_of_one_artifact_is_refused(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracy, a mixture and a signature are one record's; several models are the table's."""
    for words, said in (
        ([models[0], "--engine", "all", "--n", "5"], "--n is for one artifact"),
        ([models[0], "--engine", "all", "--task", "math"], "--task is for one artifact"),
        ([*models], "2 models need --engine all"),
        ([str(tmp_path / "nothing"), "--engine", "all"], "not an artifact"),
    ):
        assert main(["bench", *words, "--quiet", "--out", str(tmp_path / "out")]) == 2, words
        assert said in capsys.readouterr().err
