"""The verdict as a whole: order of reasons, exit codes, evidence, joined records, and the artifact that is meant."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.gate import Judgement, hash_artifact, hash_measured, judge, overall, summary
from havoc_core.bench.judge.limits import line_without_data
from havoc_core.bench.judge.metrics import measured
from havoc_core.bench.judge.record import Record, load_record
from havoc_core.bench.judge.targets import load_target
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime.verification import Verified
from tests.bench import known_bad as known

samples = known.samples


def judged(*records: Record, target: str = "host", **knowledge: Any) -> Judgement:
    return judge(records, load_target(target), **{"this_cpu": samples.THIS_CPU, **knowledge})


def test_a_good_record_passes() -> None:
    """The known-good twin: every limit proven on the target, exit code 0."""
    for kind, target in (("cpu", "host"), ("cuda", "gtx1660")):
        found = judged(samples.record(kind), target=target)
        assert (found.verdict, found.evidence, found.exit_code) == ("pass", "measured_target", 0)
        assert found.findings == ()
        assert {line.verdict for line in found.lines} == {"pass"}
        assert found.reason == "all 9 limits proven met; artifact not checked"
        assert judged(samples.record(kind), target=target, artifact_files=FILES).reason == "all 9 limits proven met"


FILES = {"manifest.json": "c" * 64, "model.onnx": "a" * 64, "model.onnx.data": "b" * 64}


def test_a_judgement_names_what_it_rests_on() -> None:
    """The records, the file of limits and its hash, whether the artifact's files were hashed, and what has no limit."""
    record, target = samples.record("cpu"), load_target("host")
    found = judge([record], target, this_cpu=samples.THIS_CPU, artifact_files=FILES)
    assert found.run_ids == (record.run_id,)
    assert found.is_artifact_checked
    assert not judge([record], target, this_cpu=samples.THIS_CPU).is_artifact_checked
    assert target.origin is not None
    assert (found.target_file, found.target_sha256) == (target.origin.file, target.origin.sha256)
    assert (found.target_file, len(found.target_sha256)) == ("targets.toml", 64)
    made_here = target.model_copy(update={"origin": None})
    bare = judge([record], made_here, this_cpu=samples.THIS_CPU)
    assert (bare.target_file, bare.target_sha256) == (None, None)
    limited = {limit.metric for limit in target.limits}
    unlimited = {figure.metric: figure.value for figure in found.unlimited}
    assert limited.isdisjoint(unlimited)
    assert unlimited == {
        name: value for name, value in measured(record).items() if name not in limited and value is not None
    }


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_artifact_passes_whose_graphs_nobody_built_anew(kind: str) -> None:
    """Neither where it was measured nor by `havoc verify`: undecided; a limit that is missed stays missed."""
    target = {"cpu": "host", "cuda": "gtx1660"}[kind]
    record = samples.record(kind, subject__is_graph_rebuilt=None)
    found = judged(record, target=target, artifact_files=FILES)
    assert (found.verdict, found.exit_code) == ("inconclusive", 3)
    assert all("havoc verify" in line.reason for line in found.lines)
    for is_rebuilt, verdict in ((True, "pass"), (False, "inconclusive")):
        verified = Verified("c" * 64, is_folded=False, is_rebuilt=is_rebuilt)
        assert judged(record, target=target, artifact_files=FILES, verified=verified).verdict == verdict
    assert judged(record, target=target).reason == "all 9 limits proven met; artifact not checked"
    slow = samples.record(kind, subject__is_graph_rebuilt=None, **SLOW)
    assert judged(slow, target=target, artifact_files=FILES).exit_code == 1


def test_an_artifact_is_hashed_by_its_manifest(own_artifact: Path) -> None:
    """What somebody put beside it is no part of it, and what the manifest does not say is noticed."""
    subject = samples.record("cpu").subject
    (own_artifact / "notes.txt").write_text("mine")
    assert hash_measured(own_artifact, subject) == hash_artifact(own_artifact)
    assert "notes.txt" not in hash_measured(own_artifact, subject)
    (own_artifact / "model.onnx").write_bytes(b"other")
    with pytest.raises(IdentityError):
        hash_measured(own_artifact, subject)


