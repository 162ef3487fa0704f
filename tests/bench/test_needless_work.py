"""Needless work is really done, changes no answer, and is found by CPU time; two sessions are fooled by drift."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from havoc_core.bench.contender import enter
from havoc_core.bench.duel import judge_until_proven
from havoc_core.bench.judge.paired import Block, Turn
from havoc_core.export.runtime.session import DecoderSession
from tests.bench import needless_work as needless

HERE = Path(__file__).parent
duels = SimpleNamespace(**runpy.run_path(str(HERE.parent / "perf" / "duels_beside_load.py")))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_it_works_more_and_answers_the_same(share: float, tiny_artifact: Path, tmp_path: Path) -> None:
    """The products that were asked for, and few more, are in the graph that runs; every logit stays."""
    slow = tmp_path / "slow"
    found = needless.with_needless_work(tiny_artifact, slow, share)
    before, after = (needless.products(onnx.load(folder / "model.onnx").graph) for folder in (tiny_artifact, slow))
    extra = sum(size for _, size in after) / sum(size for _, size in before) - 1
    assert found == pytest.approx(extra)
    assert share <= found < share + 0.05
    with enter(str(slow)) as side:
        assert side.engine is None
    ids = np.arange(10, 34)[None]
    provider = "CPUExecutionProvider"
    sessions = [DecoderSession.open(folder, provider=provider, num_threads=1) for folder in (tiny_artifact, slow)]
    np.testing.assert_allclose(sessions[1].prefill(ids)[0], sessions[0].prefill(ids)[0], atol=1e-5)
    num_nodes = [sum(map(len, session.placement().by_provider.values())) for session in sessions]
    assert num_nodes[1] - num_nodes[0] >= len(after) - len(before) > 0, "an optimizer took it out again"


def blocks(ratio: float, *, drift: float, seed: int, num: int = 24) -> list[Block]:
    """Turns of two sides of which the new one takes `ratio` times as long, on a machine that becomes slower."""
    generator, found = random.Random(seed), []
    for place in range(num):
        slow = 1 + drift * place / num
        own = [1 + generator.gauss(0, 0.003) for _ in range(2)]

        def turn(side: int, calls: int, slow: float = slow, own: list[float] = own) -> Turn:
            factor = slow * own[side] * (ratio if side else 1.0)
            wall = [round(1e7 * factor * (1 + abs(generator.gauss(0, 0.01)))) for _ in range(calls)]
            return Turn(wall, sum(wall))

        pairs = [[(turn(0, calls), turn(1, calls)) for _ in range(6)] for calls in (1, 8)]
        found.append(Block({"prefill": pairs[0], "decode step": pairs[1]}))
    return found


def test_two_per_cent_are_found_and_drift_is_not_taken_for_it() -> None:
    """On a machine that becomes 3 % slower the duel finds 2 %, and nothing where there is nothing; two sessions do."""
    same = [blocks(1.0, drift=0.03, seed=seed) for seed in range(20)]
    slow = [blocks(1.02, drift=0.03, seed=100 + seed) for seed in range(20)]
    margin = duels.MARGIN
    assert [judge_until_proven(seen, margin=margin).verdict for seen in same].count("worse") == 0
    assert [judge_until_proven(seen, margin=margin).verdict for seen in slow].count("worse") >= 19
    assert [duels.naive_verdict(seen, margin=margin) for seen in same].count("worse") >= 19


def test_two_sessions_of_one_call_say_nothing() -> None:
    """A spread needs two calls on each side."""
    assert duels.naive_verdict([], margin=0.01) == "undecided"


def test_what_came_of_all_duels_is_told() -> None:
    """Red where nano is worse than itself, and where needless work was not found."""

    def line(kind: str, verdict: str) -> dict[str, str]:
        return {"kind": kind, "verdict": verdict, "naive": "worse"}

    good = [line("same", "equal"), line("same", "undecided"), line("5% needless", "worse")]
    text, code = duels.told(good)
    assert code == 0
    assert "same: {'equal': 1, 'undecided': 1} in 2 duels; two sessions: {'worse': 2}" in text
    assert duels.told([*good, line("same", "worse")])[1] == 1
    assert duels.told([*good, line("5% needless", "undecided")])[1] == 1
