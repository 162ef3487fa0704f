"""Cold and warm loads: files are dropped from the page cache, and the bytes read from the disk prove the result.

`posix_fadvise(DONTNEED)` is only advice: file systems may ignore it, and pages that another process has mapped stay. So
the bytes that a load really read from the disk are counted (`read_bytes` of /proc/self/io, Linux), and they decide
whether the load was cold.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

PageCache = Literal["cold", "warm", "unknown"]
_IO = Path("/proc/self/io")
_MOST, _LITTLE = 0.9, 0.1


def put_out(files: Iterable[Path]) -> None:
    """Ask the kernel to drop `files` from the page cache; does nothing if the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def disk_read_bytes() -> int | None:
    """Bytes that the disk has read for this process so far; None if the kernel does not count or report them."""
    with contextlib.suppress(OSError, ValueError):
        for line in _IO.read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return None


def state_of(read_bytes: int | None, num_file_bytes: int) -> PageCache:
    """Name a load of files of that size by the share that it read from the disk: most, almost nothing, or between."""
    if read_bytes is None or num_file_bytes == 0:
        return "unknown"
    share = read_bytes / num_file_bytes
    return "cold" if share >= _MOST else "warm" if share <= _LITTLE else "unknown"
