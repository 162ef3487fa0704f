"""The lease on a device outlives whoever took it, as long as what they started still measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from havoc_core.children import start_process
from havoc_core.cluster.lease import held
from havoc_core.errors import MeasurementError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="leases are locks of Linux and macOS")

HOLDER = """
import sys
from pathlib import Path
from havoc_core.children import start_process
from havoc_core.children import start_process
from havoc_core.cluster.lease import held
with held(Path(sys.argv[1])):
    child = start_process([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    child.wait()
"""


def test_a_killed_holder_keeps_the_device_until_its_child_is_gone(tmp_path: Path) -> None:
    """Signal 9 to the worker frees nothing while its measuring child lives; the end of the child does."""
    path = tmp_path / "lease"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
    try:
        with pytest.raises(MeasurementError, match="held this device"), held(path, wait_s=0.2):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    started_s = time.monotonic()
    with held(path, wait_s=20.0):
        assert time.monotonic() - started_s < 20


def test_a_child_outside_the_block_holds_nothing(tmp_path: Path) -> None:
    """Only what was started under the lease keeps it."""
    path = tmp_path / "lease"
    words = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    before = start_process(words)
    with held(path):
        pass
    after = start_process(words)
    try:
        with held(path, wait_s=0.0):
            pass
    finally:
        for child in (before, after):
            child.kill()
            child.wait()
