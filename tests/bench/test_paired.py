"""Slower is said where it is proven: by CPU time beside neighbours, by the clock on a quiet machine, not by chance."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

import pytest
from scipy import stats

from havoc_core.bench.judge.paired import CONFIDENCE, Block, Paired, Turn, judge_blocks, verdict_of
from tests.bench import simulated_pairs as simulated

MS = 1_000_000


def block(ratio: float, *, cpu_ratio: float | None = None, ran: float = 1.0, num_turns: int = 5) -> Block:
    """Turns of one quantity: the new side takes `ratio` times as long; `ran` is the share of time on the CPU."""
    old = Turn([10 * MS] * 3, round(30 * MS * ran))
    new = Turn([round(10 * MS * ratio)] * 3, round(30 * MS * ran * (ratio if cpu_ratio is None else cpu_ratio)))
    return Block({"decode step": ((old, new),) * num_turns})


def rows_of(*blocks: Block, margin: float = 0.1) -> dict[str, Paired]:
    return {row.witness: row for row in judge_blocks(blocks, margin=margin)}


def test_the_interval_is_students_over_blocks() -> None:
    """The mean of the logs of the blocks' ratios, with as many degrees of freedom as blocks but one."""
    ratios = [1.0, 1.02, 1.05, 0.99]
    row = rows_of(*map(block, ratios))["CPU time"]
    logs = [math.log(ratio) for ratio in ratios]
    reach = stats.t.ppf(1 - (1 - CONFIDENCE) / 2, 3) * statistics.stdev(logs) / 2
    assert row.ratio == pytest.approx(math.exp(statistics.fmean(logs)))
    assert row.low == pytest.approx(math.exp(statistics.fmean(logs) - reach))
    assert row.high == pytest.approx(math.exp(statistics.fmean(logs) + reach))
    assert (row.old, row.unit, row.num_blocks) == (10.0, "ms", 4)


def test_a_turn_that_something_interrupted_moves_nothing() -> None:
    """Of five turns one takes ten times as long, on either side: the block says what it said."""
    calm = block(1.2).turns["decode step"]
    burst = Turn([100 * MS] * 3, 300 * MS)
    for odd in ((burst, calm[0][1]), (calm[0][0], burst)):
        row = rows_of(*[Block({"decode step": (odd, *calm[1:])})] * 3)["CPU time"]
        assert row.ratio == pytest.approx(1.2)


def processes(ratio: float, *, load: float = 1.0, peak: float = 1.0) -> Block:
    """A block whose processes also tell how long they loaded and what they took at most."""
    turns = block(ratio).turns["decode step"]
    return Block(
        {"prefill": turns, "decode step": turns}, {"load": (5e8, 5e8 * load), "peak memory": (4e8, 4e8 * peak)}
    )


def test_what_decides_is_what_was_asked_for() -> None:
    """More memory is worse where memory decides, and only shown where it does not; its figures are in MB."""
    blocks = [processes(spread, peak=1.3 * spread) for spread in (0.99, 1.0, 1.01, 1.0)]
    shown = judge_blocks(blocks, margin=0.1)
    assert verdict_of(shown) == "equal"
    assert [row.quantity for row in shown if not row.decides] == ["load", "peak memory"]
    decided = judge_blocks(blocks, margin=0.1, on=("memory",))
    assert verdict_of(decided) == "worse"
    (row,) = [row for row in decided if row.decides]
    assert (row.quantity, row.witness, row.unit, row.old) == ("peak memory", "each process", "MB", 400.0)
    assert row.new == pytest.approx(520.0)
    assert verdict_of(judge_blocks(blocks, margin=0.1, on=("latency", "load"))) == "equal"
    assert verdict_of(judge_blocks(blocks, margin=0.1, on=("latency", "memory", "load"))) == "worse"


def test_what_was_not_measured_decides_nothing() -> None:
    """Asked to decide by memory that no process told, the answer is undecided."""
    blocks = [block(spread) for spread in (0.99, 1.0, 1.01, 1.0)]
    assert verdict_of(judge_blocks(blocks, margin=0.1)) == "equal"
    assert verdict_of(judge_blocks(blocks, margin=0.1, on=("latency", "memory"))) == "undecided"


def test_what_is_only_shown_costs_no_confidence() -> None:
    """The intervals of what decides are as wide as without what is shown beside it."""
    blocks = [processes(spread) for spread in (0.99, 1.0, 1.01, 1.0)]
    bare = [Block(item.turns) for item in blocks]
    assert judge_blocks(blocks, margin=0.1)[:4] == judge_blocks(bare, margin=0.1)


