"""The tutorial: its files and commands, one after the other, as a reader would type them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.model.checkpoint import BUNDLED_NANO

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]  # a busy machine is waited for, twice

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
DISTURBED = 4


def files() -> dict[str, str]:
    """Return the files that the page asks for, by name."""
    return dict(re.findall(r"`(\S+)`[^\n]*:\n\n```(?:jsonl|toml)\n(.*?)```", PAGE, re.DOTALL))


def commands() -> list[list[str]]:
    """Return the commands of HAVOC, word by word, but for the one that reads what was downloaded."""
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    words = [shlex.split(line) for line in lines]
    return [line for line in words if line[0] == "havoc" and not any("smollm2" in word for word in line)]


def test_the_tutorial_ends_in_a_gated_artifact(tmp_path: Path) -> None:
    """Every command does what the page says; what measures may say that the machine was disturbed, and nothing else."""
    shutil.copytree(BUNDLED_NANO, tmp_path / "my-model")
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    codes = {}
    for _, *words in commands():
        run = subprocess.run(
            [sys.executable, "-m", "havoc_core", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        codes[words[0]] = run.returncode
        measures = words[0] in {"run", "gate", "bench"}
        assert run.returncode in ({0, DISTURBED} if measures else {0}), (words, run.stdout[-2000:], run.stderr[-2000:])
    assert codes["gate"] == codes["run"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "verified.json").read_text())["is_rebuilt"] is True
    accuracy = json.loads((tmp_path / "measured" / "record.json").read_text())["accuracy"]
    assert list(accuracy) == ["reasoning"]
