"""What can go wrong while `havoc bench` runs: one line, the right exit code, nothing half-written, no child left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from havoc_core.bench.judge.record import load_record
from tests.alive import is_running
from tests.bench import sample_records as samples

Bench = Callable[..., "subprocess.Popen[str]"]
PATIENCE_S = 60.0

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the measuring child through /proc"),
]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Start `havoc bench ARTIFACT --out tmp_path/run`; whatever is still running at the end is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(artifact: Path, *, out: Path = tmp_path / "run") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "havoc_core", "bench", str(artifact), "--n", "0", "--out", str(out), "--quiet"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def measuring_child(parent: subprocess.Popen[str]) -> int:
    """The process that measures, once it is there."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = stat.read_text().rpartition(")")[2].split()
                is_worker = b"havoc_core.bench.worker" in (stat.parent / "cmdline").read_bytes()
            except OSError:
                continue
            if is_worker and int(words[1]) == parent.pid:
                return int(stat.parent.name)
        time.sleep(0.01)
    raise AssertionError("no child was started")


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def test_a_killed_child(bench: Bench, tiny_artifact: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-measurement, as the kernel sends it when memory runs out: exit 4, and no record."""
    process = bench(tiny_artifact)
    os.kill(measuring_child(process), signal.SIGKILL)
    code, out, err = ended(process)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "killed (signal 9)" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt(bench: Bench, tiny_artifact: Path, tmp_path: Path, sent: int, expected: int) -> None:
    """Ctrl-C, or the end a system asks for: the child goes too, and nothing was written."""
    process = bench(tiny_artifact)
    child = measuring_child(process)
    process.send_signal(sent)
    code, _, err = ended(process)
    assert code == expected
    assert "Traceback" not in err
    assert not is_running(child)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_goes_away(bench: Bench, own_artifact: Path, tmp_path: Path) -> None:
    """Removed while children measure: exit 5, since nobody knows any more what was measured."""
    process = bench(own_artifact)
    measuring_child(process)
    shutil.rmtree(own_artifact)
    code, out, err = ended(process)
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert "measure it again" in err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte(bench: Bench, own_artifact: Path, tmp_path: Path) -> None:
    """Weights that are not the manifest's: exit 5 before any child is started."""
    data = own_artifact / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    code, out, err = ended(bench(own_artifact))
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert "model.onnx.data" in err


def test_an_out_that_cannot_be_written(bench: Bench, tiny_artifact: Path, tmp_path: Path) -> None:
    """Found before the first process is measured, not after the last: exit 2."""
    (tmp_path / "file").write_text("in the way")
    began_s = time.monotonic()
    code, out, err = ended(bench(tiny_artifact, out=tmp_path / "file" / "run"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "not a folder" in err
    assert time.monotonic() - began_s < 10
    assert (tmp_path / "file").read_text() == "in the way"


def test_two_runtimes_at_once(tiny_artifact: Path, tmp_path: Path) -> None:
    """onnxruntime and onnxruntime-gpu in one environment: refused before anything runs, with the remedy; doctor too."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / "site" / f"{name.replace('-', '_')}-9.9.9.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "havoc_core"]
    words = ["bench", str(tiny_artifact), "--n", "0", "--out", str(tmp_path / "run"), "--quiet"]
    refused = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert "onnxruntime onnxruntime-gpu" in refused.stderr
    assert not (tmp_path / "run").exists()
    told = subprocess.run([*command, "doctor"], env=environment, capture_output=True, text=True)
    assert told.returncode == 0
    assert "onnxruntime and onnxruntime-gpu" in told.stdout


def test_a_reader_that_went_away(bench: Bench, tiny_artifact: Path, tmp_path: Path) -> None:
    """`havoc bench ... | head -0`: the record is written all the same, linked to the one before, silently."""
    before = samples.record("cpu")
    before.save(tmp_path / "before" / "record.json")
    process = bench(tiny_artifact)
    assert process.stdout is not None
    process.stdout.close()
    code = process.wait(timeout=PATIENCE_S)
    assert code == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    record = load_record(tmp_path / "run" / "record.json")
    assert len(record.samples) == 5
    assert record.provenance.previous_record_sha256 == before.sha256
