"""Two sides in lockstep: real processes that take turns, each with its own code; none stays behind."""

from __future__ import annotations

import os
import runpy
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.bench import lockstep
from havoc_core.bench.judge.record import Workload
from havoc_core.bench.lockstep import Side, measure_in_lockstep
from havoc_core.errors import HavocError, MeasurementError

pytestmark = pytest.mark.alone

commits = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "perf" / "compare_commits.py")))


def test_every_turn_is_counted(tiny_artifact: Path, small_workload: Workload) -> None:
    """Two blocks of three turns: a prefill and four steps each, with the CPU time of all their threads."""
    old, new = (Side(name=name, artifact=tiny_artifact) for name in ("old", "new"))
    blocks = measure_in_lockstep(old, new, num_blocks=2, num_exchanges=3, workload=small_workload)
    assert len(blocks) == 2
    for block in blocks:
        assert {quantity: len(pairs) for quantity, pairs in block.turns.items()} == {
            "prefill": 3,
            "decode step": 3,
            "time to first token": 3,
        }
        for prefills, firsts in zip(block.turns["prefill"], block.turns["time to first token"], strict=True):
            for prefill, first in zip(prefills, firsts, strict=True):
                assert prefill.wall_ns[0] <= first.wall_ns[0] < 1.5 * prefill.wall_ns[0] + 50e6
        assert all(1e5 < load_ns < 60e9 for load_ns in block.once["load"])
        if Path("/proc/self/status").exists():
            assert all(1e7 < peak < 1e10 for peak in block.once["peak memory"])
        for quantity, num_calls in (("prefill", 1), ("decode step", small_workload.decode_tokens - 1)):
            for batch in (batch for pair in block.turns[quantity] for batch in pair):
                assert len(batch.wall_ns) == num_calls
                assert min(batch.wall_ns) > 0
                assert batch.cpu_ns > 0


def test_what_takes_too_long_is_not_begun(tiny_artifact: Path, small_workload: Workload) -> None:
    """The budget is spent before the first block, or on it: none, or one, whatever was asked for."""
    side = Side(name="side", artifact=tiny_artifact)
    asked = {"num_blocks": 5, "num_exchanges": 1, "workload": small_workload}
    assert measure_in_lockstep(side, side, budget_s=-1.0, **asked) == []
    assert len(measure_in_lockstep(side, side, budget_s=1e-9, **asked)) == 1


def test_a_busy_machine_has_fewer_turns_before_fewer_blocks(tiny_artifact: Path, small_workload: Workload) -> None:
    """When a block has taken its part of the budget, the turns so far are enough, but not fewer than the fewest."""
    side = Side(name="side", artifact=tiny_artifact)
    (block,) = measure_in_lockstep(
        side, side, num_blocks=1, num_exchanges=10**6, budget_s=1e-9, workload=small_workload
    )
    assert len(block.turns["prefill"]) == lockstep.FEWEST_EXCHANGES
    blocks = measure_in_lockstep(side, side, num_blocks=2, num_exchanges=10**6, budget_s=8.0, workload=small_workload)
    assert min(len(block.turns["prefill"]) for block in blocks) > lockstep.FEWEST_EXCHANGES


def test_a_side_that_cannot_run_is_named(tiny_artifact: Path, tmp_path: Path, small_workload: Workload) -> None:
    """A folder that is no artifact ends in one line under the side's name, and the other side's process ends too."""
    sides = Side(name="the old one", artifact=tiny_artifact), Side(name="the new one", artifact=tmp_path)
    with pytest.raises(MeasurementError, match="^the new one: .* code 1") as caught:
        measure_in_lockstep(*sides, num_blocks=1, num_exchanges=1, workload=small_workload)
    assert "\n" not in str(caught.value)
    assert "manifest" in str(caught.value)


def test_a_side_that_hangs_is_ended(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the longest time of a block both processes are gone."""
    monkeypatch.setattr(lockstep, "TIMEOUT_S", 1.0)
    side = Side(name="slow", artifact=tiny_artifact)
    began = time.monotonic()
    with pytest.raises(HavocError, match="^slow: .* within 1 s"):
        measure_in_lockstep(side, side, num_blocks=1, num_exchanges=10**6)
    assert time.monotonic() - began < 60


def test_each_side_runs_its_own_code(tiny_artifact: Path, tmp_path: Path, small_workload: Workload) -> None:
    """The ruler is this checkout's, the decoder is the one that the side's interpreter finds: here one that dies."""
    tree = tmp_path / "tree"
    tree.mkdir()
    replaced = Path("export", "runtime", "decoder.py")
    for level in (Path(), *reversed(replaced.parents[:-1])):
        (tree / level).mkdir(exist_ok=True)
        for part in (commits.ROOT / level).iterdir():
            if not replaced.is_relative_to(level / part.name) and part.name not in {".git", ".venv"}:
                (tree / level / part.name).symlink_to(part)
    (tree / replaced).write_text('raise RuntimeError("the decoder of the other checkout")\n')
    (tmp_path / "side").mkdir()
    other = commits.side_of("other", tree, tmp_path / "side")
    broken = Side(name="other", artifact=tiny_artifact, python=other.python)
    own = Side(name="own", artifact=tiny_artifact)
    with pytest.raises(MeasurementError, match="^other: .*RuntimeError: the decoder"):
        measure_in_lockstep(own, broken, num_blocks=1, num_exchanges=1, workload=small_workload)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_no_process_stays_behind(tiny_artifact: Path, small_workload: Workload) -> None:
    """After the blocks, and after Ctrl-C in the middle of one."""
    before, side = _children(), Side(name="side", artifact=tiny_artifact)
    measure_in_lockstep(side, side, num_blocks=1, num_exchanges=1, workload=small_workload)
    assert _children() == before
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    with pytest.raises(KeyboardInterrupt):
        measure_in_lockstep(side, side, num_blocks=1, num_exchanges=10**6, workload=small_workload)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert _children() == before


def _children() -> set[str]:
    text = (Path("/proc/self/task") / str(os.getpid()) / "children").read_text()
    return set(text.split())
