"""What the verdict's code says of known records is what it said: every limit, rule, bound and figure, a line each.

    python -m tests.bench.test_known_answers        writes known_answers.json (make answers)

So no change of a verdict, of a sentence or of a figure's ninth digit goes unseen: it stands in the difference of
known_answers.json, where somebody reads it. The records lie on, around and across the boundaries; `make mutants` shows
how few operators, constants and branches can change without an answer. Whether an answer is right, other tests say.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from havoc_core import bounds
from havoc_core.bench.judge import gate, limits, metrics, rules
from havoc_core.bench.judge.case import Case
from havoc_core.bench.judge.targets import Limit, RequiredProtocol, load_target
from havoc_core.export.runtime.verification import Verified
from tests.bench import known_bad as known

samples = known.samples

FILE = Path(__file__).with_name("known_answers.json")
DIGITS = 9
"""More depend on the machine's libraries."""
TAIL_RESAMPLES = 0.5
NUM_RESAMPLES = 60  # enough to see a change, and thirty times faster
ROWS_APART: list[dict[str, Any]] = [
    {"num_right": 700},
    {"num_rows": 2000},
    {"rows_sha256": "f" * 64},
    {"rows_sha256": "f" * 64, "split": "search"},
    {"rows_sha256": "f" * 64, "num_rows": 1001},
]
EFFORT = RequiredProtocol(min_processes=5, min_samples=64, min_busy_s=65.0)


PREFILL = Limit(metric="prefill_ms", below=100.0, unit="ms")
MATH = Limit(metric="accuracy/math", above=85.0, unit="%")
STATED: list[dict[str, Any]] = [
    {"rows": 1000},
    {"rows": 999},
    {"seed": 0},
    {"rows_sha256": "0" * 64},
    {"rows_sha256": "f" * 64},
    {"must_be_pinned": True},
    {"must_be_pinned": True, "rows_sha256": "0" * 64},
    {"must_be_pinned": True, "data_sha256": "0" * 64},
]
"""What a limit on accuracy says of its rows."""
KL = Limit(metric="kl_mean", below=0.15, unit="nats")
TOP1 = Limit(metric="top1_share", above=80.0, unit="%")
LOAD = Limit(metric="load_s", below=1.0, unit="s")
ENERGY = Limit(metric="energy_j_per_tok", below=1.0, unit="J/tok")
VRAM = Limit(metric="peak_vram_bytes", below=2.0, unit="GB")
RSS = Limit(metric="peak_rss_bytes", below=2.0, unit="GB")
SPAN = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0}
MORE_ROWS = {"num_right": 901, "num_rows": 1001, "rows_sha256": "f" * 64}
FEW = {"samples": samples.document("cpu")["samples"][:4], "protocol__num_processes": 4}
APART_MS = [80.0, 84.0, 88.0, 92.0, 96.0]
NEXT_MS = bounds.next_bound(APART_MS, scatter=APART_MS, confidence=0.95)  # a limit that the next process just misses
BUSY = {"busy_ns": 65_000_000_000}
Probe = tuple[Limit, dict[str, Any]]


def unsettled(kind: str) -> dict[str, Any]:
    return {"samples__2__warmup__classification": kind}


