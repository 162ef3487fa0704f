"""Where the system has no room left, or no place: one line that says what to do, and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from havoc_core import cli
from havoc_core.children import NO_MORE, start_process
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.storage import explained, only_writer, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

DROP = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
RIGHTS = ["--inh-caps=-all,+dac_override,+dac_read_search", "--ambient-caps=-all,+dac_override,+dac_read_search"]


def havoc_as_nobody(words: list[str], *, limit: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user whom the kernel's limits hold, with the right to read what root reads."""
    havoc = f'exec "{sys.executable}" -m havoc_core "$@"'
    environment = os.environ | {"HOME": str(cwd), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [*DROP, *RIGHTS, "bash", "-c", f"ulimit {limit}; {havoc}", "havoc", *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def can_become_nobody() -> bool:
    """Whether this is root, and may hand the right to read to a user whom the limits hold."""
    if sys.platform != "linux" or shutil.which("setpriv") is None or os.geteuid() != 0:
        return False
    tried = subprocess.run([*DROP, *RIGHTS, sys.executable, "-c", "import numpy"], capture_output=True, check=False)
    return tried.returncode == 0


needs_limits = pytest.mark.skipif(
    not can_become_nobody(), reason="the kernel's limits hold for others than root, which only root can become"
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may use; that of `tmp_path` lies in one that only its owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@needs_limits
@pytest.mark.parametrize(
    "words",
    [
        ["bench", "{artifact}", "--out", "record", "--n", "0", "--quiet", "--wait", "0"],
        ["eval", "{artifact}", "--task", "math", "--n", "2", "--quiet"],
        ["verify", "{artifact}"],
        ["eval", "nano", "--task", "code", "--n", "2", "--quiet"],
    ],
    ids=["bench", "eval", "verify", "eval-base"],
)
def test_no_further_process(words: list[str], place: Path) -> None:
    """A used-up `ulimit -u`; it said that the artifact cannot be read, or that another process writes."""
    assert main(["export", "nano", "--out", str(place / "artifact"), "--quiet"]) == 0
    done = havoc_as_nobody([word.format(artifact=place / "artifact") for word in words], limit="-u 1", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "ulimit -u" in done.stderr.splitlines()[-1]
    assert not (place / "record").exists()


@needs_limits
def test_too_many_open_files(place: Path) -> None:
    """A used-up `ulimit -n` is named as such."""
    assert main(["export", "nano", "--out", str(place / "artifact"), "--quiet"]) == 0
    words = ["bench", str(place / "artifact"), "--out", "record", "--n", "0", "--quiet", "--wait", "0"]
    done = havoc_as_nobody(words, limit="-n 10", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "ulimit -n" in done.stderr.splitlines()[-1]


def test_a_process_that_cannot_start_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same without the kernel's help: of a process, of a thread, and of a library's panic."""

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(HavocError, match="ulimit -u"):
        start_process([sys.executable])
    panic = 'ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock, message: "..." }) }'
    for error in (RuntimeError("can't start new thread"), BaseException(panic)):
        assert cli._explain(error) == 2
        assert NO_MORE in capsys.readouterr().err
    for told in (explained, unreadable):
        assert "ulimit -n" in str(told(OSError(errno.EMFILE, "Too many open files"), "x"))


def test_what_fails_while_a_folder_is_held_is_told_as_it_is(tmp_path: Path) -> None:
    """It was told as another writer's lock, whatever it was."""
    with pytest.raises(BlockingIOError, match="of the body"), only_writer(tmp_path / "out"):
        raise BlockingIOError(errno.EAGAIN, "of the body")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded; it was a defect (exit 70) of a library deep inside."""
    name = os.fsdecode(bytes(tmp_path / "bad") + b"\xff")
    assert main(["export", "nano", "--out", name]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; a library ended the process with its own words."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    command = [sys.executable, "-m", "havoc_core", "export", "nano", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    monkeypatch.chdir(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "havoc: error: the working directory no longer exists: change into another one\n"


def test_glob_letters_in_a_data_folder_are_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder called `d[1]*` is read as it is called."""
    folder = tmp_path / "d[1]*" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    (folder / "test-0.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "1 + 1 = 2 #### 2"}\n')
    code = main(["eval", "nano", "--task", "gsm8k", "--data", str(tmp_path / "d[1]*"), "--n", "1", "--quiet"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "as folder d[1]* has it" in said.out


def test_what_a_library_prints_is_not_in_the_document(tmp_path: Path) -> None:
    """A runtime's banner on descriptor 1 goes to stderr; stdout is one JSON document, also into a pipe that closes."""
    script = """
import os, sys
import havoc_core.bench.commands as commands
from havoc_core.cli import main
handle = commands.handle_plan
def handle_plan(args):
    os.write(1, b"runtime: a banner\\n")
    code = handle(args)
    os.write(1, b"runtime: another\\n")
    return code
commands.handle_plan = handle_plan
sys.exit(main(["plan", "nano", "--target", "gtx1660", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["options"]
    assert done.stderr.count("runtime: a") == 2
    line = f"{sys.executable} -m havoc_core plan nano --target gtx1660 --json | head -c 20"
    piped = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert piped.returncode in {0, 141}
    assert piped.stderr == ""
