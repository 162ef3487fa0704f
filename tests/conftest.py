"""What every test starts from."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

# A job in the background starts with Ctrl-C ignored, one under nohup with a hangup, and both hand that on to their
# children; tests that send these signals need them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing here
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The base of `make real`: a Hugging Face directory or a GGUF file."""
    return _given("HAVOC_REAL_MODEL", "a Hugging Face directory or a .gguf file")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The data sets of `make real`: a directory laid out as docs/your-own-model.md says."""
    return _given("HAVOC_REAL_DATA", "a directory of public data sets")


def _given(variable: str, what: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names {what} for `make real`")
    path = Path(os.environ[variable])
    assert path.exists(), f"{variable}={path}: no such file or directory"
    return path