def latency_probes() -> list[Probe]:
    """Return calls on, around and across the limit, few and many, in processes alike and apart."""
    sets = [
        [[100.0] * 20] * 5,
        [[99.999999] * 20] * 5,
        [[50.0] * 19 + [150.0]] * 2 + [[50.0] * 18 + [150.0] * 2] * 3,
        [[50.0] * 100] * 7 + [[50.0] * 85 + [150.0] * 15],
        [[50.0] * 15] + [[50.0] * 12] * 4,
        [[50.0] * 13] * 4 + [[50.0] * 12],
        [[50.0] * 13] * 4 + [[50.0] * 11 + [100.0]],
        [[50.0] * 19 + [100.0]] * 5,
        [[50.0] * 40] * 4,
        [[150.0] * 30],
        [[150.0]],
        [[50.0] * 89 + [100.0] * 11] + [[50.0] * 100] * 9,
        [[50.0] * 90 + [100.0] * 10] + [[50.0] * 100] * 9,
        [[level] * 40 for level in APART_MS],
        [[level] * 40 for level in (80.0, 82.0, 84.0, 86.0, 88.0)],
        [[level] * 18 + [100.0] * 2 for level in APART_MS],
        [[level - 30.0] * 18 + [110.0] * 2 for level in APART_MS],
        [[99.0] * 40, *[[150.0] * 40] * 4],
        [[100.0] * 40, *[[150.0] * 40] * 4],
    ]
    narrow = [Limit(metric="prefill_ms", below=ms, unit="ms") for ms in (39, 41)]
    return [
        (PREFILL, {}),
        *((PREFILL, samples.prefills(*times, **BUSY)) for times in sets),
        *((limit, unsettled(kind)) for limit in narrow for kind in ("slowdown", "no_steady_state", "warmup")),
        (PREFILL, samples.prefills(*[[50.0] * 20] * 5, **BUSY) | unsettled("slowdown")),
        (PREFILL, samples.prefills(*[[40.0] * 40] * 4 + [[55.0] * 40], **BUSY) | unsettled("slowdown")),
        (
            Limit(metric="prefill_ms", below=NEXT_MS, unit="ms"),
            samples.prefills(*[[level] * 40 for level in APART_MS], **BUSY),
        ),
        (PREFILL, samples.prefills(*[[150.0] * 40] * 4 + [[250.0] * 40], **BUSY) | unsettled("slowdown")),
        (PREFILL, {"samples__each__prefill": {"start_ns": [], "duration_ns": []}}),
        (PREFILL, {"samples__0__busy_ns": 12_999_999_999}),
        (PREFILL, {"samples": []}),
        (Limit(metric="prefill_ms", below=100.0, unit="ms", percentile=0.5), samples.prefills(*sets[2], **BUSY)),
        (Limit(metric="prefill_ms", below=100.0, unit="ms", confidence=0.99), samples.prefills(*sets[2], **BUSY)),
        (Limit(metric="prefill_ms", below=102.0, unit="ms", confidence=0.9), samples.prefills(*sets[13], **BUSY)),
    ]


def slowest_rate() -> float:
    """Return the rate of the slowest process of the good record."""
    processes = samples.record("cpu").samples
    return min(sum(127.0 for _ in p.decode) / sum(sum(run.step_ns) / 1e9 for run in p.decode) for p in processes)


def throughput_probes() -> list[Probe]:
    """Return rates on both sides of the limit, a slow process, a process that may get slower, too little of all."""
    at = {rate: Limit(metric="decode_tok_per_s", above=rate, unit="tok/s") for rate in (50, 240, 260, 400, 490, 510)}
    return [
        *((at[rate], {}) for rate in (50, 490, 510)),
        *((at[rate], unsettled("slowdown")) for rate in (240, 260)),
        (at[400], {"samples__0__decode__each__step_ns": [2_600_000] * 127}),
        (at[50], {"samples__0__decode__each__step_ns": [20_000_000] * 127}),
        (at[50], {"samples__0__decode": [], "samples__1__decode": []}),
        (at[50], {"samples__each__decode": []}),
        (at[50], {"samples": []}),
        *(
            (Limit(metric="decode_tok_per_s", above=50, unit="tok/s", confidence=share), {})
            for share in (0.9, 0.99, 0.999999)
        ),
        (at[50], FEW),
        (at[50], {"samples__0__busy_ns": 12_999_999_999}),
        (at[50], {"samples__0__decode__0__step_ns": []}),
        (Limit(metric="decode_tok_per_s", above=slowest_rate(), unit="tok/s"), {}),
    ]


