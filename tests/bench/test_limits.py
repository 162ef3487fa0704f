"""Each kind of limit: proven met, proven missed, undecided, not measured; and the properties that keep it honest."""

from __future__ import annotations

import math
import random
import re
from statistics import NormalDist
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import binom

from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.judge import limits as judging
from havoc_core.bench.judge.limits import Line, judge_limit
from havoc_core.bench.judge.metrics import Kind
from havoc_core.bench.judge.targets import Limit, RequiredProtocol
from tests.bench import sample_records as samples

EFFORT = RequiredProtocol(min_processes=5, min_samples=64, min_busy_s=0.0)
PREFILL = Limit(metric="prefill_ms", below=100.0, unit="ms")
DECODE = Limit(metric="decode_tok_per_s", above=50.0, unit="tok/s")
RSS = Limit(metric="peak_rss_bytes", below=2.0, unit="GB")
MATH = Limit(metric="accuracy/math", above=85.0, unit="%", rows=1000)
KL = Limit(metric="kl_mean", below=0.15, unit="nats")
TOP1 = Limit(metric="top1_share", above=80.0, unit="%")
LOAD = Limit(metric="load_s", below=1.0, unit="s")
ENERGY = Limit(metric="energy_j_per_tok", below=1.0, unit="J/tok")


RANDOM_IDS = samples.COST | {"text": "random ids", "text_sha256": None}


def cost(**changes: Any) -> dict[str, Any]:
    """Return changes that give the artifact another cost; the pieces follow a changed mean."""
    found = {**samples.COST, **changes}
    if "kl_mean" in changes and "kl_chunks" not in changes:
        scale = found["kl_mean"] / samples.COST["kl_mean"]
        found["kl_chunks"] = [scale * piece for piece in samples.COST["kl_chunks"]]
    return {"subject__format_cost": found}


def line(limit: Limit, *, effort: RequiredProtocol = EFFORT, kind: str = "cpu", **changes: Any) -> Line:
    return judge_limit(limit, [samples.record(kind, **changes)], effort)


def test_every_kind_of_metric_has_a_statistic_and_a_judge() -> None:
    """A new kind is told what it is of its samples, and how it is judged."""
    assert set(get_args(Kind)) == set(judging._EVIDENCE)
    assert set(get_args(Kind)) == {"latency", *judging.STATISTICS}


@pytest.mark.parametrize("limit", [PREFILL, DECODE, RSS, MATH, LOAD, KL, TOP1], ids=lambda limit: limit.metric)
def test_a_good_record_proves_each_limit(limit: Limit) -> None:
    """The known-good twin of what follows."""
    found = line(limit)
    assert (found.verdict, found.reason, found.num_samples_short) == ("pass", "proven met", None)
    assert found.value is not None


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        (PREFILL, {"samples": []}),
        (PREFILL, {"samples__each__prefill": {"start_ns": [], "duration_ns": []}}),
        (DECODE, {"samples__each__decode": []}),
        (RSS, {"memory": {"rss_reason": "no samples"}}),
        (MATH, {"accuracy": {}}),
        (KL, {"subject__format_cost": None}),
        (TOP1, {"subject__format_cost": None}),
        (KL, {"subject__format_cost": RANDOM_IDS}),
        (TOP1, {"subject__format_cost": RANDOM_IDS}),
        (LOAD, {"samples": []}),
        (ENERGY, {}),
    ],
    ids=[
        "no-process",
        "no-prefill",
        "no-decode",
        "no-memory",
        "no-accuracy",
        "no-kl",
        "no-top1",
        "kl-of-random-ids",
        "top1-of-random-ids",
        "no-load",
        "no-energy",
    ],
)
def test_missing_data_is_not_measured(limit: Limit, changes: dict[str, Any]) -> None:
    """Nothing measured is never 0, never a pass and never a fail."""
    found = line(limit, **changes)
    assert found.verdict == "not_measured"
    assert found.value is found.low is found.high is None
    assert found.num_samples == 0


def test_the_reason_for_missing_memory_is_told() -> None:
    """Where the harness knows why it has no figure, the verdict says so."""
    found = line(RSS, memory={"rss_reason": "this system shows no resident set"})
    assert found.reason == "this system shows no resident set"


