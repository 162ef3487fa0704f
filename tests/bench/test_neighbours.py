"""Neighbours: a busy program is seen, named and waited for, and a quiet machine is not waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from havoc_core.bench.neighbours import Load, Neighbour, Snapshot, look, snapshot, wait_until_quiet
from havoc_core.progress import SILENT

pytestmark = pytest.mark.alone

BUSY = Load(1.4, 2, (Neighbour("cc1plus", 0.98),))
QUIET = Load(0.05, 2)


def test_what_was_used_between_two_snapshots() -> None:
    """Programs of one name count together, the busiest first; own processes and the idle are no neighbours.

    A worker of the kernel that took another name, and one whose id was used before, count from where they were.
    """
    before = Snapshot(
        10.0,
        {
            (1, 0): ("init", 5.0),
            (2, 3): ("cc1plus", 7.0),
            (4, 5): ("ended", 90.0),
            (8, 0): ("kworker/1:1-events", 600.0),
            (9, 9): ("havoc", 1.0),
        },
        100.0,
    )
    after = Snapshot(
        12.0,
        {
            (1, 0): ("init", 5.0),
            (2, 3): ("cc1plus", 8.0),
            (3, 700): ("cc1plus", 0.5),
            (4, 701): ("rsync", 0.2),
            (8, 0): ("kworker/1:1-mm_percpu_wq", 600.02),
            (9, 9): ("havoc", 3.0),
        },
        103.0,
    )
    load = after.since(before, own_pids={9})
    assert load.neighbours == (Neighbour("cc1plus", 0.75), Neighbour("rsync", 0.1))
    assert str(load.neighbours[0]) == "cc1plus (75% of a core)"
    assert load.cores == min(1.5, load.num_cpus)


def test_a_process_is_read_whatever_its_name(tmp_path: Path) -> None:
    """Parentheses and spaces in a name shift no field, and what is no process is left out."""
    for pid, name in (("7", "a b) (c"), ("8", "x\x1b[31m"), ("self", "s")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(f"7 ({name}) R 1 1 1 0 -1 0 0 0 0 0 200 100 0 0 20 0 1 0 5 0 0\n")
    assert snapshot(tmp_path).processes == {(7, 5): ("a b) (c", 3.0), (8, 5): ("x?[31m", 3.0)}


def test_a_busy_program_is_seen_and_named() -> None:
    """A loop in another process uses about a core, under its own name."""
    script = "import ctypes\nctypes.CDLL(None).prctl(15, b'havoc-neighbour')\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", script])
    try:
        time.sleep(0.5)
        load = look(1.0)
    finally:
        neighbour.kill()
        neighbour.wait()
    assert "havoc-neighbour" in {item.name for item in load.neighbours}
    assert load.cores > 0.1
    assert f"of {load.num_cpus} CPUs: " in str(load)


@pytest.mark.parametrize(
    ("seen", "wait_s", "num_looks", "last"),
    [
        ([QUIET], 30.0, 1, QUIET),
        ([BUSY, BUSY, QUIET, BUSY], 30.0, 3, QUIET),
        ([BUSY] * 99, 5.0, 6, BUSY),
        ([BUSY], 0.0, 1, BUSY),
    ],
    ids=["quiet", "becomes-quiet", "in-vain", "no-patience"],
)
def test_waiting_ends_when_it_is_quiet_or_too_late(seen: list[Load], wait_s: float, num_looks: int, last: Load) -> None:
    """It looks once a second, stops at the first quiet look, and never waits longer than it was told."""
    clock, looks = [0.0], []

    def watch() -> Load:
        clock[0] += 1.0
        looks.append(clock[0])
        return seen[len(looks) - 1]

    assert wait_until_quiet(wait_s, progress=SILENT, watch=watch, now=lambda: clock[0]) == last
    assert len(looks) == num_looks