@pytest.mark.parametrize(
    ("ratio", "margin", "word"),
    [(1.3, 0.1, "worse"), (1.3, 0.35, "equal"), (1.05, 0.1, "equal"), (0.7, 0.1, "better"), (1.0, 0.1, "equal")],
)
def test_the_margin_decides(ratio: float, margin: float, word: str) -> None:
    """The bound nearer to 1 must lie beyond the margin; within it on both sides is equal."""
    blocks = [block(ratio * spread) for spread in (0.99, 1.0, 1.01, 1.0, 0.995)]
    assert verdict_of(judge_blocks(blocks, margin=margin)) == word


def test_too_little_is_undecided() -> None:
    """No block, one, or blocks that differ as much as the change: no red, and no green either."""
    assert verdict_of(judge_blocks([], margin=0.1)) == "undecided"
    assert verdict_of(judge_blocks([block(2.0)], margin=0.1)) == "undecided"
    assert verdict_of(judge_blocks([block(0.8), block(2.0), block(1.1), block(1.9)], margin=0.1)) == "undecided"


def test_the_clock_does_not_count_beside_neighbours() -> None:
    """Twice as long on the clock and the same CPU time, while the old side too ran half of the time: nothing proven."""
    disturbed = [block(2.0, cpu_ratio=ratio, ran=0.5) for ratio in (1.0, 1.01, 0.99, 1.0)]
    rows = rows_of(*disturbed)
    assert (rows["time on the clock"].num_blocks, rows["CPU time"].shift) == (0, "equal")
    assert verdict_of(list(rows.values())) == "equal"


def test_waiting_is_found_on_a_quiet_machine() -> None:
    """A step that sleeps uses no CPU time; where the old side ran all the while, the clock tells."""
    rows = rows_of(*[block(ratio, cpu_ratio=1.0) for ratio in (1.5, 1.51, 1.49, 1.5)])
    assert (rows["CPU time"].shift, rows["time on the clock"].shift) == ("equal", "worse")
    assert verdict_of(list(rows.values())) == "worse"


def test_without_cpu_time_the_clock_alone_tells() -> None:
    """On a GPU nothing counts the CPU time of a call."""
    blocks = [
        Block({"decode step": ((Turn([10 * MS], None), Turn([round(ratio * MS)], None)),)}) for ratio in (15, 15.1, 15)
    ]
    rows = rows_of(*blocks)
    assert (rows["CPU time"].ratio, rows["time on the clock"].shift) == (None, "worse")


def test_one_quantity_that_nobody_can_tell_leaves_all_undecided() -> None:
    """Equal is said of a comparison only where each of its quantities is known."""
    known = judge_blocks([block(1.0), block(1.001), block(0.999)], margin=0.1)
    assert verdict_of(known) == "equal"
    assert verdict_of([*known, Paired(quantity="prefill", witness="CPU time", num_blocks=0)]) == "undecided"


# On a simulated machine: processes differ, calls are correlated, neighbours come and go


def test_hardly_any_comparison_beside_load_is_falsely_red() -> None:
    """At most 1 in 100 of a side with itself, and of one that is slower by just the margin, the hardest case."""
    for ratio in (1.0, 1.0 + simulated.MARGIN):
        counts = simulated.verdicts(300, seed=4, prefill=ratio, step=ratio)
        assert counts["worse"] + counts["better"] <= 3, counts


def test_decoding_a_third_slower_is_found_beside_load() -> None:
    """A step that takes 30 % longer is proven slower in at least 95 of 100, whatever runs beside."""
    counts = simulated.verdicts(200, seed=5, prefill=1.0, step=1.3)
    assert counts["worse"] >= 190, counts


def test_the_same_side_is_mostly_called_equal() -> None:
    """The rule does not say "undecided" to everything."""
    counts = simulated.verdicts(100, seed=6, prefill=1.0, step=1.0)
    assert counts["equal"] >= 60, counts


def test_without_the_spread_between_blocks_it_is_falsely_red() -> None:
    """The simulation can fail: turns taken for independent, as if each were a block, prove what is not there."""

    def as_if_independent(blocks: Sequence[Block]) -> str:
        turns = itertools.chain.from_iterable(zip(*block.turns.values(), strict=True) for block in blocks)
        split = [Block({name: (pair,) for name, pair in zip(blocks[0].turns, turn, strict=True)}) for turn in turns]
        return simulated.verdict(split)

    edge = 1.0 + simulated.MARGIN
    counts = simulated.verdicts(100, seed=4, prefill=edge, step=edge, judge=as_if_independent)
    assert counts["worse"] >= 5, counts