def test_every_record_must_have_its_graphs_built_anew() -> None:
    """One record of two that was measured without it leaves nothing proven."""
    for is_rebuilt, verdict in ((True, "pass"), (None, "inconclusive")):
        both = [samples.record("cpu"), samples.second(subject__is_graph_rebuilt=is_rebuilt)]
        found = judge(both, load_target("host"), artifact_files=FILES, this_cpu=samples.THIS_CPU)
        assert (found.verdict, found.findings) == (verdict, ())


SLOW = {"samples__each__prefill__duration_ns": [150_000_000] * 20}
SLOW |= {"samples__each__prefill__start_ns": [160_000_000 * call for call in range(20)]}
SLOW |= {"samples__each__ttft": {}, "samples__each__busy_ns": 0}

VERDICTS: list[tuple[str, dict[str, Any], str, int]] = [
    ("missing-metric", {"accuracy": {}}, "inconclusive", 3),
    ("empty-samples", {"samples": []}, "inconclusive", 3),
    ("zero-vram-is-not-measured", {"memory": {}}, "inconclusive", 3),
    ("missed", SLOW, "fail", 1),
    ("missed-and-missing", SLOW | {"accuracy": {}}, "fail", 1),
    ("interval-straddles-limit", {"accuracy__math__num_right": 850}, "inconclusive", 3),
    ("screening", {"purpose": "screen"}, "invalid", 4),
    ("invalid-and-missed", SLOW | {"samples__0__num_nonfinite_logits": 3}, "invalid", 4),
    ("projected", {"evidence": "projected"}, "not_measured", 5),
    ("projected-and-invalid", {"evidence": "projected", "purpose": "screen"}, "not_measured", 5),
]


@pytest.mark.parametrize(("changes", "verdict", "exit_code"), [pytest.param(*row[1:], id=row[0]) for row in VERDICTS])
def test_verdict_and_exit_code(changes: dict[str, Any], verdict: str, exit_code: int) -> None:
    """Identity before validity before a miss before doubt before a pass."""
    found = judged(samples.record("cpu", **changes))
    assert (found.verdict, found.exit_code) == (verdict, exit_code)


@pytest.mark.parametrize(
    ("rule", "kind", "changes"),
    [
        pytest.param(rule, kind, changes, id=f"{rule}-{place}")
        for rule, cases in known.BAD.items()
        for place, (kind, changes) in enumerate(cases)
    ],
)
def test_no_known_bad_record_passes(rule: str, kind: str, changes: dict[str, Any]) -> None:
    """Every fault ends in its rule's exit code or a graver one, and no limit is judged."""
    case = known.case_of(kind, changes)
    found = judge(
        [case.record], case.target, artifact_files=case.artifact_files, this_cpu=case.this_cpu, verified=case.verified
    )
    assert found.exit_code in {4, 5}
    assert found.exit_code >= {"I": 5, "V": 4}[rule[0]]
    assert found.verdict in {"invalid", "not_measured"}
    assert rule in {finding.rule for finding in found.findings}
    assert {line.verdict for line in found.lines} == {found.verdict}
    assert all(line.value is None for line in found.lines)


@pytest.mark.parametrize(
    ("changes", "kind", "target", "evidence"),
    [
        ({}, "cpu", "gtx1660", "measured_other_device"),
        ({}, "cuda", "host", "measured_other_device"),
        ({"device__name": "NVIDIA GeForce GTX 1660 SUPER"}, "cuda", "gtx1660", "measured_other_device"),
        ({"evidence": "simulated", "device__is_simulated": True}, "cuda", "gtx1660", "simulated"),
        ({"evidence": "projected"}, "cuda", "gtx1660", "projected"),
        ({"purpose": "screen"}, "cpu", "host", "measured_target"),
    ],
    ids=["cpu-for-gpu", "gpu-for-cpu", "sibling", "simulated", "projected", "invalid-on-target"],
)
def test_evidence_is_named(changes: dict[str, Any], kind: str, target: str, evidence: str) -> None:
    """What kind of evidence a record is does not depend on whether it would pass."""
    assert judged(samples.record(kind, **changes), target=target).evidence == evidence


