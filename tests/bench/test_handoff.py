"""The handoff: exactly the seed's keys, nothing invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from havoc_core import storage
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report.handoff import build_handoff
from havoc_core.bench.report.phase6 import HandedOver, keep, read_handed_over, read_kept
from havoc_core.errors import HavocError
from tests.bench import sample_records as samples

EXPERTS = {domain: f"z_vectors_{domain}.safetensors" for domain in samples.DOMAINS}


SCORES = {
    "rows": [
        {"name": "base", "kind": "base", "kl_to_base": dict.fromkeys(samples.DOMAINS, 0.0)},
        *(
            {
                "name": name,
                "kind": kind,
                "kl_to_base": dict.fromkeys(samples.DOMAINS, 0.2),
                "accuracy": {task: {"num_right": 900, "num_rows": 1000, "low": 0.8797} for task in samples.DOMAINS},
            }
            for name, kind in [*((domain, "expert") for domain in samples.DOMAINS), ("mixture", "mixture")]
        ),
    ],
    "paired": [{"against": name, "margin": 0.0} for name in ("base", *samples.DOMAINS)],
    "gains": [{"expert": domain, "is_proven": True} for domain in samples.DOMAINS],
}


def handoff(
    kind: str,
    target: str,
    *,
    scores: dict[str, Any] | None = None,
    is_converged: bool = True,
    max_kl: float = 1.0,
    above: dict[str, float] | None = None,
    handed: HandedOver | None = None,
    others: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Any]:
    record = samples.record(kind, **changes)
    targets = [load_target(name) for name in (target, *others)]
    return build_handoff(
        record,
        [judge([record], one, this_cpu=samples.THIS_CPU) for one in targets],
        scores=SCORES if scores is None else scores,
        is_converged=is_converged,
        max_kl=max_kl,
        above=dict.fromkeys(samples.DOMAINS, 0.85) if above is None else above,
        experts=EXPERTS,
        best_mixture=(1.2, 0.8, 1.5, 0.9),
        adapted_model="model.pt",
        artifact="artifact",
        handed=handed,
    )


def test_the_seeds_keys() -> None:
    """The keys of "Output to Phase 8", and verdict and evidence beside them; it is plain JSON."""
    found = json.loads(json.dumps(handoff("cuda", "gtx1660"), allow_nan=False))
    keys = ["success", "experts", "best_mixture", "adapted_model", "metrics", "verdict", "evidence", "criteria"]
    assert list(found) == [*keys, "targets", "artifact", "phase6"]
    assert found["phase6"] is None  # nothing was handed over, so nothing is carried
    assert list(found["metrics"]) == ["latency_ms", "accuracy", "vram_gb", "throughput_tps"]
    assert found["experts"] == EXPERTS
    assert found["best_mixture"] == [1.2, 0.8, 1.5, 0.9]
    assert (found["success"], found["verdict"], found["evidence"]) == (True, "pass", "measured_target")
    assert found["metrics"]["vram_gb"] == pytest.approx(0.4, abs=0.001)
    assert found["metrics"]["accuracy"] == 0.9
    assert found["metrics"]["latency_ms"] == pytest.approx(20.1, abs=0.1)
    assert found["metrics"]["throughput_tps"] == pytest.approx(498.5, abs=2)


def test_each_target_has_its_verdict() -> None:
    """The first decides; of every one verdict, evidence, exit code and reason are there."""
    found = handoff("cuda", "gtx1660", others=("host",))
    assert list(found["targets"]) == ["gtx1660", "host"]
    assert found["targets"]["gtx1660"]["verdict"] == found["verdict"] == "pass"
    host = found["targets"]["host"]
    assert list(host) == ["verdict", "evidence", "exit_code", "reason"]
    assert (host["exit_code"], bool(host["reason"])) == (5, True)  # a card's record says nothing of this CPU


GIVEN = {"model": "baked", "metrics": {"tool_success_rate": 0.94, "persona_consistency": 0.89}}


def handed_file(folder: Path, content: object = GIVEN) -> Path:
    (folder / "baked").mkdir(exist_ok=True)
    path = folder / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_phase_6_measured_is_carried_and_not_claimed(tmp_path: Path) -> None:
    """Both shares arrive unchanged, beside who measured them; HAVOC's own metrics stay the seed's four."""
    handed = read_handed_over(handed_file(tmp_path))
    assert handed.model == tmp_path / "baked"  # relative to its file, not to the working directory
    found = json.loads(json.dumps(handoff("cuda", "gtx1660", handed=handed)))
    carried = found["phase6"]
    assert carried["metrics"] == GIVEN["metrics"]
    assert (carried["measured_by"], carried["is_measured_by_havoc"]) == ("phase 6", False)
    assert carried["model"] == "baked"
    assert carried["sha256"] == storage.sha256_file(tmp_path / "given.json")
    assert not set(found["metrics"]) & set(GIVEN["metrics"])


def test_a_run_keeps_the_very_file(tmp_path: Path) -> None:
    """Byte for byte, once; another file for the same folder is refused and changes nothing."""
    out = tmp_path / "out"
    assert read_kept(out) is None
    path = handed_file(tmp_path)
    for _ in range(2):
        keep(read_handed_over(path), out)
    assert (out / "phase6.json").read_bytes() == path.read_bytes()
    other = read_handed_over(handed_file(tmp_path, {**GIVEN, "metrics": {**GIVEN["metrics"], "tool_success_rate": 1}}))
    with pytest.raises(HavocError, match="another handoff"):
        keep(other, out)
    assert json.loads((out / "phase6.json").read_text()) == GIVEN


def _given(**metrics: object) -> dict[str, Any]:
    return {**GIVEN, "metrics": {**GIVEN["metrics"], **metrics}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": "baked"}, "the key metrics is missing"),
        ({"model": "baked", "metrics": {"tool_success_rate": 1.0}}, "the key metrics.persona_consistency is missing"),
        ({**GIVEN, "modell": "x"}, "unknown key modell; did you mean model?"),
        (_given(tool_sucess_rate=0.9), "unknown key metrics.tool_sucess_rate; did you mean tool_success_rate?"),
        (_given(tool_success_rate=float("nan")), "NaN is not a JSON number"),
        (_given(tool_success_rate=float("inf")), "Infinity is not a JSON number"),
        (json.dumps(_given(tool_success_rate=0)).replace("0,", "1e999,"), "1e999 is too large"),
        (_given(tool_success_rate=1.01), "tool_success_rate = 1.01: input should be less than or equal to 1"),
        (_given(persona_consistency=-0.1), "persona_consistency = -0.1: input should be greater than or equal to 0"),
        (_given(persona_consistency=True), "persona_consistency = True"),
        (_given(persona_consistency="0.9"), "persona_consistency = '0.9'"),
        ({**GIVEN, "model": ""}, "model = ''"),
        ({**GIVEN, "model": "elsewhere"}, "model 'elsewhere' is missing"),
        ([GIVEN], "it is not an object of keys and values"),
        ({**GIVEN, "metrics": [0.9, 0.9]}, "metrics is not an object of keys and values"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: object, words: str) -> None:
    """What is wrong and where, with the value; exit code 2."""
    path = handed_file(tmp_path, content)
    with pytest.raises(HavocError, match="given.json") as told:
        read_handed_over(path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """Its name, and that it is not there."""
    with pytest.raises(HavocError, match="none.json: no such file"):
        read_handed_over(tmp_path / "none.json")


def _worse(part: str, **changes: Any) -> dict[str, Any]:
    return {**SCORES, part: [*SCORES[part][:-1], {**SCORES[part][-1], **changes}]}


def _rows_without(name: str) -> dict[str, Any]:
    """Scores as a program would have written them that did not keep this of each row."""
    return {**SCORES, "rows": [{key: value for key, value in row.items() if key != name} for row in SCORES["rows"]]}


@pytest.mark.parametrize(
    ("criterion", "changes"),
    [
        ("limits_met", {"samples": []}),
        ("expert_above_base", {"scores": _worse("gains", is_proven=False)}),
        ("expert_above_share", {"above": {"code": 0.88}}),
        ("expert_above_share", {"scores": _rows_without("accuracy")}),
        ("mixture_not_below", {"scores": _worse("paired", margin=-0.001)}),
        ("search_converged", {"is_converged": False}),
        ("kl_below_limit", {"scores": _worse("rows", kl_to_base={"math": 0.1, "code": 1.0})}),
        ("kl_below_limit", {"max_kl": 0.2}),
        ("kl_below_limit", {"scores": _rows_without("kl_to_base")}),
        ("expert_above_base", {"scores": {key: value for key, value in SCORES.items() if key != "gains"}}),
    ],
)
def test_success_takes_every_criterion(criterion: str, changes: dict[str, Any]) -> None:
    """One that is not met, or not known, is named and is enough: no success, whatever the verdict says."""
    whole = handoff("cuda", "gtx1660")
    assert whole["success"]
    found = handoff("cuda", "gtx1660", **changes)
    assert found["success"] is False
    assert {name for name in whole["criteria"] if found["criteria"][name] != whole["criteria"][name]} == {criterion}


def test_what_was_not_measured_is_null() -> None:
    """Host memory is no VRAM, and an empty record has no figure at all; neither is a success."""
    on_cpu = handoff("cpu", "gtx1660")
    assert on_cpu["metrics"]["vram_gb"] is None
    assert (on_cpu["success"], on_cpu["verdict"], on_cpu["evidence"]) == (
        False,
        "not_measured",
        "measured_other_device",
    )
    empty = handoff("cpu", "host", samples=[], accuracy={}, memory={})
    assert set(empty["metrics"].values()) == {None}
    assert empty["success"] is False


def test_the_search_split_is_no_accuracy() -> None:
    """Only what was scored on the gate split is handed on."""
    values = samples.document("cpu")
    for item in values["accuracy"].values():
        item["split"] = "search"
    record = samples.sealed(values)
    judgement = judge([record], load_target("host"), this_cpu=samples.THIS_CPU)
    found = build_handoff(
        record,
        [judgement],
        scores=SCORES,
        is_converged=True,
        max_kl=1.0,
        above={},
        experts={},
        best_mixture=(),
        adapted_model="model.pt",
        artifact="artifact",
    )
    assert found["metrics"]["accuracy"] is None
