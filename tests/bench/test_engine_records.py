"""A record of another engine: the same schema and rules; what it cannot show is null, and no verdict is a pass."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.answer import statement_of
from havoc_core.bench.judge.compare import compare, differences
from havoc_core.bench.judge.engine_files import files_of, hash_files, is_weights
from havoc_core.bench.judge.gate import Judgement, judge
from havoc_core.bench.judge.record import load_record
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report.run_facts import facts
from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError
from tests.bench import sample_records as samples

if TYPE_CHECKING:
    from havoc_core.bench.judge.record import Record
    from havoc_core.bench.judge.targets import Target


FILES = {"model.gguf": "a" * 64}
ENGINES = {
    "subject__engine": {"name": "llama.cpp", "version": "2026.1"},
    "subject__files": FILES,
    "subject__manifest_sha256": None,
    "subject__graph_sha256": None,
    "subject__format_cost": None,
    "subject__is_graph_rebuilt": None,
    "samples__each__nodes_by_provider": {},
    "samples__each__num_nonfinite_logits": None,
    "samples__each__prefill__cpu_ns": [19_000_000] * 20,
}


def record(**changes: Any) -> Record:
    """A good record of llama.cpp, changed in some places."""
    found: Record = samples.record("cpu", **(ENGINES | changes))
    return found


def judged(found: Record, target: Target | None = None, **knowledge: Any) -> Judgement:
    return judge([found], target or load_target("host"), this_cpu=samples.THIS_CPU, **knowledge)


def test_limits_are_judged_and_no_verdict_is_a_pass() -> None:
    """Every limit is met by the samples, and what nothing shows is said: exit code 3, with the artifact or without."""
    host = load_target("host")
    of_havoc = {"kl_mean", "top1_share"}
    target = host.model_copy(update={"limits": tuple(x for x in host.limits if x.metric not in of_havoc)})
    assert judged(samples.record("cpu"), target).verdict == "pass"
    for knowledge in ({}, {"artifact_files": FILES}):
        found = judged(record(), target, **knowledge)
        assert (found.verdict, found.exit_code, found.findings) == ("inconclusive", 3, ())
        assert {line.verdict for line in found.lines} == {"pass"}
        assert "llama.cpp is another engine" in found.reason
        assert "were not measured" in found.reason


def test_a_miss_is_a_miss_and_what_is_missing_is_not_measured() -> None:
    """An engine that is too slow fails like an artifact; limits on accuracy and format cost are not measured."""
    slow = {
        "samples__each__prefill__duration_ns": [150_000_000] * 20,
        "samples__each__prefill__start_ns": [160_000_000 * call for call in range(20)],
        "samples__each__prefill__cpu_ns": [149_000_000] * 20,
        "samples__each__ttft": {},
        "samples__each__busy_ns": 0,
    }
    assert judged(record(**slow)).exit_code == 1
    bare = judged(record(accuracy={}))
    assert bare.exit_code == 3
    missing = {line.metric for line in bare.lines if line.verdict == "not_measured"}
    assert missing == {"kl_mean", "top1_share", *(f"accuracy/{name}" for name in samples.DOMAINS)}


@pytest.mark.parametrize(
    ("changes", "rule", "word"),
    [
        ({"samples__each__prefill__cpu_ns": [9_000_000] * 20}, "V05", "used 0.45 cores, at least"),
        ({"samples__each__prefill__cpu_ns": []}, "V05", "an unknown number of cores"),
        ({"subject__files": {}}, "I15", "names no file"),
        ({"samples__each__num_distinct_outputs": 1}, "V08", "same output"),
    ],
)
def test_a_fault_is_found(changes: dict[str, Any], rule: str, word: str) -> None:
    """What computed elsewhere, names no file, or answers every prompt alike decides nothing."""
    found = judged(record(**changes))
    assert found.exit_code in {4, 5}
    assert [word in finding.reason for finding in found.findings if finding.rule == rule] == [True]


def test_a_first_token_may_come_as_fast_as_a_prefill() -> None:
    """An engine's prefill ends with its first token; an artifact's does not, so there it is a fault (V20)."""
    quick = {"samples__each__ttft__duration_ns": [19_000_000] * 20, "samples__each__busy_ns": 0}
    assert judged(record(**quick)).findings == ()
    assert [finding.rule for finding in judged(samples.record("cpu", **quick)).findings] == ["V20"]


def test_an_artifact_must_count_its_logits() -> None:
    """Null stands for an engine that shows none; in a record of HAVOC's own it proves nothing."""
    found = judged(samples.record("cpu", samples__2__num_nonfinite_logits=None))
    assert [finding.rule for finding in found.findings] == ["V07"]


