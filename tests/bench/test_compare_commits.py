"""`make compare`: a checkout against another commit, both exported and measured here, nothing left behind."""

from __future__ import annotations

import functools
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.bench import lockstep
from havoc_core.errors import HavocError, MeasurementError

pytestmark = pytest.mark.alone

commits = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "perf" / "compare_commits.py")))
NEEDLESS = "_ = [array.copy() for array in past.arrays()]"
STEP = "        return self.extend(token_ids, attention_mask, past)\n"
if shutil.which("git") is None:
    pytest.skip("git is not installed", allow_module_level=True)


def git(folder: Path, *words: str) -> None:
    names = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one commit that holds what runs, and the script."""
    folder = tmp_path_factory.mktemp("repository") / "tree"
    ignore = shutil.ignore_patterns(
        ".*", "tests", "docs", "reports", "demo", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(commits.ROOT, folder, ignore=ignore)
    script = Path("tests") / "perf" / "compare_commits.py"
    (folder / script).parent.mkdir(parents=True)
    shutil.copy(commits.ROOT / script, folder / script)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


@pytest.fixture
def checkout(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one's own, with temporary files beside it."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    return Path(shutil.copytree(committed, tmp_path / "tree", symlinks=True))


def compare(checkout: Path, name: str = "HEAD", *, num_blocks: int = 5, budget_s: float = 600.0) -> int:
    return commits.compare(name, num_blocks=num_blocks, margin=0.1, budget_s=budget_s, root=checkout)


def slow_down(checkout: Path) -> None:
    path = checkout / "export" / "runtime" / "decoder.py"
    text = path.read_text()
    assert STEP in text
    path.write_text(text.replace(STEP, f"        {NEEDLESS}\n{STEP}"))


def test_a_needless_copy_in_the_step_is_red(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uncommitted, in the decoder alone: decoding is proven slower, reading a prompt is not, and nothing stays."""
    briefly = functools.partial(lockstep.measure_in_lockstep, num_exchanges=6)  # the copy makes the step thrice as long
    monkeypatch.setitem(commits.compare.__globals__, "measure_in_lockstep", briefly)
    slow_down(checkout)
    assert compare(checkout) == 1
    said = capsys.readouterr().out
    assert said.startswith("WORSE: slower by more than 10% is proven")
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert " worse " in rows["decode step, CPU time"]
    assert " worse " not in rows["prefill, CPU time"]
    assert list((checkout.parent / "temporary").iterdir()) == []
    assert not (checkout / ".git" / "worktrees").exists()


def test_what_does_not_run_is_not_compared(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page, a test, a workflow: nothing is exported."""
    for name in ("docs/page.md", "tests/test_new.py", "README.md"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("changed\n")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "words")
    assert compare(checkout, "HEAD~1") == 0
    assert capsys.readouterr().out.startswith("SAME: nothing that runs differs from ")


def test_a_commit_that_is_not_here(checkout: Path) -> None:
    """One line that says what to do."""
    with pytest.raises(HavocError, match="no commit 'HEAD~7'"):
        compare(checkout, "HEAD~7")
    with pytest.raises(HavocError, match="no commit '--all' here"):
        compare(checkout, "--all")


def test_a_base_that_does_not_run_is_no_defect_of_the_change(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commit before cannot export: said, and not red. This checkout cannot: exit code 4."""
    sound = (checkout / "__main__.py").read_text()
    (checkout / "__main__.py").write_text('raise SystemExit("broken")\n')
    git(checkout, "commit", "--quiet", "--all", "--message", "broken")
    (checkout / "__main__.py").write_text(sound)
    assert compare(checkout, "HEAD") == 0
    assert "NOT COMPARED: commit" in capsys.readouterr().out
    git(checkout, "commit", "--quiet", "--all", "--message", "mended")
    (checkout / "__main__.py").write_text('raise SystemExit("broken")\n')
    with pytest.raises(MeasurementError, match="nano .exit code 1.: broken") as caught:
        compare(checkout, "HEAD")
    assert caught.value.exit_code == 4


def test_a_machine_too_busy_to_measure_is_undecided(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time was over before the first block: no red without a figure."""
    slow_down(checkout)
    monkeypatch.setitem(commits.compare.__globals__, "prepare", lambda side: None)
    assert compare(checkout, budget_s=0.0) == 0
    assert capsys.readouterr().out.startswith("UNDECIDED")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_stays_behind_when_it_is_stopped(checkout: Path, number: int, code: int) -> None:
    """Ctrl-C, and the end that a runner sends: the temporary folder goes, with all that was unpacked into it."""
    slow_down(checkout)
    temporary = checkout.parent / "temporary"
    script = [sys.executable, str(checkout / "tests" / "perf" / "compare_commits.py"), "HEAD"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(temporary.glob("havoc-compare-*/base/venv/lib/python3*/site-packages/side.pth")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert list(temporary.iterdir()) == []
