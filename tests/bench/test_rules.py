"""Every rule: a known-bad record that breaks it and nothing else, beside the known-good twin that breaks none."""

from __future__ import annotations

from typing import Any

import pytest

from havoc_core.bench.judge import disturbance, validity
from havoc_core.bench.judge.case import Case
from havoc_core.bench.judge.record import Record, seal_of
from havoc_core.bench.judge.rules import RULES, device_problem
from havoc_core.bench.judge.targets import load_target
from tests.bench import known_bad as known

samples, case_of, BAD = known.samples, known.case_of, known.BAD


def broken(case: Case) -> dict[str, str]:
    """Return the ids and reasons of all rules that do not hold."""
    return {rule.id: reason for rule in RULES if (reason := rule.check(case)) is not None}


@pytest.mark.parametrize("kind", ["cpu", "cuda", "verified"])
def test_a_good_record_breaks_no_rule(kind: str) -> None:
    """The known-good twin of every case below."""
    assert broken(case_of(kind, {})) == {}


@pytest.mark.parametrize(
    ("rule", "kind", "changes"),
    [
        pytest.param(rule, kind, changes, id=f"{rule}-{place}")
        for rule, cases in BAD.items()
        for place, (kind, changes) in enumerate(cases)
    ],
)
def test_a_bad_record_breaks_its_rule(rule: str, kind: str, changes: dict[str, Any]) -> None:
    """Each fault is found, by its own rule, with a reason in one line."""
    case = case_of(kind, changes)
    found = broken(case)
    assert rule in found
    assert found[rule]
    assert "\n" not in found[rule]


ALONE = set(BAD) - {
    "I01",
    "I03",
    "I06",
    "I07",
}  # these cannot be broken without others: a card without a witness lacks its data


@pytest.mark.parametrize(
    ("rule", "kind", "changes"), [pytest.param(rule, *BAD[rule][0], id=rule) for rule in sorted(ALONE)]
)
def test_a_fault_breaks_no_other_rule(rule: str, kind: str, changes: dict[str, Any]) -> None:
    """Rules do not overlap: the reason a person reads is the reason there is."""
    assert set(broken(case_of(kind, changes))) == {rule}


def test_every_rule_has_a_known_bad_record() -> None:
    """A rule nobody has seen fail is no rule."""
    assert {rule.id for rule in RULES} == set(BAD)


def test_rules_are_named_once_and_say_what_they_ask() -> None:
    """An id stands for one sentence; identity ends in exit code 5, validity in 4."""
    assert len({rule.id for rule in RULES}) == len({rule.sentence for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.exit_code == {"I": 5, "V": 4}[rule.id[0]]
        assert rule.sentence.endswith(".")
        assert rule.check.__doc__


@pytest.mark.parametrize("changes", known.ODD, ids=range(len(known.ODD)))
def test_what_looks_odd_but_is_right_breaks_no_rule(changes: dict[str, Any]) -> None:
    """Each limit of a rule from its good side: a rule that cries wolf gets switched off."""
    assert broken(case_of("cuda", changes)) == {}


def test_a_cpu_by_name_is_judged_anywhere() -> None:
    """A targets file that names a CPU accepts its records on a machine with another one."""
    target = load_target("host")
    named = target.device.model_copy(update={"is_this_machine": False, "names": (samples.CPU["name"],)})
    case = Case(record=samples.record("cpu"), target=target.model_copy(update={"device": named}))
    assert broken(case) == {}


def test_an_unknown_machine_is_not_this_machine() -> None:
    """Where the gate cannot tell its own CPU, `host` does not pass."""
    case = Case(record=samples.record("cpu"), target=load_target("host"))
    assert set(broken(case)) == {"I05"}


def test_a_record_of_an_older_program_stays_intact() -> None:
    """Fields added to the schema since do not break the seal of a record that was written without them."""
    values = samples.document("cpu")
    loaded = Record.model_validate({**values, "sha256": seal_of(values)}, strict=False)
    assert not loaded.is_intact()
    assert "I01" not in broken(Case(record=loaded, target=load_target("host"), this_cpu=samples.THIS_CPU))


def test_a_device_is_asked_before_there_is_a_record() -> None:
    """The target's own device may decide; a simulated one, and another, are told with the reason of their rule."""
    card, cpu = (samples.record(kind).device for kind in ("cuda", "cpu"))
    asked = {"this_cpu": samples.THIS_CPU}
    assert device_problem(card, load_target("gtx1660"), **asked) is None
    assert device_problem(cpu, load_target("host"), **asked) is None
    simulated = card.model_copy(update={"is_simulated": True, "simulation_reasons": ("its clock", "its name")})
    assert device_problem(simulated, load_target("gtx1660"), **asked) == (
        "the device is simulated (its clock; its name)"
    )
    for device, target in ((cpu, "gtx1660"), (card, "host")):
        problem = device_problem(device, load_target(target), **asked)
        assert problem is not None
        told = {
            rule.check(Case(record=samples.record(device.kind), target=load_target(target), **asked)) for rule in RULES
        }
        assert problem in told


def test_what_lies_on_a_rules_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many nodes of shapes as may be, a context just long enough to tell, a share just as disturbed as allowed."""
    shapes = case_of("cuda", {"samples__2__num_shape_nodes": validity._MOST_SHAPE_NODES})
    assert validity.every_node_ran_on_the_provider(shapes) is None
    work = {"num_calls": 3, "largest_error": 0.0, "short_step_ns": [900_000_000] * 3}
    for context, is_told in ((validity._LONG_CONTEXT, True), (validity._LONG_CONTEXT - 1, False)):
        changes = {"samples__0__work_done": work, "workload__context_tokens": context}
        found = validity.timed_calls_did_the_work(case_of("cuda", changes))
        assert (found is not None) == is_told
    case = case_of("cpu", {"samples__1__surroundings": samples.surroundings(foreign=(0.0, 12.0))})
    share = disturbance.disturbed_share([case.record.samples[1]])
    assert share
    for most, is_broken in ((share, False), (share - 1e-9, True)):
        monkeypatch.setattr(validity, "MOST_DISTURBED_SHARE", most)
        assert (validity.cpu_was_not_busy(case) is not None) == is_broken