def memory_probes() -> list[Probe]:
    """Return peaks on, around and within the margin of the limit, by methods with and without gaps, or none."""
    sizes = (400_000_001, 400_000_002, 412_000_001, 412_000_002)
    exact = {"memory__rss__each__method": "nvml_accounting"}
    return [
        *((limit, {}) for limit in (VRAM, RSS)),
        *((Limit(metric="peak_rss_bytes", below=size, unit="bytes"), {}) for size in sizes),
        (Limit(metric="peak_rss_bytes", below=400_000_002, unit="bytes"), exact),
        (RSS, {"memory__rss__1__method": "allocator"}),
        (RSS, {"memory": {"rss_reason": "why"}}),
        (RSS, {"memory": {}}),
        (VRAM, {"memory": {"vram_reason": "no card"}}),
    ]


COSTS: list[Any] = [
    samples.COST,
    None,
    samples.COST | {"text": "random ids", "text_sha256": None},
    samples.COST | {"kl_mean": 0.15, "kl_chunks": [0.15]},
    samples.COST | {"kl_mean": 0.15, "kl_chunks": [0.14, 0.16]},
    *(
        samples.COST | {"kl_mean": mean, "kl_chunks": [mean - 0.01, mean + 0.01] * 2}
        for mean in (0.13, 0.14, 0.16, 0.17)
    ),
    *(samples.COST | {"top1_share": num_same / 768} for num_same in (0, 594, 596, 632, 634, 768)),
]


def other_probes() -> list[Probe]:
    """Return right answers, loads and energies around their limits."""
    return [
        *((limit, {}) for limit in (MATH, LOAD, ENERGY)),
        *((MATH, {"accuracy__math__num_right": right}) for right in (830, 831, 868, 869)),
        *((MATH, {"accuracy__math__num_right": right, "accuracy__math__num_rows": 100}) for right in (84, 85)),
        *((MATH.model_copy(update=stated), {}) for stated in STATED),
        (MATH, {"accuracy__math__split": "search"}),
        (MATH, {"accuracy": {}}),
        *((limit, {"subject__format_cost": cost}) for limit in (KL, TOP1) for cost in COSTS),
        *((LOAD, {"samples__3__load_ns": ns}) for ns in (999_999_999, 1_000_000_000)),
        (LOAD, FEW),
        (LOAD, {"samples": []}),
        *((ENERGY, {"energy": SPAN | more}) for more in ({}, {"span_s": 9.9}, {"joules": 100.0}, {"joules": 99.9})),
    ]


def joined_probes() -> list[tuple[Limit, list[Any]]]:
    """Return limits with two records each, whose rows, peaks and spans join; and a card's record."""

    def second(**changes: Any) -> Any:
        return samples.second(**changes)

    spans = [
        samples.record("cpu", energy=SPAN),
        second(energy=SPAN | {"span_s": 9.9}),
        second(energy=SPAN | {"joules": 120.0}),
    ]
    return [
        (MATH, [samples.record("cpu"), second(accuracy__math=samples.accuracy(0) | MORE_ROWS)]),
        (MATH, [samples.record("cpu"), second()]),
        *(
            (limit, [samples.record("cpu"), second(subject__format_cost=cost)])
            for limit in (KL, TOP1)
            for cost in (None, samples.COST | {"kl_mean": 0.5, "kl_chunks": [0.4, 0.6], "top1_share": 0.5})
        ),
        (MATH, [samples.record("cpu"), second(accuracy__math__split="train")]),
        (VRAM, [samples.record("cuda")]),
        (RSS, [samples.record("cuda")]),
        *((ENERGY, [spans[0], other]) for other in spans[1:]),
    ]


def surrounded(where: str = "each", **spans: tuple[float, float]) -> dict[str, Any]:
    return {f"samples__{where}__surroundings": samples.surroundings(**spans)}


