"""Measuring: real children on a real artifact; what they cost lands in the record, what goes wrong is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from havoc_core.bench.judge.record import Record, Workload, load_record
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.measure import measure, measure_cost
from havoc_core.bench.profiles import PROFILES, profile_named
from havoc_core.bench.subject import identify_subject
from havoc_core.bench.tool_version import identify_tool
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.held import file_states, require_unchanged
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.model.config_file import read_config
from havoc_core.model.hf_config import from_hf

pytestmark = pytest.mark.alone


def test_record_holds_what_was_asked(tiny_record: Record) -> None:
    """Every process, every call, every token: counted, timed and in the order of one clock."""
    assert [process.process for process in tiny_record.samples] == [0, 1]
    for process in tiny_record.samples:
        assert len(process.prefill.duration_ns) >= 3
        assert len(process.ttft.duration_ns) >= 2
        assert all(episode.num_tokens == 5 and len(episode.step_ns) == 4 for episode in process.decode)
        starts = process.prefill.start_ns
        assert all(b >= a + d for a, d, b in zip(starts, process.prefill.duration_ns, starts[1:], strict=False))
        assert set(process.nodes_by_provider) == {"CPUExecutionProvider"}
        assert process.num_nonfinite_logits == 0
        assert process.num_distinct_outputs > len(process.prefill.duration_ns)
        assert process.busy_ns >= sum(process.prefill.duration_ns)


def test_the_default_work_is_the_seeds() -> None:
    """One prompt of 512 tokens; the bundled targets ask for the same."""
    works = [Workload(), *(load_target(name).workload for name in ("gtx1660", "host"))]
    assert {(work.batch_size, work.prompt_tokens, work.context_tokens) for work in works} == {(1, 512, 512)}


def test_record_is_sealed_and_reads_back(tiny_record: Record, tmp_path: Path) -> None:
    """A measured record survives the disk."""
    tiny_record.save(tmp_path / "record.json")
    assert load_record(tmp_path / "record.json") == tiny_record


def test_peak_memory_is_of_the_child(tiny_record: Record) -> None:
    """The child's peak lies above its own baseline and below this process's, which has torch loaded."""
    (series,) = tiny_record.memory.rss
    assert series.method == "vm_hwm"
    assert series.baseline_bytes < series.phase_peak_bytes["load"] <= series.peak_bytes
    assert set(series.phase_peak_bytes) == {"load", "first_run", "steady"}
    assert series.reading_bytes
    assert max(series.reading_bytes) <= series.peak_bytes
    assert series.peak_bytes < 400_000_000
    assert tiny_record.memory.vram == ()
    assert "CPU" in tiny_record.memory.vram_reason


def test_record_names_no_machine(tiny_record: Record) -> None:
    """No host name, user name, home or artifact path in the file."""
    text = json.dumps(tiny_record.document())
    names = {os.uname().nodename, os.environ.get("USER"), os.environ.get("LOGNAME"), str(Path.home()), str(Path.cwd())}
    for name in names - {None, "", "root", "/", "localhost"}:
        assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
    assert "/tmp" not in text


def test_cold_start_stands_apart(tiny_record: Record) -> None:
    """A process of its own, and what it read from the disk decides whether it may be called cold."""
    cold = tiny_record.cold_start
    assert (cold.page_cache == "unknown") or (cold.page_cache == "cold") is (cold.read_bytes > 0)
    assert cold.startup_ns > 10_000_000
    assert min(cold.load_ns, cold.first_call_ns) > 0


def test_protocol_says_how(tiny_record: Record, tiny_artifact: Path) -> None:
    """Preallocated cache, provider options, repetitions; the tool by its commit; the model by its whole shape."""
    protocol = tiny_record.protocol
    assert (protocol.io_binding, protocol.kv_cache, protocol.is_gc_off) == (True, "preallocated", True)
    assert (protocol.provider_options, len(protocol.retry_reasons)) == ({}, protocol.num_retries)
    assert tiny_record.tool == identify_tool()
    assert from_hf(dict(tiny_record.subject.config)) == read_config(tiny_artifact)
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert (tiny_record.subject.structure, tiny_record.subject.graph) == (manifest["structure"], manifest["graph"])


def test_parent_sleeps(tiny_record: Record) -> None:
    """The harness uses next to no CPU while a child measures, and says how much."""
    check = next(check for check in tiny_record.checks if check.id == "parent_asleep")
    assert check.value < 0.05


def test_subject_is_the_artifact(tiny_record: Record, tiny_artifact: Path) -> None:
    """The record names every file of the artifact by its hash, and what its weights take."""
    manifest = json.loads((tiny_artifact / "manifest.json").read_text())
    assert tiny_record.subject.files == {name: file["sha256"] for name, file in manifest["files"].items()}
    assert tiny_record.workload.ttft_from == "text"
    assert tiny_record.subject.weight_bytes == (tiny_artifact / "model.onnx.data").stat().st_size


def test_cost_is_a_screening(tiny_artifact: Path, small_workload: Workload) -> None:
    """The short measurement gives three figures that its own samples prove, marked as a screening."""
    cost = measure_cost(tiny_artifact, workload=small_workload, num_threads=1)
    assert cost.record.purpose == "screen"
    assert cost.record.protocol.profile == "screen"
    assert cost.prefill_ms in cost.record.samples[0].prefill_ms
    assert cost.decode_tok_per_s in cost.record.samples[0].decode_tok_per_s
    assert cost.peak_bytes == cost.record.memory.peak_rss_bytes


def test_profiles_meet_the_bundled_targets() -> None:
    """Every profile meant for a verdict has at least 5 processes and 64 samples; release works for 600 s."""
    for name in ("quick", "standard", "release"):
        profile = PROFILES[name]
        assert profile.num_processes >= 5
        assert profile.num_processes * profile.prefill.min_calls >= 64
    busy = {
        name: profile.num_processes * sum(s.min_busy_s for s in (profile.prefill, profile.ttft, profile.decode))
        for name, profile in PROFILES.items()
    }
    assert busy["standard"] >= 60
    assert busy["release"] >= 600
    with pytest.raises(HavocError, match="unknown profile 'slow'"):
        profile_named("slow")


def test_changed_artifact_is_refused(own_artifact: Path) -> None:
    """One changed byte of the weights: exit 5, nothing measured."""
    data = own_artifact / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(IdentityError, match=r"model\.onnx\.data"):
        measure(own_artifact, profile="quick")


def test_artifact_that_changes_meanwhile_is_refused(own_artifact: Path) -> None:
    """Rewritten, replaced, or gone while children measured: exit 5, no record of nobody knows what."""
    states = file_states(own_artifact)
    require_unchanged(own_artifact, states)
    graph = own_artifact / "model.onnx"
    graph.write_bytes(graph.read_bytes())
    with pytest.raises(IdentityError, match=r"model\.onnx changed while"):
        require_unchanged(own_artifact, states)
    shutil.rmtree(own_artifact)
    with pytest.raises(IdentityError, match="disappeared while"):
        require_unchanged(own_artifact, states)


def test_an_artifact_that_changes_in_hiding_is_refused(own_artifact: Path) -> None:
    """In a folder inside it, or with the time of writing put back."""
    nested = own_artifact / "experts" / "z_vectors_math.safetensors"
    nested.parent.mkdir()
    nested.write_bytes(b"1" * 100)
    states = file_states(own_artifact)
    nested.write_bytes(b"2" * 101)
    with pytest.raises(IdentityError, match=r"experts/z_vectors_math\.safetensors changed while"):
        require_unchanged(own_artifact, states)
    states, data = file_states(own_artifact), own_artifact / "model.onnx.data"
    before = data.stat()
    with data.open("r+b") as file:
        file.write(b"\1" * 64)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IdentityError, match=r"model\.onnx\.data changed while"):
        require_unchanged(own_artifact, states)


def test_a_static_cache_that_is_too_short_says_how_long_it_must_be(tiny_artifact: Path, tmp_path: Path) -> None:
    """The workload's tokens and the option that holds them, in the line."""
    artifact = export_artifact(
        tiny_artifact.parent / "base", tmp_path / "static", options=GraphOptions(cache="static", cache_len=512)
    )
    with pytest.raises(HavocError, match="640 tokens, .* 512: .*--cache-len 640"):
        measure(artifact, profile="quick", num_threads=1)