def test_latency_on_the_limit_is_missed() -> None:
    """Below means below: samples of exactly 100 ms prove a miss, of a nanosecond less a pass."""
    assert line(PREFILL, **samples.prefills(*[[100.0] * 20] * 5)).verdict == "fail"
    assert line(PREFILL, **samples.prefills(*[[99.999999] * 20] * 5)).verdict == "pass"


def test_latency_across_the_limit_is_undecided() -> None:
    """Eight of 100 over the limit are too many for 95 % confidence in a p90, and too few to prove a miss."""
    found = line(PREFILL, **samples.prefills(*[[50.0] * 19 + [150.0] * 1] * 4, [50.0] * 16 + [150.0] * 4))
    assert found.verdict == "inconclusive"
    found = line(PREFILL, **samples.prefills(*[[50.0] * 19 + [150.0]] * 2, *[[50.0] * 18 + [150.0] * 2] * 3))
    assert found.verdict == "inconclusive"
    assert found.num_samples_short is not None
    assert found.num_samples_short > 0
    assert str(found.num_samples_short) in found.reason


def test_every_process_must_hold_the_limit() -> None:
    """One slow process of eight keeps the pooled bound under the limit, but not the verdict."""
    fast, slow = [50.0] * 100, [50.0] * 85 + [150.0] * 15
    found = line(PREFILL, **samples.prefills(*[fast] * 7, slow))
    assert found.high is not None
    assert found.high < 100
    assert found.verdict == "inconclusive"
    assert "slowest process" in found.reason


def test_processes_that_scatter_prove_nothing_of_the_next() -> None:
    """All five hold the limit, but by how they differ a sixth may not: undecided; further below the limit: a pass."""
    apart = samples.prefills(*[[level] * 40 for level in (80.0, 84.0, 88.0, 92.0, 96.0)])
    found = line(PREFILL, **apart)
    assert found.high == pytest.approx(102.77, abs=0.01)
    assert (found.verdict, found.reason) == ("inconclusive", "the processes scatter: one more may have p90 = 102.8 ms")
    assert line(Limit(metric="prefill_ms", below=103.0, unit="ms"), **apart).verdict == "pass"


def test_one_fast_process_puts_a_miss_in_doubt() -> None:
    """Four slow processes and a fast one: most calls miss the limit, yet one process holds it: nothing is proven.

    Of four processes none is in doubt, but four do not carry 95 %.
    """
    found = line(PREFILL, **samples.prefills([99.0] * 40, *[[150.0] * 40] * 4))
    assert (found.low, found.verdict) == (99.0, "inconclusive")
    assert line(PREFILL, **samples.prefills(*[[150.0] * 40] * 4)).verdict == "inconclusive"
    assert line(PREFILL, **samples.prefills([100.0] * 40, *[[150.0] * 40] * 4)).verdict == "fail"


@pytest.mark.parametrize("between", [0.0, 0.01, 0.02], ids=["alike", "half", "as-much"])
def test_verdicts_on_latency_are_wrong_as_rarely_as_claimed(between: float) -> None:
    """A limit at the true p90 is passed or failed in no more than 5 % of cases, also where processes differ.

    Processes differ by nothing, half as much, or as much as the calls within one: then calls are far from independent.
    """
    generator, trials, wrong = random.Random(13), 150, {"pass": 0, "fail": 0, "inconclusive": 0}
    true_p90 = 50.0 * (1 + NormalDist().inv_cdf(0.9) * math.hypot(between, 0.02))
    limit = Limit(metric="prefill_ms", below=true_p90, unit="ms")
    for _ in range(trials):
        levels = [50.0 * generator.gauss(1, between) for _ in range(5)]
        calls = [[level + generator.gauss(0, 1.0) for _ in range(30)] for level in levels]
        wrong[line(limit, **samples.prefills(*calls)).verdict] += 1
    assert wrong["pass"] <= binom.ppf(0.9999, trials, 0.05)
    assert wrong["fail"] <= binom.ppf(0.9999, trials, 0.05)


def test_too_few_samples_are_undecided_and_counted() -> None:
    """63 samples of 64: the verdict says how many are missing."""
    found = line(PREFILL, **samples.prefills([50.0] * 15, *[[50.0] * 12] * 4))
    assert (found.verdict, found.num_samples, found.num_samples_short) == ("inconclusive", 63, 1)
    assert line(PREFILL, **samples.prefills(*[[50.0] * 13] * 4, [50.0] * 12)).verdict == "pass"