@pytest.mark.parametrize("evidence", ["projected", "simulated"])
def test_the_weakest_record_says_what_kind_of_evidence_all_are(evidence: str) -> None:
    """A measured one beside it, before or behind, lends it nothing."""
    good, weak = samples.record("cpu"), samples.second(run_id="weak", evidence=evidence)
    assert judged(good, weak).evidence == judged(weak, good).evidence == evidence


def test_another_device_is_not_measured() -> None:
    """On a machine without the card, `gtx1660` is not measured: exit code 5, and the reason names both devices."""
    found = judged(samples.record("cpu"), target="gtx1660")
    assert (found.verdict, found.exit_code) == ("not_measured", 5)
    assert "Example 9000" in found.reason


def test_a_fault_of_the_artifact_is_invalid_but_not_another_device() -> None:
    """A stale artifact is exit code 5, yet the evidence is of the target."""
    found = judged(samples.record("cpu"), artifact_files={"model.onnx": "f" * 64, "model.onnx.data": "b" * 64})
    assert (found.verdict, found.exit_code, found.evidence) == ("invalid", 5, "measured_target")


def test_more_records_are_more_samples() -> None:
    """Two sessions of one artifact on one device are judged as one."""
    found = judged(samples.record("cpu"), samples.second(run_id="second"))
    assert found.verdict == "pass"
    assert found.lines[0].num_samples == 2 * 100
    assert found.run_ids == ("good-cpu", "second")


def test_a_record_counts_once() -> None:
    """The same file twice would double its weight: refused, also under another name with the same run."""
    record = samples.record("cpu")
    for twin in (record, samples.record("cpu", created_utc="2026-11-22T07:00:00Z")):
        found = judged(record, twin)
        assert (found.verdict, found.exit_code) == ("invalid", 5)
        assert [finding.rule for finding in found.findings] == ["J01"]


def test_a_record_under_another_run_is_no_second_session() -> None:
    """Timings equal to the nanosecond are a copy, whatever the record calls itself; its twin by other times passes."""
    copied = judged(samples.record("cpu"), samples.record("cpu", run_id="b"))
    assert (copied.exit_code, [finding.rule for finding in copied.findings]) == (5, ["J04"])
    assert judged(samples.record("cpu"), samples.second()).exit_code == 0


ROWS_APART = {
    "same-rows-other-counts": ({"num_right": 700}, 4),
    "same-rows-twice": ({}, 0),
    "as-many-other-rows": ({"rows_sha256": "f" * 64}, 4),
    "more-rows": ({"rows_sha256": "f" * 64, "num_rows": 1001}, 0),
    "another-split": ({"rows_sha256": "f" * 64, "split": "search"}, 0),
}


@pytest.mark.parametrize(("changes", "exit_code"), ROWS_APART.values(), ids=ROWS_APART)
def test_no_row_counts_twice(changes: dict[str, Any], exit_code: int) -> None:
    """Rows with two scores, and two sets of which neither is the larger, decide nothing, in whatever order given."""
    pair = [samples.record("cpu"), samples.second(accuracy__math=samples.accuracy(0) | changes)]
    for records in (pair, pair[::-1]):
        found = judged(*records)
        assert (found.exit_code, [finding.rule for finding in found.findings]) == (
            exit_code,
            ["J03"] if exit_code else [],
        )


ASKED = {"metric": "number", "task_sha256": samples.accuracy(0)["task_sha256"], "few_shot": 0, "chat": False}


