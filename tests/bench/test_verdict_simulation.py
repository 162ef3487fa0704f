"""A verdict beside random load is hardly ever wrong, and on a quiet machine it is still given."""

from __future__ import annotations

from typing import Any

import pytest

from havoc_core.bench.judge.record import Record
from tests.bench import simulated_benches as simulated


def test_beside_load_at_most_one_verdict_in_a_hundred_is_wrong() -> None:
    """200 benches beside 0 to 3 neighbours, limits from half to twice the truth: false passes and fails together."""
    tally = simulated.beside_load(200, seed=11)
    assert tally.num_benches == 200
    assert tally.wrong_share <= 0.01, tally.wrong
    assert tally.share("pass") + tally.share("fail") > 0.15  # it does not say "invalid" to everything


@pytest.mark.parametrize(("times", "verdict"), [(1.2, "pass"), (0.83, "fail")])
def test_a_quiet_machine_still_gets_its_verdict(times: float, verdict: str) -> None:
    """A limit a fifth away from the truth is met, or missed, in at least 95 of 100 benches."""
    assert simulated.quiet_machine(40, seed=3, times=times).share(verdict) >= 0.95


def test_without_the_witnesses_the_same_benches_are_judged_wrong() -> None:
    """The simulation can fail: with neither counters nor CPU times, one verdict in twenty or more is a false one."""

    class Blind(simulated.Tally):  # type: ignore[misc, name-defined]
        def add(self, record: Record, *words: Any) -> None:
            blind = [
                process.model_copy(
                    update={
                        "surroundings": None,
                        "foreign_cpu_share": None,
                        "prefill": process.prefill.model_copy(update={"cpu_ns": ()}),
                    }
                )
                for process in record.samples
            ]
            super().add(record.model_copy(update={"samples": tuple(blind)}).sealed(), *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(simulated.beside_load.__globals__, "Tally", Blind)
        assert simulated.beside_load(100, seed=11).wrong_share > 0.05
