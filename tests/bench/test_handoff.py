"""The handoff: exactly the seed's keys, nothing invented."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core.bench.gate import judge
from havoc_core.bench.handoff import build_handoff
from havoc_core.bench.targets import load_target

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))
EXPERTS = {domain: f"z_vectors_{domain}.safetensors" for domain in samples.DOMAINS}


def handoff(kind: str, target: str, **changes: Any) -> dict[str, Any]:
    record = samples.record(kind, **changes)
    judgement = judge([record], load_target(target), this_cpu=samples.THIS_CPU)
    return build_handoff(
        record, judgement, experts=EXPERTS, best_mixture=(1.2, 0.8, 1.5, 0.9), adapted_model="artifact"
    )


def test_the_seeds_keys() -> None:
    """The keys of "Output to Phase 8", and verdict and evidence beside them; it is plain JSON."""
    found = json.loads(json.dumps(handoff("cuda", "gtx1660"), allow_nan=False))
    assert list(found) == ["success", "experts", "best_mixture", "adapted_model", "metrics", "verdict", "evidence"]
    assert list(found["metrics"]) == ["latency_ms", "accuracy", "vram_gb", "throughput_tps"]
    assert found["experts"] == EXPERTS
    assert found["best_mixture"] == [1.2, 0.8, 1.5, 0.9]
    assert (found["success"], found["verdict"], found["evidence"]) == (True, "pass", "measured_target")
    assert found["metrics"]["vram_gb"] == pytest.approx(0.4, abs=0.001)
    assert found["metrics"]["accuracy"] == 0.9
    assert found["metrics"]["latency_ms"] == pytest.approx(20.1, abs=0.1)
    assert found["metrics"]["throughput_tps"] == pytest.approx(498.5, abs=2)


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
    found = build_handoff(record, judgement, experts={}, best_mixture=(), adapted_model="artifact")
    assert found["metrics"]["accuracy"] is None