def test_too_few_processes_are_undecided() -> None:
    """Four processes of five: samples within one process resemble each other."""
    found = line(PREFILL, **samples.prefills(*[[50.0] * 40] * 4))
    assert found.verdict == "inconclusive"
    assert found.reason == "4 processes, 5 are needed"
    assert line(PREFILL, **samples.prefills(*[[50.0] * 40] * 5)).verdict == "pass"


def test_too_little_time_is_undecided() -> None:
    """A cold card is fast: the target's busy time must have passed."""
    effort = EFFORT.model_copy(update={"min_busy_s": 65.0})
    assert line(PREFILL, effort=effort).verdict == "pass"
    assert line(DECODE, effort=effort).verdict == "pass"
    found = line(PREFILL, effort=EFFORT.model_copy(update={"min_busy_s": 65.1}))
    assert found.verdict == "inconclusive"
    assert "busy" in found.reason
    assert line(DECODE, effort=EFFORT.model_copy(update={"min_busy_s": 65.1})).verdict == "inconclusive"


@pytest.mark.parametrize("classification", ["slowdown", "no_steady_state"])
def test_an_unsettled_process_needs_room(classification: str) -> None:
    """What did not settle proves a limit, met or missed, only by a factor of two."""
    unsettled = {"samples__2__warmup__classification": classification}
    for limit_ms, verdict in ((19.0, "inconclusive"), (10.1, "inconclusive"), (10.0, "fail")):
        limit = Limit(metric="prefill_ms", below=limit_ms, unit="ms")
        assert (line(limit).verdict, line(limit, **unsettled).verdict) == ("fail", verdict)
    for rate, verdict in ((510.0, "inconclusive"), (990.0, "inconclusive"), (1010.0, "fail")):
        limit = Limit(metric="decode_tok_per_s", above=rate, unit="tok/s")
        assert (line(limit).verdict, line(limit, **unsettled).verdict) == ("fail", verdict)
    assert line(PREFILL, **unsettled).verdict == "pass"
    assert line(Limit(metric="prefill_ms", below=39.0, unit="ms"), **unsettled).verdict == "inconclusive"
    assert line(DECODE, **unsettled).verdict == "pass"
    assert line(Limit(metric="decode_tok_per_s", above=260.0, unit="tok/s"), **unsettled).verdict == "inconclusive"
    assert line(Limit(metric="prefill_ms", below=39.0, unit="ms")).verdict == "pass"
    assert line(Limit(metric="decode_tok_per_s", above=260.0, unit="tok/s")).verdict == "pass"


def surrounded(**spans: tuple[float, float]) -> dict[str, Any]:
    """Return changes that put each process beside something that took the CPU for some seconds."""
    return {"samples__each__surroundings": samples.surroundings(**spans)}


@pytest.mark.parametrize("what", ["foreign", "waited", "stolen"])
def test_a_disturbed_call_says_nothing_on_either_side(what: str) -> None:
    """Calls beside other work, off the CPU, or while the hypervisor had it, count as slow for a pass, fast for a miss.

    The 20 prefills of each process begin 0.1 s after it and take 0.42 s: all of them are disturbed in the first second,
    and of the first tokens that follow one in twenty is.
    """
    missed = Limit(metric="prefill_ms", below=10.0, unit="ms")
    for limit, calm_verdict in ((PREFILL, "pass"), (missed, "fail")):
        assert line(limit, **surrounded()).verdict == calm_verdict
        found = line(limit, **surrounded(**{what: (0.0, 1.0)}))
        assert (found.verdict, found.low, found.high) == ("inconclusive", None, None)
        assert found.num_disturbed == 100
        assert "100 of 100 calls" in found.reason


def test_a_few_disturbed_calls_widen_the_bounds() -> None:
    """One call of twenty in each process: 5 of 100 are one too many for the p90, and the lower bound falls as well."""
    calm, found = (line(PREFILL, **surrounded(foreign=span)) for span in ((0.0, 0.0), (0.5, 0.6)))
    assert (calm.num_disturbed, calm.verdict) == (0, "pass")
    assert (found.num_disturbed, found.high, found.verdict) == (5, None, "inconclusive")
    assert calm.low is not None
    assert found.low is not None
    assert found.low <= calm.low


