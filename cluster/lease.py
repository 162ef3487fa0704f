"""The lease on a device: the process that measures holds it, together with every child it starts to measure.

The operating system frees the lease when the last of these processes has ended, for any reason. If a worker is killed
while its child still measures, the child keeps the lease, so two measurements never run at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..children import lent
from ..errors import HavocError, MeasurementError
from ..storage import explained, sha256_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..bench.judge.schema import Device

if sys.platform != "win32":
    import fcntl

_WAIT_S = 600.0
_ASK_EVERY_S = 0.02


def lease_path(device: Device) -> Path:
    """The lock file of a device of this machine: one for each card, by its UUID, and one for the CPU as a whole."""
    gpu = device.gpu
    witnesses = () if gpu is None else (gpu.nvml, gpu.cuda)
    uuid = next((one.uuid_sha256 for one in witnesses if one is not None and one.uuid_sha256), None)
    return Path(tempfile.gettempdir()) / f"havoc-lease-{os.getuid()}-{sha256_json([device.kind, uuid])[:16]}"


@contextlib.contextmanager
def held(path: Path, *, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Hold the lease of the lock file `path` and pass it to children; wait up to `wait_s` seconds to get it.

    Raises `MeasurementError` if it does not become free in that time.
    """
    if sys.platform == "win32":
        raise HavocError("a lease on a device needs a file lock of Linux or macOS: measure on such a machine")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise explained(error, path) from error
    try:
        deadline_s = time.monotonic() + wait_s
        while not _is_locked(descriptor):
            if time.monotonic() > deadline_s:
                raise MeasurementError(
                    f"another process has held this device for {wait_s:g} s: wait until its measurement ends, or end it"
                )
            time.sleep(_ASK_EVERY_S)
        with lent(descriptor):
            yield
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
