"""The handoff: exactly the seed's keys, nothing invented."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report.handoff import build_handoff

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))
EXPERTS = {domain: f"z_vectors_{domain}.safetensors" for domain in samples.DOMAINS}


SCORES = {
    "rows": [
        {"name": "base", "kind": "base", "kl_to_base": dict.fromkeys(samples.DOMAINS, 0.0)},
        *(
            {"name": name, "kind": kind, "kl_to_base": dict.fromkeys(samples.DOMAINS, 0.2)}
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
    **changes: Any,
) -> dict[str, Any]:
    record = samples.record(kind, **changes)
    judgement = judge([record], load_target(target), this_cpu=samples.THIS_CPU)
    return build_handoff(
        record,
        judgement,
        scores=SCORES if scores is None else scores,
        is_converged=is_converged,
        max_kl=max_kl,
        experts=EXPERTS,
        best_mixture=(1.2, 0.8, 1.5, 0.9),
        adapted_model="artifact",
    )


def test_the_seeds_keys() -> None:
    """The keys of "Output to Phase 8", and verdict and evidence beside them; it is plain JSON."""
    found = json.loads(json.dumps(handoff("cuda", "gtx1660"), allow_nan=False))
    keys = ["success", "experts", "best_mixture", "adapted_model", "metrics", "verdict", "evidence", "criteria"]
    assert list(found) == keys
    assert list(found["metrics"]) == ["latency_ms", "accuracy", "vram_gb", "throughput_tps"]
    assert found["experts"] == EXPERTS
    assert found["best_mixture"] == [1.2, 0.8, 1.5, 0.9]
    assert (found["success"], found["verdict"], found["evidence"]) == (True, "pass", "measured_target")
    assert found["metrics"]["vram_gb"] == pytest.approx(0.4, abs=0.001)
    assert found["metrics"]["accuracy"] == 0.9
    assert found["metrics"]["latency_ms"] == pytest.approx(20.1, abs=0.1)
    assert found["metrics"]["throughput_tps"] == pytest.approx(498.5, abs=2)


def _worse(part: str, **changes: Any) -> dict[str, Any]:
    return {**SCORES, part: [*SCORES[part][:-1], {**SCORES[part][-1], **changes}]}


@pytest.mark.parametrize(
    ("criterion", "changes"),
    [
        ("limits_met", {"samples": []}),
        ("expert_above_base", {"scores": _worse("gains", is_proven=False)}),
        ("mixture_not_below", {"scores": _worse("paired", margin=-0.001)}),
        ("search_converged", {"is_converged": False}),
        ("kl_below_limit", {"scores": _worse("rows", kl_to_base={"math": 0.1, "code": 1.0})}),
        ("kl_below_limit", {"max_kl": 0.2}),
        ("kl_below_limit", {"scores": {**SCORES, "rows": [{"name": "math", "kind": "expert"}]}}),
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
        judgement,
        scores=SCORES,
        is_converged=True,
        max_kl=1.0,
        experts={},
        best_mixture=(),
        adapted_model="artifact",
    )
    assert found["metrics"]["accuracy"] is None
