"""A finished measurement outlives a full disk, and a failure leaves no folder that holds nothing."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from havoc_core.bench.judge.record import load_record
from havoc_core.bench.record_folder import keep
from havoc_core.errors import HavocError
from tests.bench import sample_records as samples


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test's own."""
    folder = tmp_path / "spare"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill_disk(monkeypatch: pytest.MonkeyPatch, *, num_free: int) -> None:
    """Let the system take only the last `num_free` of two files."""
    attempts: list[int] = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        attempts.append(descriptor)
        if len(attempts) <= 2 - num_free:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def test_a_record_is_saved_where_it_was_asked_for(tmp_path: Path, spare: Path) -> None:
    """The folder is made, and nothing is left elsewhere."""
    keep(samples.record("cpu"), tmp_path / "runs" / "first" / "record.json")
    assert load_record(tmp_path / "runs" / "first" / "record.json").run_id
    assert not list(spare.iterdir())


def test_a_full_disk_loses_no_measurement(tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record lies whole where the line says, and the folders that were made for it are gone."""
    fill_disk(monkeypatch, num_free=1)
    record = samples.record("cpu")
    with pytest.raises(HavocError, match="the disk is full.*saved: move") as caught:
        keep(record, tmp_path / "runs" / "first" / "record.json")
    assert "\n" not in str(caught.value)
    (kept,) = spare.iterdir()
    assert str(kept) in str(caught.value)
    assert load_record(kept).sha256 == record.sha256
    assert not (tmp_path / "runs").exists()


def test_no_space_anywhere_is_said(tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the temporary folder takes it, the line says that the measurement is lost; nothing is left."""
    fill_disk(monkeypatch, num_free=0)
    (tmp_path / "runs").mkdir()
    with pytest.raises(HavocError, match="could not be saved anywhere"):
        keep(samples.record("cpu"), tmp_path / "runs" / "first" / "record.json")
    assert not list((tmp_path / "runs").iterdir())
    assert not list(spare.iterdir())