def test_disturbed_steps_are_left_out_and_bound_both_sides() -> None:
    """Two runs of three are slow beside other work: the lower bound is of all steps, the upper one of the calm ones."""
    slow: dict[str, Any] = {}
    for index in range(5):
        for place, (start_ns, step_ns) in enumerate(((13.6e9, 4e6), (14.2e9, 4e6), (15.1e9, 2e6))):
            slow[f"samples__{index}__decode__{place}__start_ns"] = int(start_ns)
            slow[f"samples__{index}__decode__{place}__step_ns"] = [int(step_ns) + 1000 * index] * 127
    beside = {"samples__each__surroundings": samples.surroundings(foreign=(13.5, 15.0))}
    at = {rate: Limit(metric="decode_tok_per_s", above=rate, unit="tok/s") for rate in (200, 300, 495, 510)}
    assert [line(at[rate], **slow).verdict for rate in at] == ["pass", "inconclusive", "fail", "fail"]
    found = [line(at[rate], **slow, **beside) for rate in at]
    assert [line.verdict for line in found] == ["pass", "inconclusive", "inconclusive", "fail"]
    assert {line.num_disturbed for line in found} == {10}


def test_disturbed_loads_prove_nothing() -> None:
    """Loads beside other work neither hold nor miss a limit; the same loads on a quiet machine do."""
    for limit_s, verdict in ((1.0, "pass"), (0.1, "fail")):
        limit = Limit(metric="load_s", below=limit_s, unit="s")
        assert line(limit, **surrounded()).verdict == verdict
        assert line(limit, **surrounded(foreign=(0.0, 0.3))).verdict == "inconclusive"


def test_energy_beside_other_work_proves_nothing() -> None:
    """The counter counts the neighbour too: neither a pass nor a miss."""
    each = [0.5, 0.51, 0.49, 0.5, 0.5]
    energy = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0, "process_j_per_tok": each}
    for joules, verdict in ((50.0, "pass"), (200.0, "fail")):
        spent = {"energy": energy | {"joules": joules}}
        assert line(ENERGY, **spent, **surrounded()).verdict == verdict
        assert line(ENERGY, **spent, **surrounded(foreign=(13.8, 14.0))).verdict == "inconclusive"


def test_a_miss_is_a_miss_however_few_calls_there_were() -> None:
    """One slow call in each of five processes proves a miss without the effort of a pass; all in one process do not."""
    assert line(PREFILL, **samples.prefills(*[[150.0]] * 5)).verdict == "fail"
    assert line(PREFILL, **samples.prefills([150.0] * 30)).verdict == "inconclusive"
    slow = Limit(metric="decode_tok_per_s", above=510.0, unit="tok/s")
    one = {"samples": samples.document("cpu")["samples"][:1], "protocol__num_processes": 1}
    assert line(slow).verdict == "fail"
    assert line(slow, **one).verdict == "inconclusive"


def test_throughput_on_both_sides() -> None:
    """About 499 tokens per second: a limit below is met, one above is missed."""
    assert line(Limit(metric="decode_tok_per_s", above=490.0, unit="tok/s")).verdict == "pass"
    assert line(Limit(metric="decode_tok_per_s", above=510.0, unit="tok/s")).verdict == "fail"


def test_throughput_of_every_process_counts() -> None:
    """One process under the limit keeps the rest from passing."""
    slow = {"samples__0__decode__each__step_ns": [2_600_000] * 127}
    limit = Limit(metric="decode_tok_per_s", above=400.0, unit="tok/s")
    assert line(limit).verdict == "pass"
    found = line(limit, **slow)
    assert found.verdict == "inconclusive"


def test_throughput_needs_its_processes() -> None:
    """Runs in three of five processes are too few."""
    found = line(DECODE, samples__0__decode=[], samples__1__decode=[])
    assert (found.verdict, found.num_processes) == ("inconclusive", 3)


def test_memory_is_the_worst_process_and_a_margin() -> None:
    """Between the peak and the peak with 3 % more, sampling cannot tell; without gaps it is what processes scatter."""
    peak = 400_000_001
    for limit_bytes, verdict in (
        (peak, "fail"),
        (peak + 1, "inconclusive"),
        (412_000_001, "inconclusive"),
        (412_000_002, "pass"),
    ):
        assert line(Limit(metric="peak_rss_bytes", below=limit_bytes, unit="bytes")).verdict == verdict
    exact = {"memory__rss__each__method": "nvml_accounting"}
    assert line(Limit(metric="peak_rss_bytes", below=peak + 5, unit="bytes"), **exact).verdict == "pass"
    assert line(Limit(metric="peak_rss_bytes", below=peak + 4, unit="bytes"), **exact).verdict == "inconclusive"
    assert line(Limit(metric="peak_rss_bytes", below=peak, unit="bytes"), **exact).verdict == "fail"
    alone = {"memory": {"rss": [samples.memory_series(0) | {"method": "vm_hwm"}]}}
    for limit_bytes, verdict in ((412_000_000, "inconclusive"), (412_000_001, "pass")):
        assert line(Limit(metric="peak_rss_bytes", below=limit_bytes, unit="bytes"), **alone).verdict == verdict