def disturbed_probes() -> list[Probe]:
    """Return calls, steps, loads and energies beside other work, on both sides of limits."""
    below = [Limit(metric="prefill_ms", below=ms, unit="ms") for ms in (9.0, 10.0, 11.0, 19.0, 30.0)]
    first = [Limit(metric="ttft_ms", below=ms, unit="ms") for ms in (600.0, 700.0)]
    rates = [Limit(metric="decode_tok_per_s", above=rate, unit="tok/s") for rate in (490, 510, 999, 1001)]
    loads = [Limit(metric="load_s", below=s, unit="s") for s in (0.1, 1.0)]
    moments = [(0.0, 0.6), (0.2, 0.3), (0.5, 0.6), (13.7, 14.0), (13.7, 13.8), (13.7, 15.0), (0.0, 0.1)]
    eleven = samples.prefills(*[[50.0] * 11] * 7, **BUSY)
    spans = [SPAN | {"process_j_per_tok": each} for each in ([], [0.5], [0.5, 0.6], [0.4, 0.5, 0.6, 0.5, 0.5])]
    exact = Limit(metric="prefill_ms", below=10.0, unit="ms", confidence=1 - 0.5**5)
    slow_run = {"samples__0__decode__0__step_ns": [4_000_000] * 127, "samples__each__busy_ns": 65_000_000_000}
    return [
        *((limit, surrounded(foreign=moment)) for limit in (*below, *rates, *loads) for moment in moments),
        *((limit, surrounded("0", foreign=moment)) for limit in (*below, *rates, *loads) for moment in moments),
        *((limit, {}) for limit in first),
        *((limit, unsettled("slowdown")) for limit in (*below, *rates)),
        *((limit, slow_run | surrounded("0", foreign=(13.7, 14.3))) for limit in rates),
        (PREFILL, eleven | surrounded("0", foreign=(0.51, 0.6))),
        (exact, {}),
        *((ENERGY, {"energy": span}) for span in spans),
        *((ENERGY, {"energy": spans[3] | {"joules": joules}}) for joules in (2.0, 90.0, 300.0)),
        *((ENERGY, {"energy": spans[3]} | surrounded("0", foreign=moment)) for moment in moments),
    ]


def few_probes() -> list[Probe]:
    """Return one process and two, for which little effort is asked."""
    limits = [
        PREFILL,
        LOAD,
        *(Limit(metric="prefill_ms", below=ms, unit="ms") for ms in (10.0, 30.0)),
        *(Limit(metric="decode_tok_per_s", above=rate, unit="tok/s") for rate in (50, 510)),
    ]
    few = [
        {"samples": samples.document("cpu")["samples"][:number], "protocol__num_processes": number} for number in (1, 2)
    ]
    runs = few[0]["samples"][0]["decode"]
    many = [run | {"start_ns": 13_700_000_000 + 300_000_000 * place} for place, run in enumerate(runs * 4)]
    few.append({"samples": [few[0]["samples"][0] | {"decode": many}], "protocol__num_processes": 1})
    alone = [{"memory": {"rss": [samples.memory_series(0) | {"method": "vm_hwm"}]}}]
    sizes = [Limit(metric="peak_rss_bytes", below=size, unit="bytes") for size in (412_000_000, 412_000_001)]
    return [*itertools.product(limits, few), *itertools.product(sizes, alone)]


LITTLE = RequiredProtocol(min_processes=1, min_samples=1, min_busy_s=0.0)
SINGLE = [*latency_probes(), *throughput_probes(), *memory_probes(), *other_probes(), *disturbed_probes()]
PROBES = [(limit, [samples.record("cpu", **change)]) for limit, change in SINGLE] + joined_probes()

FEW_PROBES = [(limit, [samples.record("cpu", **change)]) for limit, change in few_probes()]


def answers_of_limits() -> Iterator[str]:
    """Judge every limit over its records, and decide evidence on, below and above a limit."""
    for limit, records in PROBES:
        yield told(limits.judge_limit(limit, records, EFFORT))
    for limit, records in FEW_PROBES:
        yield told(limits.judge_limit(limit, records, LITTLE))
    below, above = PROBES[0][0], Limit(metric="decode_tok_per_s", above=100.0, unit="tok/s")
    for limit, low, high in itertools.product((below, above), (None, 99.0, 100.0, 101.0), (None, 99.0, 100.0, 101.0)):
        for lacking in ("", "too little"):
            verdict, reason = limits.decide(limit, limits.Evidence(100.0, low, high, 5, 5, lacking, 7))
            yield f"{limit.sign}100 of {low} to {high}: {verdict}: {reason}"


