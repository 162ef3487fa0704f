"""The version of HAVOC and, in its own checkout, the commit; and the commits that added files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .. import __version__
from .judge.schema import Tool

PACKAGE = Path(__file__).resolve().parent.parent


def identify_tool(package: Path = PACKAGE) -> Tool:
    """Version, commit and whether tracked files differ from it; the last two None without a checkout or without git.

    Only a `.git` of the package's own folder counts: if HAVOC is installed inside another repository, that repository's
    commit says nothing about HAVOC.
    """
    if not (package / ".git").exists():
        return Tool(version=__version__)
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return Tool(version=__version__)
    return Tool(version=__version__, git_commit=commit, is_git_dirty=bool(changes))


def commits_that_added(directory: Path) -> dict[str, str]:
    """The commit that last added each file below a folder, by its path in it; empty outside of git."""
    words = ("-c", "core.quotePath=false", "log", "--diff-filter=A", "--name-only", "--format=:%H", "--relative")
    found: dict[str, str] = {}
    commit = ""
    for line in (_git(directory, *words, "--", ".") or "").splitlines():
        if line.startswith(":"):
            commit = line[1:]
        elif line:
            found.setdefault(line, commit)
    return found


def _git(package: Path, *words: str) -> str | None:
    """The output of git about that folder, independent of the caller's environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(package), *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