def test_allocator_statistics_prove_no_pass() -> None:
    """They miss what others hold: a lower bound may fail a limit, never pass it."""
    blind = {"memory__rss__1__method": "allocator"}
    assert line(RSS, **blind).verdict == "inconclusive"
    assert line(Limit(metric="peak_rss_bytes", below=300.0, unit="MB"), **blind).verdict == "fail"


def test_device_memory_is_not_host_memory() -> None:
    """A record with host memory alone says nothing of VRAM, and the other way round."""
    vram = Limit(metric="peak_vram_bytes", below=2.0, unit="GB")
    assert line(vram).verdict == "not_measured"
    assert line(vram, kind="cuda").verdict == "pass"
    assert line(RSS, kind="cuda").verdict == "not_measured"


@pytest.mark.parametrize(
    ("num_right", "verdict"), [(830, "fail"), (831, "inconclusive"), (868, "inconclusive"), (869, "pass")]
)
def test_accuracy_of_1000_rows(num_right: int, verdict: str) -> None:
    """869 of 1000 prove more than 85 %, 830 prove less, what lies between proves neither."""
    assert line(MATH, accuracy__math__num_right=num_right).verdict == verdict


def test_a_hundred_rows_need_92() -> None:
    """The seed's sample of 100 rows: 91 right do not prove 85 %, and the verdict says how many rows would."""
    rows, limit = {"accuracy__math__num_rows": 100}, MATH.model_copy(update={"rows": 100})
    found = line(limit, accuracy__math__num_right=91, **rows)
    assert found.verdict == "inconclusive"
    assert found.num_samples_short is not None
    assert line(limit, accuracy__math__num_right=92, **rows).verdict == "pass"


def test_rows_the_judge_could_not_decide_count_as_wrong() -> None:
    """131 failed judgements beside 869 right answers pass; the share is of all rows."""
    found = line(MATH, accuracy__math__num_right=869, accuracy__math__num_failed=131)
    assert (found.verdict, found.value) == ("pass", 0.869)


@pytest.mark.parametrize("split", ["train", "search"])
def test_only_the_gate_split_counts(split: str) -> None:
    """What the search has seen proves nothing."""
    found = line(MATH, accuracy__math__split=split)
    assert found.verdict == "not_measured"
    assert split in found.reason


def test_a_confidence_that_resamples_cannot_carry_proves_nothing() -> None:
    """The bound of a rate at 0.999999 is not the one at 0.95: it is none, and the line says why."""
    limits = [Limit(metric="decode_tok_per_s", above=50, unit="tok/s", confidence=share) for share in (0.95, 0.999999)]
    found = [judge_limit(limit, [samples.record("cpu")], EFFORT) for limit in limits]
    assert [line.verdict for line in found] == ["pass", "inconclusive"]
    assert found[1].low is None
    assert re.search("^5 processes .* 0.999999: lower it$", found[1].reason)


def test_rows_count_once_however_often_they_are_scored() -> None:
    """Two records with the same rows are one sample, and so are the first 1000 rows and 1001: the larger set counts."""
    again = samples.record("cpu", run_id="again")
    more = {"num_rows": 1001, "num_right": 901, "rows_sha256": "f" * 64}
    larger = samples.record("cpu", run_id="larger", accuracy__math={**samples.accuracy(0), **more})
    free = MATH.model_copy(update={"rows": None})
    assert judge_limit(free, [samples.record("cpu"), again], EFFORT).num_samples == 1000
    for records in ([samples.record("cpu"), larger], [larger, samples.record("cpu")]):
        assert judge_limit(free, records, EFFORT).num_samples == 1001
        assert judge_limit(MATH, records, EFFORT).num_samples == 1000  # those that the target states


