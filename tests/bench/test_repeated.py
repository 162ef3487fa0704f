"""Bounds for any number of looks, and limits that state their rows."""

from __future__ import annotations

import random

import pytest

from havoc_core.bench.judge.limits import judge_limit
from havoc_core.bench.judge.repeated import any_time_bounds, log_evidence
from havoc_core.bench.judge.targets import Limit, load_target
from havoc_core.bounds import share_bounds
from tests.bench import sample_records as samples

LIMIT = {"metric": "accuracy/math", "above": 85.0, "unit": "%"}


def test_a_worse_model_does_not_pass_at_some_number_of_rows() -> None:
    """84 % right, looked at after every row from 1 to 1000: passes anywhere in at most 5 %, not in 16.5 %."""
    wanted = 2.9957  # ln(1 / 0.05)
    needed: list[int] = []
    least = 0
    for num_rows in range(1, 1001):
        while least <= num_rows and log_evidence(least, num_rows, share=0.85) < wanted:
            least += 1
        needed.append(least)
    rng = random.Random(1)
    num_passed = 0
    for _ in range(400):
        num_right, has_passed = 0, False
        for num_rows in range(1000):
            num_right += rng.random() < 0.84
            has_passed |= num_right >= needed[num_rows]
        num_passed += has_passed
    assert num_passed <= 0.05 * 400


def test_a_good_model_still_passes() -> None:
    """The price is a few rows: 900 of 1000 prove more than 85 % at any number of looks, 869 do with one look only."""
    assert any_time_bounds(900, 1000, confidence=0.95).low > 0.85
    assert any_time_bounds(869, 1000, confidence=0.95).low < 0.85 < share_bounds(869, 1000, confidence=0.95).low


@pytest.mark.parametrize(("num_right", "num_rows"), [(0, 1), (1, 1), (0, 50), (50, 50), (17, 50), (849, 1000)])
def test_they_are_wider_than_those_of_one_look(num_right: int, num_rows: int) -> None:
    """On both sides, and never beyond the share itself."""
    once, always = (f(num_right, num_rows, confidence=0.95) for f in (share_bounds, any_time_bounds))
    assert 0 <= always.low <= once.low <= once.value <= once.high <= always.high <= 1


def judged(limit: dict[str, object], **accuracy: object) -> tuple[str, str]:
    record = samples.record("cpu", accuracy__math=samples.accuracy(0) | accuracy)
    line = judge_limit(Limit.model_validate(LIMIT | limit, strict=False), [record], load_target("host").protocol)
    return line.verdict, line.reason


CHOSEN = {"data_sha256": "a" * 64, "task_sha256": "b" * 64, "source": "openai/gsm8k/main as folder mine has it"}


@pytest.mark.parametrize(
    "accuracy",
    [CHOSEN, {"task_sha256": "b" * 64}, {"data_sha256": "a" * 64}, {"task_sha256": None}],
    ids=["own-folder", "own-task", "own-rows", "unknown-task"],
)
def test_rows_that_somebody_may_have_chosen_prove_nothing(accuracy: dict[str, object]) -> None:
    """All 1000 right, in a folder of the submitter's: neither a pass nor a miss, and the line to pin them by."""
    strict = {"rows": 1000, "must_be_pinned": True}
    assert judged(strict, num_right=1000)[0] == "pass"
    for num_right in (1000, 0):
        verdict, reason = judged(strict, num_right=num_right, **accuracy)
        assert verdict == "inconclusive"
        assert "pin them (" in reason
    assert judged({"rows": 1000}, num_right=1000, **accuracy)[0] == "pass"


def test_pinned_rows_count_whoever_holds_them() -> None:
    """By the hash of the rows, or of the data; every bundled limit on accuracy asks for it."""
    strict = {"rows": 1000, "must_be_pinned": True}
    assert judged({**strict, "rows_sha256": "0" * 64}, num_right=1000, **CHOSEN)[0] == "pass"
    assert judged({**strict, "data_sha256": "a" * 64}, num_right=1000, **CHOSEN)[0] == "pass"
    bundled = [limit for name in ("host", "gtx1660", "host-text", "gtx1660-text") for limit in load_target(name).limits]
    accuracies = [limit for limit in bundled if limit.metric.startswith("accuracy/")]
    assert len(accuracies) == 14
    assert all(limit.must_be_pinned and limit.rows == 1000 for limit in accuracies)


def test_the_number_that_the_target_states_is_judged_by_one_look() -> None:
    """869 of the stated 1000 pass; of 1000 that nobody stated, or of 1001, they do not."""
    assert judged({"rows": 1000}, num_right=869)[0] == "pass"
    assert judged({}, num_right=869)[0] == "inconclusive"
    assert judged({"rows": 1001}, num_right=869)[0] == "inconclusive"
    assert judged({"rows": 1000}, num_right=19, num_rows=19)[0] == "inconclusive"
    assert judged({}, num_right=700)[0] == "fail"


@pytest.mark.parametrize(
    ("limit", "accuracy", "word"),
    [
        ({"seed": 0}, {"seed": 7}, "rows of seed 7, but the target states seed 0"),
        ({"rows_sha256": "1" * 64}, {"rows_sha256": "2" * 64}, f"SHA-256 {'2' * 16}, but the target pins {'1' * 16}"),
    ],
)
def test_chosen_rows_decide_nothing(limit: dict[str, object], accuracy: dict[str, object], word: str) -> None:
    """1000 rows that the model answers right, called gsm8k, passed; now neither a pass nor a miss is proven by them."""
    for num_right in (1000, 0):
        verdict, reason = judged({"rows": 1000, **limit}, num_right=num_right, **accuracy)
        assert verdict == "inconclusive"
        assert word in reason


def test_only_accuracy_is_judged_on_rows() -> None:
    """A limit on time that states rows is a mistake."""
    with pytest.raises(ValueError, match="prefill_ms is not judged"):
        Limit(metric="prefill_ms", below=1, unit="s", rows=1000)


def test_the_bundled_targets_state_their_rows() -> None:
    """Every limit on accuracy of every bundled target."""
    for name in ("gtx1660", "host", "gtx1660-text", "host-text"):
        limits = [limit for limit in load_target(name).limits if limit.metric.startswith("accuracy/")]
        assert len(limits) == (3 if name.endswith("-text") else 4)
        assert {(limit.rows, limit.seed) for limit in limits} == {(1000, 0)}
