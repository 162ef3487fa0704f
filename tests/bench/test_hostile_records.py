"""Whatever a sound record holds, it is judged, compared and reported, or refused in one line."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from havoc_core import bounds
from havoc_core.bench.judge import ratios
from havoc_core.bench.judge.compare import compare
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import Record, load_record, seal_of
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.report import page
from havoc_core.bench.report.folder import junit, telemetry_csv
from havoc_core.bench.report.history import entry
from havoc_core.bench.report.run import Run
from havoc_core.errors import HavocError
from tests.bench import sample_records as samples

TARGETS = [load_target(name) for name in ("host", "gtx1660")]
GOOD = samples.record("cpu")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redraw little: whether something is raised does not depend on how often."""
    monkeypatch.setattr(bounds, "NUM_RESAMPLES", 20)
    monkeypatch.setattr(bounds, "TAIL_RESAMPLES", 0.1)
    monkeypatch.setattr(ratios, "NUM_RESAMPLES", 20)


def read_everything(record: Record, *, is_drawn: bool) -> None:
    """Do all that the offline verbs do with a record; drawing takes longest."""
    judged = tuple((target, judge([record], target, this_cpu=samples.THIS_CPU)) for target in TARGETS)
    for pair in ((GOOD, record), (record, record)):
        with contextlib.suppress(HavocError):  # what is invalid is not compared
            compare(*pair, across=True)
    entry("folder", record, [judgement for _, judgement in judged])
    run = Run(record=record, judged=judged)
    page.markdown(run)
    junit(run)
    telemetry_csv(record)
    if is_drawn:
        page.html(run)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value of a document; of a list, its first and last."""
    if isinstance(node, dict):
        return [path] + [place for key in node for place in places(node[key], (*path, key))]
    if isinstance(node, list):
        ends = sorted({0, len(node) - 1}) if node else []
        return [path] + [place for index in ends for place in places(node[index], (*path, index))]
    return [path]


_other = {
    int: st.integers(0, 2**62 - 1) | st.sampled_from([0, 1, 2, 2**61, 2**62 - 1, 10**400]),
    float: st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e308, -1e308, 5e-324]),
    str: st.text(max_size=12) | st.sampled_from(["cuda", "cpu", "gate", "search", "screen", "a/b", "__class__"]),
    bool: st.booleans(),
}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sealed_record_with_odd_values_never_surprises(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """One to three values replaced by others of their type, lists emptied, parts removed, and sealed again."""
    document = samples.record(kind).document()
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([place for place in places(document) if place]))
        node = document
        for key in parents:
            node = node[key]
        value = node[last]
        if isinstance(value, (dict, list)):
            node[last] = data.draw(st.sampled_from([type(value)(), None, value]))
        else:
            node[last] = data.draw(_other.get(type(value), st.none()) | st.none())
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**document, "sha256": seal_of(document)}))
    try:
        record = load_record(path)
    except HavocError as error:
        assert "\n" not in str(error)
        return
    read_everything(record, is_drawn=False)


def full_document() -> dict[str, Any]:
    """Return a record in which every number there can be is given."""
    document = samples.document("cpu")
    document["energy"] = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0}
    document["protocol"] |= {"memory_interval_ms": 10.0, "telemetry_interval_ms": 500.0}
    document["telemetry"][0] |= {"power_w": 50.0, "used_bytes": 1, "memory_clock_mhz": 1, "sm_clock_mhz": 1}
    document["memory"]["rss"][0] |= {"cross_check_bytes": 400_000_000, "max_gap_ms": 1.0, "spilled_bytes": 0}
    document["checks"] = [{"id": "drift", "status": "ok", "detail": "", "value": 0.1, "limit": 0.1}]
    document["samples"][0] |= {"steal_share": 0.1, "foreign_cpu_share": 0.1, "major_page_faults": 0}
    return Record.model_validate(document, strict=False).document()


FULL = full_document()


def with_value(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at a place; what does not change is shared."""
    if not path:
        return value
    key, *rest = path
    changed = with_value(node[key], tuple(rest), value)
    if isinstance(node, dict):
        return node | {key: changed}
    return [*node[:key], changed, *node[key + 1 :]]


def number_at(path: tuple[Any, ...]) -> bool:
    node = FULL
    for key in path:
        node = node[key]
    return isinstance(node, (int, float)) and not isinstance(node, bool)


# Of lists the first item: the others have the same bounds.
NUMBERS = [path for path in places(FULL) if number_at(path) and not any(isinstance(key, int) and key for key in path)]
OUTERMOST = (2**24 - 1, 2**61, 10**400, 1e308)


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_no_number_is_too_large_for_what_is_computed(path: tuple[Any, ...]) -> None:
    """Every number of a record in turn, at the ends of what a number may be: refused, or computed with."""
    for value in OUTERMOST:
        try:
            record = Record.model_validate_json(json.dumps(with_value(FULL, path, value))).sealed()
        except ValueError:
            continue
        read_everything(record, is_drawn=path[:2] == ("telemetry", 0))


EXTREMES = {
    "one-call": {"samples__each__prefill": {"start_ns": [0], "duration_ns": [1]}},
    "longest-calls": {"samples__each__prefill": {"start_ns": [0], "duration_ns": [2**62 - 1]}},
    "one-process": {"samples": [samples.process(0, "CPUExecutionProvider")], "protocol__num_processes": 1},
    "largest-peak": {"memory__rss__each__peak_bytes": 2**62 - 1},
    "smallest-weights": {"subject__weight_bytes": 1, "subject__num_parameters": 0},
    "none-right": {"accuracy__math__num_right": 0},
    "no-versions": {"host__versions": {}},
    "no-alpha": {"subject__alpha": {}},
    "no-series": {"memory__rss__each__time_ns": [], "memory__rss__each__reading_bytes": []},
    "no-clock": {"telemetry__each__cpu_clock_mhz": None, "telemetry__each__temperature_c": None},
    "telemetry-of-nobody": {"telemetry__each__process": 99},
    "one-phase": {"memory__rss__each__phase_start_ns": {"start": 2**61}},
}


@pytest.mark.parametrize("changes", EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    """The ends of what the schema allows."""
    samples.record("cpu", **changes).save(tmp_path / "record.json")
    try:
        read_everything(load_record(tmp_path / "record.json"), is_drawn=True)
    except HavocError as error:
        assert "\n" not in str(error)


@given(st.lists(st.floats(1e-6, 1e13), min_size=1, max_size=20), st.floats(0.5, 0.999), st.floats(0.5, 0.999999))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([1e-6, 1e13], 0.5, 0.95)
def test_bounds_take_whatever_a_record_may_hold(values: list[float], quantile: float, confidence: float) -> None:
    """From a nanosecond to a century no quantile or confidence ends in an exception, and bounds keep their order."""
    found = bounds.quantile_bounds(values, quantile=quantile, confidence=confidence)
    assert found.low is None or found.low <= max(values)
    assert found.high is None or found.high >= min(values)
    assert bounds.next_bound(values, scatter=values, confidence=confidence) >= 0
    if len(values) > 1:
        assert ratios.detectable_change(min(values), max(values), confidence=0.975) >= 0
