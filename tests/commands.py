"""`havoc` as a person types it, in this process."""

from __future__ import annotations

import pytest

from havoc_core.cli import main


def run(*words: object) -> int:
    """The exit code."""
    return main([str(word) for word in words])


def run_and_read(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = run(*words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