def told(line: limits.Line) -> str:
    """Return a line without what is as nothing was measured."""
    parts = (
        f"{field.name}={value}"
        for field in fields(line)
        if (value := getattr(line, field.name)) != field.default and field.name not in {"verdict", "reason"}
    )
    return f"{line.verdict}: {line.reason}; {' '.join(parts)}"


CASES = [
    *[(rule, known.case_of(kind, changes)) for rule, cases in known.BAD.items() for kind, changes in cases],
    *[("", known.case_of("cuda", changes)) for changes in known.ODD],
    *[("", known.case_of(kind, {})) for kind in ("cpu", "cuda")],
]


def cases_at_edges() -> Iterator[Any]:
    """Good records just as old and as new as a target allows, and some that are older; verified with their base."""
    strict = load_target("host").model_copy(update={"max_age_days": 7.0, "requires_verification": True})
    times = [known.NOW + timedelta(days=days) for days in (1, -7, -7.5, -9.05)]
    for created in (datetime(2025, 1, 1, tzinfo=UTC), *times):
        record = samples.record("cpu", created_utc=f"{created:%Y-%m-%dT%H:%M:%SZ}")
        verified = Verified(manifest_sha256=record.subject.manifest_sha256, is_folded=True, is_rebuilt=True)
        for target in (strict, load_target("host")):
            yield Case(record=record, target=target, now=known.NOW, this_cpu=samples.THIS_CPU, verified=verified)


EDGES = list(cases_at_edges())


def answers_of_rules() -> Iterator[str]:
    """Ask every rule of every record: as it is, without what the gate knows, and of targets that ask for less."""
    yield from (f"{rule.id} {rule.exit_code} {rule.blocks}: {rule.sentence}" for rule in rules.RULES)
    yield from (broken(case) for case in EDGES)
    for _, case in CASES:
        cpu = {"is_this_machine": False, "names": (samples.CPU["name"],), "features": ("avx2",)}
        plain = case.target.model_copy(update={"device": case.target.device.model_copy(update=cpu)})
        bare = case.target.model_copy(update={"roofline": None})
        others = [Case(record=case.record, target=target) for target in (case.target, plain, bare)]
        problem = rules.device_problem(case.record.device, case.target, this_cpu=samples.THIS_CPU)
        said = [*map(broken, (case, *others)), str(problem)]
        yield " | ".join(["=" if text == said[place - 1] else text for place, text in enumerate(said)])


def broken(case: Case) -> str:
    """Return the rules that do not hold, each with its reason."""
    return ", ".join(f"{rule.id} {reason}" for rule in rules.RULES if (reason := rule.check(case)) is not None)


def answers_of_gate() -> Iterator[str]:
    """Judge records alone and together: the verdict, what each limit is, and what is measured beside them."""
    good = samples.record("cpu")
    groups = [
        [good],
        [good, samples.second()],
        [good, good],
        [good, samples.record("cpu", run_id="b")],
        [good, samples.record("cpu", created_utc="2026-11-22T07:00:00Z")],
        [good, samples.second(device__fingerprint="9" * 64)],
        [good, samples.second(workload__seed=3)],
        [good, samples.second(purpose="screen")],
        [good, samples.second(evidence="projected")],
        [good, samples.second(evidence="simulated")],
        *([good, samples.second(accuracy__math=samples.accuracy(0) | other)] for other in ROWS_APART),
        [samples.record("cpu", **surrounded(foreign=(0.0, 0.6)))],
        [samples.record("cpu", accuracy={})],
        [samples.record("cpu", accuracy__math__num_right=850)],
        [samples.record("cpu", accuracy__math__num_right=700)],
        [samples.record("cpu", accuracy__math__num_right=700, accuracy__code__num_right=850)],
    ]
    target = load_target("host")
    quick = target.model_copy(
        update={"limits": tuple(limit for limit in target.limits if "decode" not in limit.metric)}
    )
    files = {"artifact_files": known.GOOD_FILES}
    asked: dict[str, Any] = {"this_cpu": samples.THIS_CPU, "now": known.NOW}
    for wanted, more in itertools.product((target, quick, load_target("gtx1660")), (files, {})):
        yield from (judged(gate.judge(group, wanted, **asked, **more)) for group in groups)
    for _, case in CASES:
        known_of = {"artifact_files": case.artifact_files, "this_cpu": case.this_cpu, "verified": case.verified}
        yield judged(gate.judge([case.record], case.target, now=case.now, **known_of))
        yield str(gate.why_invalid(case.record))


