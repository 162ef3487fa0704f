"""Two records: proven changes are named, equal ones are equal, and what cannot be compared is refused."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core.bench.compare import Comparison, compare, decide
from havoc_core.bench.record import Record
from havoc_core.errors import IdentityError, MeasurementError

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))


PREFILL_ALONE = {"samples__each__decode": [], "samples__each__ttft": {}}


def noisy(seed: int, *, factor: float = 1.0, **changes: Any) -> Record:
    """Return a record whose prefills scatter by 2 % around 20 ms times `factor`."""
    generator = random.Random(seed)
    values = samples.changed(samples.document("cpu"), run_id=f"noisy-{seed}", **changes)
    for process in values["samples"]:
        durations = [round(20e6 * factor * generator.gauss(1, 0.02)) for _ in range(20)]
        process["prefill"] = {"start_ns": [60_000_000 * call for call in range(20)], "duration_ns": durations}
    return samples.sealed(values)


def change_of(rows: list[Comparison], metric: str) -> Comparison:
    return next(row for row in rows if row.metric == metric)


@pytest.mark.parametrize(("factor", "change"), [(1.0, "equal"), (1.2, "worse"), (0.8, "better")])
def test_a_change_is_named(factor: float, change: str) -> None:
    """20 % slower or faster is proven; the same within the margin is equal, with what would have shown."""
    row = change_of(compare(noisy(1), noisy(2, factor=factor)), "prefill_ms")
    assert row.change == change
    assert row.ratio == pytest.approx(factor, rel=0.02)
    assert row.low is not None
    assert row.high is not None
    assert row.low <= row.ratio <= row.high
    assert row.detectable is not None
    assert 0 < row.detectable < 0.05


def test_no_change_always_says_what_would_have_shown() -> None:
    """Beside "equal" and "undecided" stands the least change the samples would have shown, unless they show none."""
    for row in compare(noisy(1), noisy(2)):
        assert row.change == "not_measured" or row.detectable is not None
    alone = {"samples": [samples.process(0, "CPUExecutionProvider")], "protocol__num_processes": 1}
    single = alone | {"samples__0__ttft": {"start_ns": [0], "duration_ns": [20_000_000]}}
    row = change_of(compare(samples.record("cpu", **single), samples.record("cpu", run_id="b", **single)), "ttft_ms")
    assert (row.change, row.ratio, row.detectable) == ("undecided", 1.0, None)


def test_all_right_twice_is_not_exactly_equal() -> None:
    """100 of 100 in both records leaves room for a change of a few percent: the interval is no point."""
    everything = {"accuracy__math__num_right": 100, "accuracy__math__num_rows": 100}
    row = change_of(compare(noisy(1, **everything), noisy(2, **everything)), "accuracy/math")
    assert row.low is not None
    assert row.high is not None
    assert 0.95 < row.low < 0.99
    assert 1.01 < row.high < 1.05


def test_two_records_of_one_artifact_rarely_differ() -> None:
    """A/A: of 8 pairs drawn from one distribution, none proves a change beyond the margin, at most one is undecided."""
    pairs = [(noisy(seed, **PREFILL_ALONE), noisy(seed + 100, **PREFILL_ALONE)) for seed in range(8)]
    changes = [change_of(compare(old, new), "prefill_ms").change for old, new in pairs]
    assert changes.count("equal") >= 7
    assert set(changes) <= {"equal", "undecided"}


def test_more_is_better_for_rates() -> None:
    """A lower throughput is worse."""
    slower = {"samples__each__decode__each__step_ns": [3_000_000] * 127}
    assert change_of(compare(noisy(1), noisy(2, **slower)), "decode_tok_per_s").change == "worse"


def test_scores_asked_in_two_ways_have_no_ratio() -> None:
    """The same rows with and without solved rows in front are two quantities; what an older record omits is no matter."""
    old, new = (noisy(seed, accuracy__math__few_shot=shots) for seed, shots in ((1, 0), (2, 5)))
    row = change_of(compare(old, new), "accuracy/math")
    assert (row.change, row.ratio, row.reason) == ("not_measured", None, "asked in two ways (solved rows differ)")
    assert change_of(compare(noisy(1), new), "accuracy/math").change == "equal"


def test_memory_and_accuracy() -> None:
    """Peaks are compared as they are, accuracies by their interval; what one record lacks is not measured."""
    rows = compare(noisy(1), noisy(2, memory__rss__each__peak_bytes=800_000_000, accuracy__math__num_right=700))
    assert change_of(rows, "peak_rss_bytes").change == "worse"
    assert change_of(rows, "accuracy/math").change == "worse"
    assert change_of(rows, "accuracy/code").change == "equal"
    missing = change_of(rows, "peak_vram_bytes")
    assert (missing.change, missing.ratio, missing.old) == ("not_measured", None, None)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"device__name": "Other Processor"}, "device"),
        ({"device__fingerprint": "9" * 64}, "fingerprint"),
        ({"host__versions__onnxruntime-gpu": "1.30.0"}, "onnxruntime-gpu"),
        ({"host__versions": {"python": "3.11.7"}}, "onnxruntime-gpu"),
        ({"protocol__num_threads": 1}, "threads"),
        ({"workload__prompt_tokens": 256}, "prompt tokens"),
        ({"evidence": "simulated"}, "evidence"),
        ({"protocol__kv_cache": "preallocated"}, "keys and values None and preallocated"),
        ({"protocol__provider_options": {"use_tf32": "1"}}, "provider options"),
    ],
    ids=["device", "fingerprint", "version", "version-missing", "threads", "work", "evidence", "cache", "options"],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], word: str) -> None:
    """Another device, version or work makes the ratio meaningless: exit code 5 unless asked for."""
    with pytest.raises(IdentityError, match=word):
        compare(noisy(1), noisy(2, **changes))
    assert compare(noisy(1, **PREFILL_ALONE), noisy(2, **PREFILL_ALONE, **changes), across=True)


@pytest.mark.parametrize(
    ("low", "high", "change"),
    [
        (0.96, 1.05, "equal"),
        (0.95, 1.05, "undecided"),
        (0.96, 1.06, "undecided"),
        (0.8, 0.99, "better"),
        (0.8, 1.0, "undecided"),
        (1.01, 1.3, "worse"),
        (1.0, 1.3, "undecided"),
        (None, 1.3, "undecided"),
        (0.5, None, "undecided"),
    ],
)
def test_what_an_interval_proves(low: float | None, high: float | None, change: str) -> None:
    """Equal lies within the margin, a change on one side of 1, everything else is undecided."""
    assert decide(low, high, margin=0.05, is_lower_better=True) == change
    mirrored = {"better": "worse", "worse": "better"}.get(change, change)
    assert decide(low, high, margin=0.05, is_lower_better=False) == mirrored


@pytest.mark.parametrize(
    ("metric", "changes", "word"),
    [
        ("accuracy/math", {"accuracy__math__split": "train", "accuracy__math__num_right": 999}, "gate and train split"),
        ("accuracy/math", {"accuracy__math__rows_sha256": "9" * 64, "accuracy__math__num_right": 999}, "other rows"),
        ("peak_rss_bytes", {"memory__rss__each__method": "allocator"}, "by allocator"),
    ],
    ids=["split", "rows", "memory-method"],
)
def test_other_rows_or_another_method_are_not_compared(metric: str, changes: dict[str, Any], word: str) -> None:
    """Accuracy of another split or other rows, and memory by another method, is no change but not measured: why."""
    row = change_of(compare(noisy(1), noisy(2, **changes)), metric)
    assert (row.change, row.ratio, row.low) == ("not_measured", None, None)
    assert row.old is not None
    assert row.new is not None
    assert word in row.reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"checks": [{"id": "throttling", "status": "invalid", "detail": "hot"}]}, "V03"),
        ({"samples__each__nodes_by_provider": {"CPUExecutionProvider": 1, "Foo": 9}}, "V05"),
        ({"samples__each__num_nonfinite_logits": 5}, "V07"),
    ],
)
def test_an_invalid_record_is_refused(changes: dict[str, Any], word: str) -> None:
    """A faster model that throttled, ran elsewhere or computes NaN is no better one, --across or not: exit code 4."""
    for pair in ((noisy(1), noisy(2, **changes)), (noisy(1, **changes), noisy(2))):
        with pytest.raises(MeasurementError, match=word):
            compare(*pair, across=True)