def test_more_rows_are_asked_for_in_one_set() -> None:
    """What would decide is a larger measurement, not one beside it: `--n` is the number to ask for."""
    found = line(MATH, accuracy__math__num_right=860)
    assert found.num_samples_short is not None
    assert f"{found.num_samples_short} more rows" in found.reason
    assert f"--n {1000 + found.num_samples_short}" in found.reason


def test_load_is_the_slowest_process() -> None:
    """A single slow load of five decides; what they scatter, one more may too."""
    assert line(LOAD, samples__3__load_ns=1_000_000_000).verdict == "fail"
    assert line(LOAD, samples__3__load_ns=999_999_999).verdict == "inconclusive"
    assert line(LOAD, samples__each__load_ns=999_999_990).verdict == "pass"
    assert line(LOAD, **samples.prefills(*[[50.0] * 40] * 4)).verdict == "inconclusive"


def test_energy_needs_a_span() -> None:
    """Ten seconds are the least in which a counter is believed, and one figure for all processes has no bounds."""
    each = [0.5, 0.51, 0.49, 0.5, 0.5]
    energy = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0, "process_j_per_tok": each}
    assert line(ENERGY, energy=energy).verdict == "pass"
    assert line(ENERGY, energy=energy | {"span_s": 9.9}).verdict == "inconclusive"
    assert line(ENERGY, energy=energy | {"joules": 101.0}).verdict == "inconclusive"
    assert line(ENERGY, energy=energy | {"joules": 102.0}).verdict == "fail"
    assert line(ENERGY, energy=energy | {"process_j_per_tok": []}).verdict == "inconclusive"


ORDER = {"fail": 0, "inconclusive": 1, "pass": 2}


@given(
    st.lists(st.lists(st.floats(80, 110), min_size=3, max_size=30), min_size=5, max_size=5),
    st.lists(st.floats(0, 50), min_size=1, max_size=30),
    st.integers(0, 4),
)
def test_slower_samples_never_better_a_verdict(times: list[list[float]], slower: list[float], where: int) -> None:
    """Samples at or over the limit turn no fail and no doubt into a pass, in whichever process they come."""
    before = line(PREFILL, **samples.prefills(*times))
    worse = [100.0 + extra for extra in slower]
    after = line(PREFILL, **samples.prefills(*[calls + worse * (index == where) for index, calls in enumerate(times)]))
    assert ORDER[after.verdict] <= ORDER[before.verdict]