def judged(found: gate.Judgement) -> str:
    """Return a judgement without what `answers_of_limits` and `answers_of_rules` tell."""
    said = [f"{found.verdict} {found.exit_code} {found.evidence} {'+'.join(found.run_ids)}"]
    said += [found.reason] if not found.findings else []
    verdicts = {line.verdict for line in found.lines}
    said += [f"all {verdict}" for verdict in verdicts if len(verdicts) == 1]
    said += [f"{line.metric} {line.verdict}" for line in found.lines if len(verdicts) > 1]
    said += [
        f"{finding.rule} {finding.exit_code} {finding.blocks} {finding.run_id}: {finding.reason}"
        for finding in found.findings
    ]
    said += [f"{figure.title} {figure.statistic} {figure.value} {figure.unit}" for figure in found.unlimited]
    return ", ".join(said)


def answers_of_bounds() -> Iterator[str]:
    """Ask every bound for a grid of values."""
    yield from map(repr, itertools.chain(binomials(), ranks(), quantiles(), shares(), scatters(), rates(), means()))


def binomials() -> Iterator[Any]:
    for count, num_trials, chance in itertools.product((-1, 0, 1, 7, 10, 89, 100), (1, 10, 100, 1000), (0.1, 0.5, 0.9)):
        yield bounds.binomial_cdf(count, num_trials=num_trials, probability=chance)


def ranks() -> Iterator[Any]:
    for num_samples, quantile in itertools.product((1, 2, 13, 22, 28, 29, 100, 5000), (0.01, 0.1, 0.5, 0.9)):
        yield bounds.upper_rank(num_samples, quantile=quantile, confidence=0.95)
    for count in (2, 3):  # a confidence that is reached exactly
        exact = bounds.binomial_cdf(count, num_trials=4, probability=0.5)
        yield bounds.upper_rank(4, quantile=0.5, confidence=exact)


def quantiles() -> Iterator[Any]:
    for num_samples, quantile in itertools.product((1, 2, 29, 30, 101), (0.5, 0.9)):
        values = [float(value * value % 103) for value in range(num_samples)]
        yield bounds.quantile_bounds(values, quantile=quantile, confidence=0.95)


def shares() -> Iterator[Any]:
    for num_right, num_rows in ((0, 10), (1, 10), (5, 10), (9, 10), (10, 10), (869, 1000), (868, 1000)):
        found = bounds.share_bounds(num_right, num_rows, confidence=0.95)
        yield found
        yield bounds.proves_share(num_right, num_rows, share=0.85, confidence=0.95)
        yield bounds.num_right_needed(num_rows, share=0.85, confidence=0.95)
    exact = bounds.binomial_cdf(2, num_trials=4, probability=0.5)
    yield bounds.proves_share(3, 4, share=0.5, confidence=exact)
    yield bounds.num_samples_needed(1.0, quantile=0.04, confidence=0.95)
    for share, quantile in itertools.product((0.85, 0.86, 0.9, 0.9001, 0.95, 1.0), (0.85, 0.9, 0.5)):
        yield bounds.num_samples_needed(share, quantile=quantile, confidence=0.95)


def scatters() -> Iterator[Any]:
    yield from (bounds.student_t(degrees, confidence=0.95) for degrees in range(12))
    yield from (bounds.expanded_level(number, confidence=0.9) for number in (1, 2, 5))
    yield from (
        bounds.next_bound(values, scatter=values[::-1], confidence=0.95)
        for values in ([3.0], [1.0, 4.0], [1.0, 4.0, 9.0])
    )


