"""What lies where a small file is expected may be endless: nothing is read whole, and no pipe is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from havoc_core.config import load_recipe
from havoc_core.errors import HavocError
from havoc_core.export.commands import _image
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.companions import carry
from havoc_core.export.runtime.external import external_locations
from havoc_core.model.config_file import read_config
from havoc_core.model.tokenizer import Tokenizer
from havoc_core.storage import Journal, read_json

READERS: dict[str, Callable[[Path], object]] = {
    "manifest.json": lambda path: read_manifest(path.parent),
    "config.json": lambda path: read_config(path.parent),
    "tokenizer.json": lambda path: Tokenizer.load(path.parent),
    "recipe.toml": load_recipe,
    "picture.png": _image,
    "LICENSE": lambda path: carry(path.parent, path.parent / "out"),
    "model.onnx": external_locations,
    "journal.jsonl": Journal,
    "front.json": read_json,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_gigabytes_is_refused_unread(name: str, tmp_path: Path) -> None:
    """A terabyte of zeros, of which the disk holds nothing: one line, and not by running out of memory."""
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HavocError, match=r"more than \d+ bytes"):
        READERS[name](path)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    """Nobody writes into it: a plain open would wait for ever."""
    os.mkfifo(tmp_path / name)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            READERS[name](tmp_path / name)
        except HavocError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert errors
    assert "\n" not in str(errors[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
@pytest.mark.parametrize("words", [("run", "R"), ("gate", "R"), ("generate", "nano", "--prompt", "a", "--image", "R")])
def test_the_command_does_not_wait_for_a_pipe(words: tuple[str, ...], tmp_path: Path) -> None:
    """Exit code 2 at once."""
    os.mkfifo(tmp_path / "R")
    command = [sys.executable, "-m", "havoc_core", *words, *(["--out", "out"] if words[0] == "run" else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
