"""A worker that dies costs one evaluation done twice, and nothing else: the journal is the same to the last byte.

Two workers score, three measure on two simulated cards, all real processes. HAVOC_KILLS of them (default 6;
`make cluster-test`: 100) are killed with signal 9 at random moments and started again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from havoc_core.storage import read_journal

pytestmark = pytest.mark.alone

NUM_KILLS = int(os.environ.get("HAVOC_KILLS", "6"))


def measured_spans(log: Path) -> Iterator[tuple[str, int, int | None]]:
    """Device, begin and end of every measurement; one that was itself ended has no end."""
    begun: dict[str, int] = {}
    for line in log.read_text().splitlines():
        word, device, t_ns = line.split()
        if word == "begin":
            assert device not in begun, f"two measurements at once on {device}"
            begun[device] = int(t_ns)
        else:
            yield device, begun.pop(device), int(t_ns)


def test_killed_workers_lose_nothing_and_repeat_nothing(
    cluster: Any, two_experts: Path, quiet_journal: bytes, tmp_path: Path
) -> None:
    """The journal is the same to the last byte as where all workers live; no device measures twice at once."""
    dice = random.Random(0)
    crew: list[tuple[Any, dict[str, Any]]] = []
    cards = ({"name": "c", "card": 0}, {"name": "d", "card": 1}, {"name": "e", "card": 0})  # two workers share a card
    for place in ({"name": "a"}, {"name": "b"}, *cards):
        crew.append((cluster.worker(**place, seconds=0.5 if "card" in place else 0.2), place))
    cluster.wait_for(5)
    num_kills = num_searches = 0
    while num_kills < NUM_KILLS:
        search = cluster.search(tmp_path / f"search{num_searches}", two_experts)
        while search.is_running():
            time.sleep(dice.uniform(0.5, 3.0))
            victim = dice.randrange(len(crew))
            worker, place = crew[victim]
            if search.is_running() and num_kills < NUM_KILLS and is_ready(cluster, worker.pid):
                os.kill(worker.pid, signal.SIGKILL)
                worker.wait()
                num_kills += 1
                crew[victim] = (cluster.worker(**place, seconds=0.5 if "card" in place else 0.2), place)
        assert search.wait() == 0, search.said
        assert search.journal.read_bytes() == quiet_journal
        keys = [entry["key"] for entry in read_journal(search.journal)[1:]]
        assert len(keys) == len(set(keys))
        num_searches += 1
    devices = {device for device, _, _ in measured_spans(cluster.log)}
    assert len(devices) == 2
    print(f"{num_kills} kills, {num_searches} searches, {cluster.log.read_text().count('begin')} measurements")


def is_ready(cluster: Any, pid: int) -> bool:
    """Whether the worker has said that it serves: one that still loads is nobody's loss."""
    return f"-{pid} at " in cluster.said()