def rates() -> Iterator[Any]:
    runs = [[(127.0, 1 + 0.1 * (7 * run * (index + 2) % 11)) for run in range(4 + index)] for index in range(5)]
    long = [(1.0, 1 + 0.01 * (7 * run % 11)) for run in range(131)]
    with pytest.MonkeyPatch.context() as patch:
        for processes in (runs, runs[:1], [runs[0][:1]], [long], [long, runs[0][:2]]):
            for confidence in (0.9, 0.95, 0.99):
                yield bounds.rate_bounds(processes, confidence=confidence)
        for edge in (1.0, 1.0 + 1e-9):
            beyond = (1.0 - bounds.expanded_level(5, confidence=0.95)) * NUM_RESAMPLES * edge
            patch.setattr(bounds, "TAIL_RESAMPLES", beyond)
            yield bounds.rate_bounds(runs, confidence=0.95)


def means() -> Iterator[Any]:
    for values in ([3.0], [1.0, 4.0], [1.0, 4.0, 9.0, 2.0]):
        yield bounds.mean_bounds(values, confidence=0.95)


def answers_of_metrics() -> Iterator[str]:
    """Read every figure of records of either device, and ask every metric what it says of itself."""
    bare = samples.record("cpu", samples=[], accuracy={}, subject__format_cost=None)
    drawn = samples.record("cpu", subject__format_cost__text="random ids", subject__format_cost__text_sha256=None)
    for record in (samples.record("cpu"), samples.record("cuda"), bare, drawn):
        yield str(list(metrics.measured(record).items()))
        for name in (*metrics.METRICS, "accuracy/math", "accuracy/history"):
            metric = metrics.metric_of(name)
            yield f"{name}: {metric.read(record)}, trend {metric.trend and metric.trend.read(record)}"
    for name in (*metrics.METRICS, "accuracy/math"):
        metric = metrics.metric_of(name)
        said = f"{metric.label}, {metric.kind}, {metric.unit}, {metric.lowest} to {metric.highest}"
        yield f"{metric.title}: {said}, {'lower' if metric.is_lower_better else 'higher'} is better"
    for name in ("speed", "accuracy/", "accuracy/No", "speed/math"):
        with pytest.raises(ValueError, match="unknown metric") as caught:
            metrics.metric_of(name)
        yield str(caught.value)


ANSWERS: dict[str, Callable[[], Iterator[str]]] = {
    "limits": answers_of_limits,
    "rules": answers_of_rules,
    "gate": answers_of_gate,
    "bounds": answers_of_bounds,
    "metrics": answers_of_metrics,
}
_NUMBER = re.compile(r"\b\d+\.\d+(e[+-]?\d+)?|\b\d+e[+-]\d+")


def answers(kind: str) -> Iterator[str]:
    """Give the answers of one kind, with `DIGITS` digits of each number."""
    with few_resamples():
        for text in ANSWERS[kind]():
            yield _NUMBER.sub(lambda found: f"{round(float(found[0]), 12):.{DIGITS}g}", text)


@contextlib.contextmanager
def few_resamples() -> Iterator[pytest.MonkeyPatch]:
    """Draw so few resamples that every kind takes about a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "NUM_RESAMPLES", NUM_RESAMPLES)
        patch.setattr(bounds, "TAIL_RESAMPLES", TAIL_RESAMPLES)
        yield patch


@pytest.mark.parametrize("kind", ANSWERS)
def test_every_answer_is_the_known_one(kind: str) -> None:
    """A change that is meant is written with `make answers`, and read in the difference of the file."""
    with contextlib.closing(answers(kind)) as said:
        for place, (now, before) in enumerate(itertools.zip_longest(said, json.loads(FILE.read_text())[kind])):
            assert now == before, f"answer {place} of {kind}"


def test_no_kind_is_left_over() -> None:
    """What the file holds is asked."""
    assert json.loads(FILE.read_text()).keys() == ANSWERS.keys()


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind: list(answers(kind)) for kind in ANSWERS}, indent=0, ensure_ascii=False) + "\n")
