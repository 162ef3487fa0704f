"""Cold or warm is what was read from the disk, never what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from havoc_core.bench import page_cache
from havoc_core.bench.page_cache import disk_read_bytes, put_out, state_of

pytestmark = pytest.mark.alone

NUM_BYTES = 8_000_000


@pytest.mark.parametrize(
    ("read_bytes", "num_file_bytes", "state"),
    [
        (None, 100, "unknown"),
        (0, 0, "unknown"),
        (0, 100, "warm"),
        (10, 100, "warm"),
        (11, 100, "unknown"),
        (89, 100, "unknown"),
        (90, 100, "cold"),
        (300, 100, "cold"),
    ],
)
def test_a_load_is_named_by_what_it_read(read_bytes: int | None, num_file_bytes: int, state: str) -> None:
    """Nine tenths from the disk are cold, up to a tenth is warm, all between and the untold is unknown."""
    assert state_of(read_bytes, num_file_bytes) == state


def test_files_put_out_are_read_again(tmp_path: Path) -> None:
    """On a file system that keeps a page cache, the bytes come from memory, and after put_out from the disk."""
    file = tmp_path / "weights"
    with file.open("wb") as written:
        written.write(os.urandom(NUM_BYTES))
        written.flush()
        os.fsync(written.fileno())
    counts = [disk_read_bytes()]
    for forget in (False, True):
        if forget:
            put_out([file, tmp_path / "none"])
        file.read_bytes()
        counts.append(disk_read_bytes())
    if None in counts or counts[2] == counts[1]:
        pytest.skip("this kernel does not count reads, or this file system has no page cache of its own")
    assert state_of(counts[1] - counts[0], NUM_BYTES) == "warm"
    assert state_of(counts[2] - counts[1], NUM_BYTES) == "cold"


def test_a_silent_kernel_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reads are not counted there is no number."""
    monkeypatch.setattr(page_cache, "_IO", tmp_path / "none")
    assert disk_read_bytes() is None
