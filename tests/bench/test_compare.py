"""Two records: proven changes are named, equal ones are equal, and what cannot be compared is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest

from havoc_core.bench.judge.compare import Comparison, compare, decide, disturbances
from havoc_core.bench.judge.record import DomainAccuracy, Record
from havoc_core.bench.judge.schema import row_bits
from havoc_core.errors import IdentityError, MeasurementError
from tests.bench import sample_records as samples

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
    """The same rows with and without solved rows in front are two quantities; what an older record omits is not."""
    old, new = (noisy(seed, accuracy__math__few_shot=shots) for seed, shots in ((1, 0), (2, 5)))
    row = change_of(compare(old, new), "accuracy/math")
    assert (row.change, row.ratio, row.reason) == ("not_measured", None, "asked in two ways (solved rows differ)")
    assert change_of(compare(noisy(1), new), "accuracy/math").change == "equal"


@pytest.mark.parametrize("what", ["prefill", "memory"])
def test_one_process_is_no_point(what: str) -> None:
    """A single process does not show how processes differ: no interval for times, a margin for memory."""
    if what == "memory":
        alone = {"memory": {"rss": [samples.memory_series(0) | {"method": "vm_hwm"}]}}
        row = change_of(compare(noisy(1, **alone), noisy(2, **alone)), "peak_rss_bytes")
        assert (row.low, row.high) == (pytest.approx(1 / 1.03**2), pytest.approx(1.03**2))
        return
    alone = {"samples": [samples.process(0, "CPUExecutionProvider")], "protocol__num_processes": 1}
    for pair in ((noisy(1, **alone), noisy(2)), (noisy(1), noisy(2, **alone))):
        row = change_of(compare(*pair), "prefill_ms")
        assert (row.low, row.high, row.change) == (None, None, "undecided")
        assert "single process" in row.reason


def answered(right: list[bool]) -> dict[str, Any]:
    """Return changes that give the rows of math these answers."""
    counts = {"num_right": sum(right), "num_rows": len(right), "right_rows": row_bits(right)}
    return {"accuracy__math": samples.accuracy(0) | counts}


def test_answers_are_compared_row_by_row() -> None:
    """25 of 1000 rows lost and none gained is proven worse at 95 %; sums alone, 900 and 875 right, do not prove it."""
    old = [place < 900 for place in range(1000)]
    new = [place < 875 for place in range(1000)]
    row = change_of(compare(noisy(1, **answered(old)), noisy(2, **answered(new)), margin=0.0), "accuracy/math")
    assert (row.change, row.reason) == ("worse", "0 rows gained, 25 lost")
    sums = [{"accuracy__math__num_right": sum(right)} for right in (old, new)]
    unpaired = change_of(compare(noisy(1, **sums[0]), noisy(2, **sums[1]), margin=0.0), "accuracy/math")
    assert unpaired.change == "undecided"
    assert unpaired.low is not None
    assert unpaired.high is not None
    assert row.low is not None
    assert row.high is not None
    assert row.high - row.low < 0.7 * (unpaired.high - unpaired.low)


def test_the_rows_of_a_record_are_those_it_counts() -> None:
    """One bit a row; more or other bits than the sums say are no record."""
    right = [True, False, True, True, False]
    assert row_bits(right) == "b0"
    found = DomainAccuracy.model_validate(answered(right)["accuracy__math"], strict=False)
    assert found.is_right() == tuple(right)
    for wrong in ({"right_rows": "b"}, {"right_rows": "f0"}, {"right_rows": "b00"}):
        with pytest.raises(ValueError, match="right_rows"):
            DomainAccuracy.model_validate(answered(right)["accuracy__math"] | wrong, strict=False)


def test_disturbed_records_are_warned_of_and_prove_less() -> None:
    """Beside other work for a moment: a sentence for each record, and an interval that holds the calm calls too."""
    beside = {"samples__each__surroundings": samples.surroundings(foreign=(0.2, 0.3))}
    calm, busy = noisy(1, **PREFILL_ALONE), noisy(2, **PREFILL_ALONE, **beside)
    assert disturbances(calm, noisy(3)) == []
    (warning,) = disturbances(calm, busy)
    assert "noisy-2 was disturbed" in warning
    quiet, disturbed = (change_of(compare(calm, record), "prefill_ms") for record in (noisy(2, **PREFILL_ALONE), busy))
    assert quiet.low is not None
    assert disturbed.low is not None
    assert disturbed.low <= quiet.low
    unsettled = noisy(4, samples__each__warmup__classification="no_steady_state")
    assert disturbances(unsettled, calm) == ["5 processes of the old record noisy-4 did not settle"]
    all_along = {"samples__0__surroundings": samples.surroundings(foreign=(0.0, 1.4))}
    row = change_of(compare(calm, noisy(5, **all_along)), "prefill_ms")
    assert (row.change, row.low) == ("undecided", None)


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
