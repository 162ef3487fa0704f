"""Records: what is written is read back unchanged, and nothing else is read at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from havoc_core.bench.judge import record as record_module
from havoc_core.bench.judge.record import Record, json_schema, load_record, seal_of
from havoc_core.errors import HavocError, IdentityError

REMOVE = object()
FIRST_SAMPLE = "samples/0/prefill/duration_ns/0"


def example_document(**changes: Any) -> dict[str, Any]:
    """Return the JSON document of a valid, unsealed CPU record; `changes` replace top-level keys."""
    processes = [_process(index) for index in range(5)]
    document: dict[str, Any] = {
        "schema_version": 1,
        "run_id": "20261122-061500-abcdef",
        "created_utc": "2026-11-22T06:15:00Z",
        "tool": {"version": "0.1.0"},
        "evidence": "measured",
        "purpose": "confirm",
        "subject": {
            "name": "havoc",
            "files": {"model.onnx": "a" * 64, "model.onnx.data": "b" * 64},
            "graph_sha256": "a" * 64,
            "weight_bytes": 20_000_000,
            "weight_format": "fp32",
            "activation_dtype": "fp32",
        },
        "workload": {},
        "device": {"kind": "cpu", "name": "AMD EPYC", "cpu": _cpu(), "fingerprint": "c" * 64},
        "host": {
            "os": "Linux",
            "kernel": "6.1.0",
            "ram_bytes": 16_000_000_000,
            "swap_bytes": 0,
            "versions": {"onnxruntime": "1.31.1"},
        },
        "protocol": {
            "profile": "standard",
            "provider": "CPUExecutionProvider",
            "num_processes": 5,
            "num_threads": 2,
            "min_busy_s": 0.0,
            "warmup_tolerance": 0.02,
        },
        "samples": processes,
        "memory": {"rss": [{"process": 0, "method": "VmHWM", "baseline_bytes": 50_000_000, "peak_bytes": 110_000_000}]},
        "provenance": {"protocol_sha256": "d" * 64},
    }
    return {**document, **changes}


def example_record(**changes: Any) -> Record:
    """Return the sealed record of `example_document`."""
    return Record.model_validate(example_document(**changes), strict=False).sealed()


def _cpu() -> dict[str, Any]:
    return {
        "name": "AMD EPYC",
        "vendor": "AuthenticAMD",
        "architecture": "x86_64",
        "features": ["avx2", "fma"],
        "num_logical_cores": 2,
        "num_usable_cores": 2,
    }


def _process(index: int) -> dict[str, Any]:
    durations = [20_000_000 + 10_000 * ((7 * call + index) % 13) for call in range(20)]
    starts = [100_000_000 + 21_000_000 * call for call in range(20)]
    step_ns = [2_000_000 + 1_000 * (step % 7) for step in range(127)]
    return {
        "process": index,
        "load_ns": 150_000_000,
        "cold_ns": 30_000_000,
        "warmup": {"classification": "flat", "calls": {}},
        "prefill": {"start_ns": starts, "duration_ns": durations},
        "ttft": {"start_ns": starts[:5], "duration_ns": durations[:5]},
        "decode": [{"start_ns": 700_000_000, "prefill_ns": 20_000_000, "step_ns": step_ns, "num_tokens": 128}],
        "nodes_by_provider": {"CPUExecutionProvider": 120},
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "record.json"
    example_record().save(path)
    return path


def _edit(path: Path, where: str, value: Any, *, reseal: bool = False) -> None:
    """Set the value at the dotted path `where` (REMOVE takes it out) and write the file back."""
    document = json.loads(path.read_text())
    *parents, last = where.split("/")
    node: Any = document
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is REMOVE:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    if reseal:
        document["sha256"] = seal_of(document)
    path.write_text(json.dumps(document))


def _refused(path: Path, words: str, error: type[HavocError] = HavocError) -> None:
    with pytest.raises(HavocError) as caught:
        load_record(path)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def _equal_or_refused(path: Path) -> None:
    """No other exception, no other content."""
    reason = ""
    try:
        loaded = load_record(path)
    except HavocError as error:
        reason = str(error)
    else:
        assert loaded == example_record()
    assert "\n" not in reason


def test_round_trip(saved: Path) -> None:
    """A saved record is read back equal, sealed and intact."""
    loaded = load_record(saved)
    assert loaded == example_record()
    assert loaded.is_intact()


def test_reformatting_is_no_edit(saved: Path) -> None:
    """The seal is over content: other spacing and key order keep a record valid."""
    document = json.loads(saved.read_text())
    saved.write_text(json.dumps(dict(reversed(document.items())), indent=4))
    assert load_record(saved).is_intact()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (FIRST_SAMPLE, 1_000_000),
        ("purpose", "release"),
        ("subject/files/model.onnx", "f" * 64),
        ("host/swap_bytes", 1),
        ("sha256", None),
        ("sha256", REMOVE),
        ("sha256", "0" * 64),
    ],
)
def test_edited_record_is_refused(saved: Path, where: str, value: Any) -> None:
    """Any changed value breaks the seal (exit 5)."""
    _edit(saved, where, value)
    _refused(saved, "changed after it was written", IdentityError)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("schema_version", 2, "newer than this program's 1"),
        ("schema_version", "1", "schema_version"),
        ("schema_version", REMOVE, "not a HAVOC record"),
        ("extra", 1, "extra"),
        (FIRST_SAMPLE, 0, "greater than 0"),
        (FIRST_SAMPLE, -5, "greater than 0"),
        (FIRST_SAMPLE, 1.5e6, "integer"),
        (FIRST_SAMPLE, "20000000", "integer"),
        (FIRST_SAMPLE, None, "integer"),
        (FIRST_SAMPLE, REMOVE, "20 start times for 19 durations"),
        ("memory/rss/0/peak_bytes", 0, "greater than 0"),
        ("memory/rss/0/time_ns", [1, 2], "0 memory readings at 2 times"),
        ("accuracy", {"a/b": {}}, "accuracy"),
        ("subject/files", {"/etc/passwd": "a" * 64}, "pattern"),
        ("subject/files", {"../model.onnx": "a" * 64}, "pattern"),
        ("device/is_simulated", True, "simulated device cannot give measured evidence"),
        ("device/kind", "cuda", "needs its gpu identity"),
        ("device", REMOVE, "device"),
        ("created_utc", "yesterday", "created_utc"),
    ],
)
def test_schema_is_strict(saved: Path, where: str, value: Any, words: str) -> None:
    """Unknown keys, wrong types, zeros, newer schemas: one line, exit 2, even with a valid seal."""
    _edit(saved, where, value, reseal=True)
    _refused(saved, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "not a HAVOC record"),
        (b"null", "not a HAVOC record"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": 1, "x": -Infinity}', "Infinity"),
        (b'{"schema_version": 1, "x": -1e999}', "-1e999 is too large"),
        (b'{"schema_version": 1, "x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"schema_version": 1, "x": "\\ud800"}', "not a valid record"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"schema_version": 1, "x": ' + b"[" * 900 + b"]" * 900 + b"}", "not a valid record"),
    ],
    ids=["empty", "binary", "list", "null", "nan", "infinity", "overflow", "digits", "surrogate", "deep", "half-deep"],
)
def test_garbage_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    """Whatever bytes a file holds, the answer is one line."""
    path = tmp_path / "record.json"
    path.write_bytes(data)
    _refused(path, words)


def test_truncated_record_is_refused(saved: Path) -> None:
    """Half a record is no record."""
    data = saved.read_bytes()
    saved.write_bytes(data[: len(data) // 2])
    _refused(saved, "not valid JSON")


def test_a_gigantic_or_endless_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than a record can have: a file beyond the limit, and one whose size nobody knows."""
    monkeypatch.setattr(record_module, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "record.json"
    path.write_bytes(b" " * 1001)
    _refused(path, "more than 1000 bytes")
    path.write_bytes(b" " * 1000)
    _refused(path, "not valid JSON")
    if Path("/dev/zero").exists():
        _refused(Path("/dev/zero"), "pipe or device")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """A path that is not there, or is a folder, is named."""
    _refused(tmp_path / "none.json", "no such file")
    _refused(tmp_path, "a folder")


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe, on which reading would wait for a writer for ever, is refused in one line."""
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(HavocError, match="not a file but a folder"):
        load_record(tmp_path / "record.json")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_record_never_surprises(saved: Path, data: st.DataObject) -> None:
    """A record with any value replaced by any JSON value loads equal or is refused with a HavocError."""
    document = example_record().document()
    node: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(node))) if isinstance(node, dict) else 0
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(_json_values)
            break
        node = node[key]
    target = saved.with_name("fuzzed.json")
    target.write_text(json.dumps(document))
    _equal_or_refused(target)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0, max_value=4000), junk=st.binary(max_size=6))
def test_damaged_bytes_never_surprise(saved: Path, cut: int, junk: bytes) -> None:
    """Bytes overwritten anywhere end in a HavocError or in the very same record."""
    data = saved.read_bytes()
    target = saved.with_name("damaged.json")
    target.write_bytes(data[:cut] + junk + data[cut + len(junk) :])
    _equal_or_refused(target)


def test_published_schema_is_in_step() -> None:
    """`record.schema.json` is what the code means: it accepts a real record and rejects an unknown key."""
    published = json.loads((Path(record_module.__file__).parent / "record.schema.json").read_text())
    assert published == json_schema(), "run: python -m havoc_core.bench.judge.record"
    jsonschema.validate(example_record().document(), published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**example_record().document(), "surprise": 1}, published)


def test_units_of_samples() -> None:
    """Nanoseconds become milliseconds and tokens per second, the first token excluded."""
    process = example_record().samples[0]
    assert process.prefill_ms[0] == process.prefill.duration_ns[0] / 1e6
    episode = process.decode[0]
    assert process.decode_tok_per_s == [127 / (sum(episode.step_ns) / 1e9)]
