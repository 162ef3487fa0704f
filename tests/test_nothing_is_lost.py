"""What was finished is not replaced unasked, pages stay in their folder, and killed runs leave no scraps."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from havoc_core import storage
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.export.runtime.artifact import read_manifest

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform == "win32", reason="it has no such locks and links")]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from havoc_core.export.package import export_artifact

    return export_artifact("nano", tmp_path_factory.mktemp("lost") / "artifact")


def test_two_benches_into_one_new_folder_keep_one_record(artifact: Path, tmp_path: Path) -> None:
    """The second is refused at once; both said success, and one record was gone."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "havoc_core", "bench", str(artifact), "--n", "0", "--out", str(out), "--quiet"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert second.returncode == 2, second.stderr
    assert "another process" in second.stderr


def test_export_does_not_replace_an_artifact_of_something_else(artifact: Path, tmp_path: Path) -> None:
    """The plain base took the place of a searched mixture unasked; asked it may, and the same again it may."""
    out = tmp_path / "artifact"
    shutil.copytree(artifact, out)
    words = ["export", "nano", "--out", str(out), "--quiet"]
    assert main(words) == 0
    path = out / "manifest.json"
    document = json.loads(path.read_text())
    document["mixture"].update(alpha={"math": 1.2}, expert_hashes={"math": "1" * 64})
    path.write_text(json.dumps(document))
    before = path.read_bytes()
    assert main(words) == 2
    assert main([*words, "--weights", "int8"]) == 2
    assert path.read_bytes() == before
    assert main([*words, "--weights", "int8", "--replace"]) == 0
    assert read_manifest(out).structure["weight_format"] == "int8"
    assert main(words) == 2  # the structure is another


def test_a_report_stays_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's name that is a link, and a folder that is one: what they lead to is not touched."""
    import runpy

    samples = runpy.run_path(str(Path(__file__).parent / "bench" / "sample_records.py"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    victim = elsewhere / "victim.txt"
    victim.write_text("mine")
    for name in ("report.html", "report.md", "junit.xml", "badge.json", "telemetry.csv", "SHA256SUMS"):
        run = tmp_path / "runs" / name
        samples["record"]("cpu").save(run / "record.json")
        (run / name).symlink_to(victim)
        assert main(["report", str(run)]) == 2
        assert "only into their own folder" in capsys.readouterr().err
        assert victim.read_text() == "mine"
        (run / name).unlink()
        assert main(["report", str(run)]) == 0
    linked = tmp_path / "linked"
    linked.mkdir()
    samples["record"]("cpu").save(elsewhere / "record.json")
    (linked / "run").symlink_to(elsewhere)
    assert main(["report", str(linked)]) == 0
    assert {path.name for path in elsewhere.iterdir()} == {"record.json", "victim.txt"}
    (linked / "index.html").unlink()
    (linked / "index.html").symlink_to(victim)
    assert main(["report", str(linked)]) == 2
    assert victim.read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
from havoc_core.storage import open_atomic, scratch_directory
where = sys.argv[1]
if where == "file":
    with open_atomic(Path(sys.argv[2])) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
with scratch_directory("havoc-test-") as folder:
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(where: str, path: Path, home: Path) -> None:
    command = [sys.executable, "-c", KILLED, where, str(path)]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(home)}, check=False)
    assert done.returncode == -signal.SIGKILL


def aged(path: Path) -> None:
    os.utime(path, (time.time() - 3600, time.time() - 3600))


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path: Path) -> None:
    """The half-written temporary of a killed process is removed; that of a living one is not, nor a young one."""
    path = tmp_path / "result.json"
    killed("file", path, tmp_path)
    (left,) = tmp_path.glob(".result.json.*.tmp")
    storage.write_json(path, 1)
    assert left.exists()
    aged(left)
    with left.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        storage.write_json(path, 2)
        assert left.exists()
    storage.write_json(path, 3)
    assert not left.exists()
    assert json.loads(path.read_text()) == 3


def test_scratch_folders_of_killed_runs_go_with_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the system's temporary folder too, where exported structures of a search took gigabytes."""
    killed("scratch", tmp_path, tmp_path)
    (left,) = tmp_path.glob("havoc-test-*")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with storage.scratch_directory("havoc-test-") as folder:
        assert left.exists()
        aged(left)
        aged(folder)
        with storage.scratch_directory("havoc-test-"):
            assert not left.exists()
            assert folder.exists()
    assert not list(tmp_path.glob("havoc-test-*"))


def test_a_link_among_what_was_left_is_not_followed(tmp_path: Path) -> None:
    """Somebody else's folder behind a name like that of a temporary stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / ".result.json.abcdefgh.tmp").symlink_to(kept)
    storage.write_json(tmp_path / "result.json", 1)
    assert kept.is_dir()


def test_a_broken_artifact_may_be_exported_again(artifact: Path, tmp_path: Path) -> None:
    """What is damaged is mended by the same command, without more words."""
    out = tmp_path / "artifact"
    shutil.copytree(artifact, out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(HavocError):
        read_manifest(out)
    assert main(["export", "nano", "--out", str(out), "--quiet"]) == 0
    read_manifest(out)