def test_the_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    """The files of the model are hashed anew; another byte, or another file, is another model."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    found = record(subject__files=hash_files(model))
    assert hash_files(model) == {"model.gguf": hashlib.sha256(b"weights").hexdigest()}
    assert judged(found, artifact_files=hash_files(model)).exit_code == 3
    model.write_bytes(b"weighty")
    changed = judged(found, artifact_files=hash_files(model))
    assert (changed.exit_code, changed.findings[0].rule) == (5, "I14")


def test_gate_and_report_take_the_model_as_the_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--artifact model.gguf` is hashed as it was when it was measured, and the page names the engine."""
    model, out = tmp_path / "model.gguf", tmp_path / "run"
    model.write_bytes(b"weights")
    here = identify_cpu().model_dump(mode="json")
    found = record(subject__files=hash_files(model), device__cpu=here, device__name=here["name"])
    out.mkdir()
    found.save(out / "record.json")
    words = ["--target", "host", "--artifact", str(model)]
    assert main(["gate", str(out), *words]) == 3
    assert "not measured: kl_mean" in capsys.readouterr().out
    assert main(["report", str(out), *words]) == 0
    text = (out / "report.md").read_text()
    assert "llama.cpp 2026.1" in text
    assert "--engine llama_cpp" in text
    assert "no verdict on it can be a pass" in text
    model.write_bytes(b"weighty")
    assert main(["gate", str(out), *words]) == 5
    assert "model.gguf is not the file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"subject__graph_sha256": None}, "an artifact needs graph_sha256"),
        (ENGINES | {"subject__graph_sha256": "a" * 64}, "llama.cpp cannot have graph_sha256"),
        (ENGINES | {"subject__is_graph_rebuilt": True}, "cannot have is_graph_rebuilt"),
    ],
)
def test_a_subject_has_a_graph_or_an_engine(changes: dict[str, Any], word: str) -> None:
    """No record leaves both out, and none claims for an engine what only HAVOC's graphs have."""
    with pytest.raises(ValidationError, match=word):
        samples.record("cpu", **changes)


def test_it_is_read_again_and_told_apart(tmp_path: Path) -> None:
    """Saved, loaded and shown; beside a record of HAVOC's own only where both are asked for."""
    found = record()
    found.save(tmp_path / "record.json")
    again = load_record(tmp_path / "record.json")
    assert again.subject.engine == found.subject.engine
    assert ("Engine", "llama.cpp 2026.1") in facts(again)
    ours = samples.record("cpu", run_id="ours")
    assert "engine HAVOC's and llama.cpp 2026.1" in differences(ours, again)
    with pytest.raises(IdentityError, match=r"llama\.cpp"):
        compare(ours, again)
    assert compare(ours, again, across=True)


def test_a_signed_record_names_every_file_of_the_model() -> None:
    """There is no manifest that would list them; an artifact has one."""
    named = {item["name"]: item["digest"]["sha256"] for item in statement_of(record(), None)["subject"]}
    assert named == {"record.json": record().sha256, "model/model.gguf": "a" * 64}
    assert [item["name"] for item in statement_of(samples.record("cpu"), None)["subject"]] == [
        "record.json",
        "manifest.json",
    ]


def test_hidden_files_are_no_part_of_a_model(tmp_path: Path) -> None:
    """What a download left beside the model is not read by any engine; a name that no record can hold is refused."""
    for name in ("model.safetensors", "config.json", ".cache/huggingface/lock", "onnx/model.onnx", "tokenizer.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = files_of(tmp_path)
    assert sorted(found) == ["config.json", "model.safetensors", "onnx/model.onnx", "tokenizer.bin"]
    assert [name for name, file in found.items() if is_weights(file)] == ["model.safetensors", "onnx/model.onnx"]
    (tmp_path / "odd name").write_bytes(b"x")
    with pytest.raises(HavocError, match="'odd name'"):
        files_of(tmp_path)
    with pytest.raises(HavocError, match="no such model"):
        hash_files(tmp_path / "nothing")


def test_records_under_reports_are_read() -> None:
    """Records that were written before there were engines load as they are."""
    paths = sorted((Path(__file__).parents[2] / "reports").rglob("record.json"))
    assert paths
    assert all(load_record(path).subject.engine is None for path in paths)
