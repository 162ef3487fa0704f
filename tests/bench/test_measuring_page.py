"""docs/measuring.md tells which verdict follows from which disturbance: its table is what the rules do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from havoc_core.bench import findings
from havoc_core.bench.judge import disturbance, limits, validity
from havoc_core.bench.judge.gate import CIRCUMSTANCES, judge
from havoc_core.bench.judge.rules import RULES
from havoc_core.bench.judge.targets import Limit, load_target
from tests.bench import known_bad as known

samples = known.samples
PAGE = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
FIGURES: dict[str, list[float]] = {
    "other programs used the CPU": [100 * validity.FOREIGN_SHARE],
    "a process was disturbed most of the time": [100 * validity.MOST_DISTURBED_SHARE],
    "some calls were disturbed": [
        disturbance.FOREIGN_CORES,
        100 * disturbance.STOLEN_SHARE,
        100 * disturbance.WAITED_SHARE,
        100 * disturbance.RAN_SHARE,
    ],
    "a process did not settle": [limits.UNSETTLED_SPARE],
    "a hypervisor took the CPU": [100 * validity.STEAL_SHARE],
    "a container's CPU quota was used up": [100 * validity.MOST_STOPPED_SHARE],
    "the core clock fell": [100 * validity.CLOCK_DROP_SHARE],
    "memory was swapped out": [findings.SWAP_BYTES / 1e6],
}
SCATTERED = {f"samples__{place}__prefill__duration_ns": [18_000_000 + 500_000 * place] * 20 for place in range(5)}
CALM = {"samples__each__busy_ns": 0}
# For each row that the limits decide: a record, a limit that it would meet and one that it would miss without it.
UNDECIDED: dict[str, tuple[dict[str, Any], float, float]] = {
    "some calls were disturbed": (
        {"samples__each__surroundings": samples.surroundings(foreign=(0.0, 0.6))},
        30.0,
        15.0,
    ),
    "a process did not settle": ({"samples__0__warmup__classification": "no_steady_state"}, 30.0, 15.0),
    "the processes differ": (SCATTERED, 20.5, 19.9),
    "there is only one process": (
        {"samples": samples.document("cpu")["samples"][:1], "protocol__num_processes": 1},
        30.0,
        15.0,
    ),
}


def rows() -> dict[str, list[str]]:
    """Return the cells of the table by their first."""
    section = PAGE.split("## Which verdict follows from which disturbance")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == ["disturbance", "from where on", "verdict", "exit", "decided by"]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_every_rule_on_circumstances_is_in_the_table() -> None:
    """No rule on how it went is missing, but for those on what was computed; and none is named that there is not."""
    named = {cells[3] for cells in rows().values()} - {"limits"}
    assert named == CIRCUMSTANCES - {"V05", "V07"}
    assert {name for name, cells in rows().items() if cells[3] == "limits"} == UNDECIDED.keys()


@pytest.mark.parametrize("name", list(rows()))
def test_a_row_is_what_its_rule_does(name: str) -> None:
    """Verdict and exit code of each named rule, on each of its known-bad records."""
    _, verdict, exit_code, decided_by = rows()[name]
    if decided_by == "limits":
        assert (verdict.partition(",")[0], exit_code) == ("inconclusive", "3")
        return
    (rule,) = [rule for rule in RULES if rule.id == decided_by]
    assert (rule.blocks, str(rule.exit_code)) == (verdict, exit_code)
    for kind, changes in known.BAD[decided_by]:
        case = known.case_of(kind, changes)
        found = judge(
            [case.record],
            case.target,
            artifact_files=case.artifact_files,
            this_cpu=case.this_cpu,
            verified=case.verified,
        )
        assert (found.verdict, str(found.exit_code)) == (verdict, exit_code)


@pytest.mark.parametrize("name", list(rows()))
def test_the_figures_of_a_row_are_those_of_the_code(name: str) -> None:
    """Every number in "from where on" is a constant of the code, in its order."""
    found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", rows()[name][0])]
    assert found == pytest.approx(FIGURES.get(name, []))


@pytest.mark.parametrize("name", list(UNDECIDED))
def test_what_cannot_pass_cannot_fail(name: str) -> None:
    """The disturbance takes both verdicts away from records that have them without it."""
    changes, met, missed = UNDECIDED[name]
    for limit_ms, verdict in ((met, "pass"), (missed, "fail")):
        limit = Limit(metric="prefill_ms", below=limit_ms, unit="ms")
        target = load_target("host").model_copy(update={"limits": (limit,)})
        quiet = judge([samples.record("cpu")], target, this_cpu=samples.THIS_CPU)
        disturbed = judge([samples.record("cpu", **CALM, **changes)], target, this_cpu=samples.THIS_CPU)
        assert (quiet.verdict, disturbed.verdict) == (verdict, "inconclusive")
        assert (quiet.exit_code, disturbed.exit_code) == ({"pass": 0, "fail": 1}[verdict], 3)


def test_the_page_names_the_default_of_wait() -> None:
    """The seconds in the text are those of the option."""
    from havoc_core.arguments import Parser, add_bench

    parser = Parser()
    add_bench(parser)
    (action,) = [action for action in parser._actions if "--wait" in action.option_strings]
    assert f"`--wait SECONDS` ({action.default})" in PAGE
