"""Which HAVOC measured: a commit only of its own checkout, and null for everything else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from havoc_core import __version__
from havoc_core.bench.tool_version import identify_tool


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "inner").mkdir(parents=True)
    (folder / "code.py").write_text("one = 1\n")
    for words in ("init -q", "add code.py", "-c user.name=a -c user.email=a@b commit -q -m one"):
        subprocess.run(["git", "-C", folder, *words.split()], check=True)
    return folder


def test_a_checkout_names_its_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit in full, clean until a tracked file differs, whatever repository the environment points to."""
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    clean = identify_tool(checkout)
    monkeypatch.delenv("GIT_DIR")
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert (clean.version, clean.git_commit, clean.is_git_dirty) == (__version__, head.stdout.strip(), False)
    (checkout / "notes").write_text("untracked files are not the program\n")
    assert identify_tool(checkout).is_git_dirty is False
    (checkout / "code.py").write_text("one = 2\n")
    assert identify_tool(checkout).is_git_dirty is True


def test_an_installation_names_no_commit(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository it lies inside, and none where git is missing or refuses."""
    assert identify_tool(checkout / "inner").git_commit is None
    (tmp_path / "broken" / ".git").mkdir(parents=True)
    assert identify_tool(tmp_path / "broken").git_commit is None
    monkeypatch.setenv("PATH", "")
    found = identify_tool(checkout)
    assert (found.git_commit, found.is_git_dirty) == (None, None)