@given(st.floats(0.97, 1.03), st.lists(st.floats(0, 0.2), min_size=1, max_size=3), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_slower_runs_never_turn_a_fail_into_a_pass(level: float, slower: list[float], where: int) -> None:
    """Decode runs at or under the limit do not pass what failed, and raise the bound by no more than redrawing does."""
    limit = Limit(metric="decode_tok_per_s", above=500.0, unit="tok/s")
    scatter = random.Random(level)
    runs = [[_run(2e6 / level * scatter.gauss(1, 0.01)) for _ in range(3)] for _ in range(5)]
    before = line(limit, **decodes(runs))
    worse = [_run(2e6 * (1 + extra)) for extra in slower]
    after = line(limit, **decodes([some + worse * (index == where) for index, some in enumerate(runs)]))
    assert (before.verdict, after.verdict) != ("fail", "pass")
    assert before.low is not None
    assert after.low is not None
    assert before.low > 500 or after.low < 1.02 * before.low


def _run(step_ns: float) -> dict[str, Any]:
    return {"start_ns": 0, "prefill_ns": 20_000_000, "step_ns": [round(step_ns)] * 127, "num_tokens": 128}


def decodes(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {f"samples__{index}__decode": some for index, some in enumerate(runs)}


@given(st.lists(st.floats(80, 120), min_size=13, max_size=30), st.floats(1.0, 1.5))
def test_slowing_every_sample_never_betters_a_verdict(times: list[float], factor: float) -> None:
    """A slower model is never judged better."""
    before = line(PREFILL, **samples.prefills(*[times] * 5))
    after = line(PREFILL, **samples.prefills(*[[factor * ms for ms in times]] * 5))
    assert ORDER[after.verdict] <= ORDER[before.verdict]


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_more_right_answers_never_worsen_a_verdict(first: int, second: int) -> None:
    """Accuracy verdicts rise with right answers."""
    low, high = sorted((first, second))
    verdicts = [line(MATH, accuracy__math__num_right=right).verdict for right in (low, high)]
    assert ORDER[verdicts[0]] <= ORDER[verdicts[1]]


@pytest.mark.parametrize(
    ("kl_mean", "verdict"),
    [(0.02, "pass"), (0.144, "pass"), (0.149, "inconclusive"), (0.151, "inconclusive"), (0.156, "fail")],
)
def test_divergence_is_bounded_by_how_pieces_of_text_scatter(kl_mean: float, verdict: str) -> None:
    """Twelve pieces that scatter by 7 %: within 3.4 % of the limit on either side the text cannot tell."""
    found = line(KL, **cost(kl_mean=kl_mean))
    assert (found.verdict, found.num_samples) == (verdict, 768)
    assert found.value == pytest.approx(kl_mean)
    if verdict == "inconclusive":
        assert "--calibration FILE" in found.reason


@pytest.mark.parametrize(
    ("num_same", "verdict"), [(768, "pass"), (634, "pass"), (632, "inconclusive"), (596, "inconclusive"), (594, "fail")]
)
def test_agreement_is_a_share_of_positions(num_same: int, verdict: str) -> None:
    """An exact binomial bound, as of right answers: 633 or 634 of 768 prove more than 80 %."""
    assert line(TOP1, **cost(top1_share=num_same / 768)).verdict == verdict


def test_one_piece_of_text_proves_nothing() -> None:
    """It has no scatter, so neither a pass nor a miss is known of other text."""
    for kl_mean in (0.0, 9.0):
        found = line(KL, **cost(kl_mean=kl_mean, kl_chunks=[kl_mean]))
        assert found.verdict == "inconclusive"
        assert "no scatter" in found.reason


def test_the_worst_of_several_records_counts() -> None:
    """Records of one artifact exported twice over other texts: neither hides the other, and a silent one neither."""
    good, coarse = samples.record("cpu"), samples.second(**cost(kl_mean=0.5, top1_share=0.5))
    silent = samples.second(subject__format_cost=None)
    for records in ([good, coarse], [coarse, good]):
        assert judge_limit(KL, records, EFFORT).verdict == "fail"
        assert judge_limit(TOP1, records, EFFORT).verdict == "fail"
    assert judge_limit(KL, [silent, good], EFFORT).verdict == "pass"


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_mean": 0.01, "kl_chunks": samples.COST["kl_chunks"]},
        {"top1_share": 0.9371},
        {"num_positions": 767, "top1_share": 1.0},
        {"text_sha256": None},
        {"text": "random ids"},
        {"kl_chunks": []},
        {"kl_mean": -0.02},
        {"top1_share": 1.1},
        {"perplexity_ratio": 0.0},
    ],
    ids=str,
)
def test_a_cost_that_contradicts_itself_is_no_record(changes: dict[str, Any]) -> None:
    """A mean that its pieces do not have, half a position, random ids with a text: refused when it is read."""
    with pytest.raises(ValidationError):
        samples.record("cpu", **cost(**changes))


def test_one_load_bounds_no_other() -> None:
    """Even where the target asks for one process only."""
    one = {"samples": samples.document("cpu")["samples"][:1], "protocol__num_processes": 1}
    found = line(LOAD, effort=RequiredProtocol(min_processes=1, min_samples=1, min_busy_s=0.0), **one)
    assert (found.verdict, found.num_processes) == ("inconclusive", 1)


def test_the_thirstiest_record_decides() -> None:
    """In either order."""
    energy = {"method": "counter", "num_tokens": 100, "span_s": 10.0, "process_j_per_tok": [0.5] * 5}
    records = [
        samples.record("cuda", energy=energy | {"joules": 50.0}),
        samples.record("cuda", run_id="second", energy=energy | {"joules": 80.0}),
    ]
    for ordered in (records, records[::-1]):
        assert judge_limit(ENERGY, ordered, EFFORT).value == 0.8


def test_only_rows_of_the_bundled_task_are_made_here() -> None:
    """The task's own rows, asked its own way; not rows of a file under its name, nor of a task nobody knows."""
    own = (
        samples.record("cpu")
        .accuracy["math"]
        .model_copy(update={"data_sha256": None, "task_sha256": load_task("math").sha256})
    )
    assert judging.is_made_here("math", own)
    assert not judging.is_made_here("math", own.model_copy(update={"data_sha256": "d" * 64}))
    assert not judging.is_made_here("math", own.model_copy(update={"task_sha256": "e" * 64}))
    assert not judging.is_made_here("mine", own)
