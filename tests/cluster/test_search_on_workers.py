"""A search whose workers drift, and one whose scheduler is lost: both end with the journal of an undisturbed one."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from havoc_core.model.checkpoint import BUNDLED_NANO
from havoc_core.storage import read_journal, sha256_file

pytestmark = pytest.mark.alone


def test_a_drifting_worker_is_not_believed(
    cluster: Any, two_experts: Path, quiet_journal: bytes, tmp_path: Path
) -> None:
    """A card that falls to half its speed measures no more; what it measured since its last sentinel is done again."""
    cluster.worker(card=0, name="a", seconds=0.5)
    cluster.worker(card=1, name="b", seconds=0.5)
    cluster.wait_for(2)
    search = cluster.search(tmp_path / "out", two_experts)
    while not (busy := [device for device, count in num_begun(cluster.log).items() if count > 2]):
        assert search.is_running(), search.said  # that device measures int8, and has measured the sentinel twice
        time.sleep(0.02)
    cluster.log.with_name(f"slow-{busy[0]}").touch()
    assert search.wait() == 0, search.said
    assert search.journal.read_bytes() == quiet_journal
    assert "measures no more: prefill_ms of the sentinel moved by +100.0%" in search.said
    events = read_journal(tmp_path / "out" / "search" / "cluster.jsonl")
    (quarantined,) = [event for event in events if "quarantined" in event]
    assert "noise allows 6.0%" in quarantined["why"]


def num_begun(log: Path) -> dict[str, int]:
    """How many measurements each device has begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith("begin"))


def test_a_lost_scheduler_ends_the_search_and_the_same_command_goes_on(
    cluster: Any, two_experts: Path, quiet_journal: bytes, tmp_path: Path
) -> None:
    """One line and exit 4 for search and worker; nothing finished is done again, and no base is sent again."""
    worker = cluster.worker(card=0, seconds=0.2)
    cluster.wait_for(1)
    search = cluster.search(tmp_path / "out", two_experts)
    while not search.journal.exists() or len(read_journal(search.journal)) < 8:  # costs, divergences, some answers
        assert search.is_running(), search.said
        time.sleep(0.02)
    cluster.scheduler.kill()
    cluster.scheduler.wait()
    assert search.wait() == 4, search.said
    assert "results so far are kept" in search.said
    assert worker.wait(timeout=60) == 4
    assert cluster.said().splitlines()[-1].endswith("start this worker again")
    kept = search.journal.read_bytes()
    assert quiet_journal.startswith(kept)
    assert kept != quiet_journal
    cluster.restart()
    cluster.worker(card=0, seconds=0.2)
    cluster.wait_for(2)
    again = cluster.search(tmp_path / "out", two_experts)
    assert again.wait() == 0, again.said
    assert again.journal.read_bytes() == quiet_journal
    sent = [event["sent"] for event in read_journal(tmp_path / "out" / "search" / "cluster.jsonl") if "sent" in event]
    assert sent.count(sha256_file(BUNDLED_NANO / "model.safetensors")) == 1
    assert len(sent) == len(set(sent))