@pytest.mark.parametrize("changes", [{"task_sha256": "b" * 64}, {"few_shot": 5}, {"chat": True}], ids=str)
def test_rows_asked_in_two_ways_are_not_judged_as_one(changes: dict[str, Any]) -> None:
    """Another task file, more solved rows, or a chat template make another score, even of more rows."""
    counts = samples.accuracy(0)
    first = samples.record("cpu", accuracy__math=counts | ASKED)
    more = counts | ASKED | {"rows_sha256": "f" * 64, "num_rows": 1001}
    assert judged(first, samples.second(accuracy__math=more)).exit_code == 0
    found = judged(first, samples.second(accuracy__math=more | changes))
    assert (found.exit_code, [finding.rule for finding in found.findings]) == (4, ["J03"])
    assert "asked in two ways" in found.findings[0].reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"subject__files__model.onnx": "9" * 64}, "artifact"),
        ({"device__fingerprint": "9" * 64}, "device"),
        ({"subject__weight_bytes": 40_000_000}, "weights"),
        ({"workload__seed": 5}, ""),
        ({"protocol__num_threads": 1}, "threads"),
        ({"host__versions__onnxruntime-gpu": "1.30.0"}, "versions"),
        ({"workload__prompt_tokens": 256}, "workload"),
        ({"protocol__provider": "CUDAExecutionProvider"}, "provider"),
        ({"protocol__provider_options": {"arena": "off"}}, "provider options"),
        ({"protocol__kv_cache": "allocated"}, "keys and values"),
    ],
    ids=[
        "artifact",
        "device",
        "weights",
        "seed-may-differ",
        "threads",
        "versions",
        "workload",
        "provider",
        "options",
        "cache",
    ],
)
def test_records_of_another_kind_do_not_join(changes: dict[str, Any], word: str) -> None:
    """Records that differ in what they measured, or with what, are refused by name; another seed is wanted."""
    found = judged(samples.record("cpu"), samples.second(run_id="second", **changes))
    if word:
        assert found.exit_code == 5
        assert word in found.reason
    else:
        assert found.verdict == "pass"


def test_disturbed_samples_are_told_of_what_is_undecided() -> None:
    """There they are what to mend first; a proven miss stays one on a quiet machine."""
    line = dataclasses.replace(judged(samples.record("cpu")).lines[0], num_disturbed=3, num_samples=10)
    undecided, missed = (dataclasses.replace(line, verdict=verdict) for verdict in ("inconclusive", "fail"))
    assert summary([undecided]).endswith("(3 of 10 samples were disturbed: free the machine)")
    assert summary([missed]).endswith(missed.metric)


def test_one_bad_record_spoils_all() -> None:
    """A good record does not vouch for a bad one beside it."""
    found = judged(samples.record("cpu"), samples.second(run_id="second", purpose="screen"))
    assert (found.verdict, found.exit_code) == ("invalid", 4)
    assert [finding.run_id for finding in found.findings] == ["second"]


def test_no_record_is_no_verdict() -> None:
    """Judging nothing is a usage error."""
    with pytest.raises(HavocError, match="no record"):
        judge([], load_target("host"))


@given(st.lists(st.sampled_from(["pass", "fail", "inconclusive", "not_measured"]), min_size=1))
def test_nothing_undecided_passes(verdicts: list[Any]) -> None:
    """The whole passes exactly when every part does, and fails exactly when a part does."""
    limit = load_target("host").limits[0]
    joined = overall([line_without_data(limit, verdict, "") for verdict in verdicts])
    assert (joined == "pass") == (set(verdicts) == {"pass"})
    assert (joined == "fail") == ("fail" in verdicts)


