"""The verdict belongs to the artifact: whoever exchanges files or folders meanwhile gets no record of the wrong one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.bench import accuracy, watched_run
from havoc_core.bench.accuracy import run_accuracy
from havoc_core.bench.judge.gate import hash_artifact
from havoc_core.bench.judge.record import Record, Workload
from havoc_core.bench.measure import run_session
from havoc_core.bench.profiles import PROFILES, Series
from havoc_core.bench.watched_run import open_session
from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export import verify as verifying
from havoc_core.export.runtime import artifact as reading
from havoc_core.export.verify import verify_artifact

pytestmark = pytest.mark.alone

BRIEF = dataclasses.replace(
    PROFILES["quick"],
    num_processes=1,
    warmup_window_s=0.0,
    warmup_max_s=0.1,
    prefill=Series(3, 0.0, 2.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(2, 0.0, 2.0),
    memory=Series(2, 0.0, 2.0),
)


@pytest.fixture
def measured(own_artifact: Path, small_workload: Workload) -> Callable[[], Record]:
    def measure() -> Record:
        with open_session(own_artifact, profile=BRIEF, workload=small_workload, num_threads=1) as opened:
            return run_session(opened, purpose="confirm")

    return measure


def exchange(path: Path) -> None:
    """Rename another file over this one, as `swap_while_hashing` does: same size, one bit of a weight turned."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = path.with_name(".other")
    other.write_bytes(content)
    other.replace(path)


def before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[..., object]) -> None:
    """Have `act` done once, before the function is called for the first time."""
    real, calls = getattr(module, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            calls.append(True)
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, called)


def test_a_file_exchanged_after_its_own_hash_is_not_measured(
    own_artifact: Path, measured: Callable[[], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other files are still being hashed: exit 5. It was measured under the old hash, 3 times of 3."""
    real = reading.sha256_file

    def hashed(path: Path) -> str:
        found = real(path)
        if path.name == "model.onnx.data":
            exchange(own_artifact / "model.onnx.data")
        return found

    monkeypatch.setattr(reading, "sha256_file", hashed)
    with pytest.raises(IdentityError, match=r"artifact/model\.onnx\.data changed while"):
        measured()


def test_a_folder_exchanged_meanwhile_is_not_measured(
    own_artifact: Path, measured: Callable[[], Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name leads elsewhere when the child starts, and back when it has ended: no file's state tells of that.

    The folder that was hashed is the one that is measured. What lies under its name meanwhile would not even open.
    """
    real, hidden = watched_run.run_worker, own_artifact.with_name("hidden")

    def run(*args: Any, **kwargs: Any) -> Any:
        own_artifact.rename(hidden)
        own_artifact.mkdir()
        try:
            return real(*args, **kwargs)
        finally:
            own_artifact.rmdir()
            hidden.rename(own_artifact)

    monkeypatch.setattr(watched_run, "run_worker", run)
    record = measured()
    assert {**record.subject.files, "manifest.json": record.subject.manifest_sha256} == hash_artifact(own_artifact)


def test_a_model_exchanged_before_it_is_scored_gives_no_accuracy(
    own_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hash at the start was all: a model that is never right passed with the accuracy of another."""
    before(monkeypatch, accuracy, "run_worker", lambda: exchange(own_artifact / "model.onnx.data"))
    with pytest.raises(IdentityError, match=r"model\.onnx\.data changed"):
        run_accuracy(own_artifact, Scoring(tasks=("math",), num_rows=2, max_new_tokens=2), num_threads=1)


def test_what_verify_runs_is_what_it_hashed(own_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model that comes when everything was hashed is not run under that hash."""
    before(monkeypatch, verifying, "foreign_fingerprints", lambda: exchange(own_artifact / "model.onnx.data"))
    with pytest.raises(IdentityError, match=r"model\.onnx\.data changed"):
        verify_artifact(own_artifact)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "base": lambda d: d["base"].update(name="Llama-3-8B-Instruct"),
    "base hash": lambda d: d["base"].update(hash="1" * 64),
    "randomness": lambda d: d["base"].update(random_weights=not d["base"]["random_weights"]),
    "mixture": lambda d: d["mixture"].update(alpha={"math": 9.0}, expert_hashes={"math": "1" * 64}),
    "rule": lambda d: d["mixture"].update(rule="renorm"),
    "structure": lambda d: d["structure"].update(weight_format="int4"),
    "cache": lambda d: d["graph"].update(cache="static", cache_len=64),
    "size": lambda d: d.update(num_parameters=7),
    "versions": lambda d: d["versions"].update(onnxruntime="9.9.9"),
    "fingerprint": lambda d: d.update(fingerprint={}),
    "parity": lambda d: d.update(parity={"cases": []}),
}
SEEN_WITHOUT_A_RECORD = {"base", "base hash", "randomness", "mixture", "rule", "size"}


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_in_a_manifest_passes_beside_the_record(
    lie: str, own_artifact: Path, tiny_record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record binds the manifest's own hash: gate and verify end in 5. Nine lies passed the gate, one verify."""
    record = tmp_path / "record.json"
    tiny_record.save(record)
    judge = ["gate", str(record), "--target", "host", "--artifact", str(own_artifact), "--json"]
    main(judge)
    assert "I14" not in {finding["rule"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    check = ["verify", str(own_artifact), "--record", str(record), "--quiet"]
    assert main(check) == 0
    path = own_artifact / "manifest.json"
    document = json.loads(path.read_text())
    LIES[lie](document)
    path.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(judge) == 5
    (finding,) = [found for found in json.loads(capsys.readouterr().out)["findings"] if found["rule"] == "I14"]
    assert "manifest.json is not the file" in finding["reason"]
    assert main(check) == 5
    if lie in SEEN_WITHOUT_A_RECORD:
        with pytest.raises(IdentityError, match=r"manifest\.json: says "):
            verify_artifact(own_artifact)


def test_a_record_given_to_verify_must_be_one(own_artifact: Path, tiny_record: Record, tmp_path: Path) -> None:
    """No record, an edited one and one of other files are told apart."""
    record = tmp_path / "record.json"
    record.write_text("{}")
    with pytest.raises(HavocError, match="not a HAVOC record"):
        verify_artifact(own_artifact, record=record)
    tiny_record.save(record)
    record.write_text(record.read_text().replace('"num_parameters":', '"num_parameters": 1, "x":', 1))
    with pytest.raises(IdentityError, match="seal does not match"):
        verify_artifact(own_artifact, record=record)
    files = {**tiny_record.subject.files, "model.onnx": "0" * 64}
    subject = tiny_record.subject.model_copy(update={"files": files})
    tiny_record.model_copy(update={"subject": subject}).save(record)
    with pytest.raises(IdentityError, match="another artifact"):
        verify_artifact(own_artifact, record=record)