def test_an_artifact_that_no_record_can_hold(own_artifact: Path) -> None:
    """What the manifest's reader lets through and a record does not is one line all the same."""
    path = own_artifact / "manifest.json"
    document = json.loads(path.read_text())
    document["format_cost"] = {"kl_mean": -1}
    path.write_text(json.dumps(document))
    with pytest.raises(HavocError, match=r"does not fit into a record .*kl_mean") as caught:
        identify_subject(own_artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_artifact_is_one_line(own_artifact: Path) -> None:
    """A file without read permission is named."""
    (own_artifact / "model.onnx.data").chmod(0)
    with pytest.raises(HavocError, match=r"model\.onnx\.data: Permission denied"):
        measure(own_artifact, profile="quick")


def test_bad_requests_are_one_line(tiny_artifact: Path, tmp_path: Path) -> None:
    """No artifact, no such provider, no threads, too long a workload: said in one line."""
    with pytest.raises(HavocError, match="no such artifact"):
        measure(tmp_path / "nothing", profile="quick")
    with pytest.raises(HavocError, match="unknown provider 'TPU'"):
        measure(tiny_artifact, provider="TPU")
    with pytest.raises(HavocError, match="at least 1"):
        measure(tiny_artifact, num_threads=-1)
    with pytest.raises(HavocError, match="4096 tokens of context, .* 1024"):
        measure_cost(tiny_artifact, workload=Workload(prompt_tokens=4096), num_threads=1)