@given(st.integers(0, 4), st.integers(0, 19), st.integers(20_300_000, 2**40))
@settings(max_examples=60)
def test_one_slower_sample_never_turns_a_fail_into_a_pass(process: int, call: int, slower_ns: int) -> None:
    """Whatever sample of a failing record gets slower, the record does not pass."""
    bad = samples.changed(samples.document("cpu"), **SLOW)
    calls = bad["samples"][process]["prefill"]
    calls["duration_ns"][call] = max(slower_ns, calls["duration_ns"][call])
    calls["start_ns"] = [place * (2**41) for place in range(20)]
    assert judged(samples.sealed(bad)).verdict != "pass"


def test_the_same_record_gives_the_same_verdict() -> None:
    """The bootstrap is seeded: judging twice gives equal documents."""
    record = samples.record("cpu")
    assert judged(record).document() == judged(record).document()


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    """A number changed in the file is found by its seal: exit code 5."""
    path = tmp_path / "record.json"
    samples.record("cpu").save(path)
    assert judged(load_record(path)).verdict == "pass"
    path.write_text(path.read_text().replace('"num_right": 900', '"num_right": 990'))
    with pytest.raises(IdentityError, match="changed"):
        load_record(path)


def test_an_artifact_with_a_changed_byte_is_refused(own_artifact: Path, tiny_record: Record) -> None:
    """The artifact at hand is hashed anew, so neither its files nor its manifest can be of another build."""
    subject = tiny_record.subject
    assert hash_artifact(own_artifact) == {**subject.files, "manifest.json": subject.manifest_sha256}
    data = own_artifact / "model.onnx.data"
    blob = bytearray(data.read_bytes())
    blob[-1] ^= 1
    data.write_bytes(blob)
    with pytest.raises(IdentityError, match=r"model\.onnx\.data"):
        hash_artifact(own_artifact)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    """Pointing --artifact at the wrong place is a usage error, not a verdict."""
    with pytest.raises(HavocError) as caught:
        hash_artifact(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no such rights there")
def test_an_artifact_that_may_not_be_read_is_one_line(tiny_artifact: Path) -> None:
    """Without the right to read a file or the folder: a reason and exit code 2, no traceback."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        artifact = Path(shutil.copytree(tiny_artifact, Path(folder) / "artifact"))
        Path(folder).chmod(0o755)
        artifact.chmod(0o755)
        (artifact / "model.onnx.data").chmod(0)
        stack.callback(artifact.chmod, 0o700)
        if os.geteuid() == 0:  # root may read everything
            stack.callback(os.seteuid, 0)
            os.seteuid(65534)
        with pytest.raises(HavocError, match="cannot be read") as caught:
            hash_artifact(artifact)
    assert type(caught.value) is HavocError
    assert "\n" not in str(caught.value)


def test_a_real_short_record_is_undecided_at_best(tiny_record: Record) -> None:
    """A real measurement of two processes never passes: five are needed; and it is judged without an exception."""
    target = load_target("host")
    wanted = target.workload.model_copy(
        update={
            name: getattr(tiny_record.workload, name) for name in ("prompt_tokens", "context_tokens", "decode_tokens")
        }
    )
    found = judge([tiny_record], target.model_copy(update={"workload": wanted}), this_cpu=identify_cpu())
    assert found.verdict != "pass"
    assert found.exit_code != 0


def test_a_record_grows_stale_where_the_target_says_when() -> None:
    """`max_age_days` was promised and not checked: a day before it passes, a day after it is refused with both ages."""
    target = load_target("gtx1660").model_copy(update={"max_age_days": 30.0})
    record = samples.record("cuda", created_utc="2026-06-01T00:00:00Z")
    made = datetime(2026, 6, 1, tzinfo=UTC)
    assert judge([record], target, now=made + timedelta(days=29)).verdict == "pass"
    found = judge([record], target, now=made + timedelta(days=31))
    assert (found.verdict, found.exit_code) == ("invalid", 5)
    assert "31.0 days ago" in found.reason
    assert "at most 30 days" in found.reason
    assert judge([record], load_target("gtx1660"), now=made + timedelta(days=400)).verdict == "pass"
