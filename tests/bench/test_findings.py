"""Findings: every disturbance that only the harness can see has a check, and each check has its twin."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from havoc_core.bench.findings import attempt_problems, session_checks
from havoc_core.bench.judge.record import (
    Calls,
    Check,
    Gpu,
    GpuWitness,
    Memory,
    MemorySeries,
    Record,
    Surroundings,
    TelemetryPoint,
    Warmup,
)
from havoc_core.bench.neighbours import Neighbour
from havoc_core.bench.profiles import Profile
from havoc_core.bench.watched_run import Attempt
from tests.bench import sample_records as samples

COUNTED = {"num_periods": 100, "num_throttled_periods": 0, "throttled_ns": 0}
CALM = Surroundings.model_validate(samples.surroundings() | COUNTED, strict=False)
BUSY = Surroundings.model_validate(samples.surroundings(foreign=(0.0, 1e9)), strict=False)
STOPPED = CALM.model_copy(update={"num_periods": 10, "num_throttled_periods": 5, "throttled_ns": 10**9})
OFF_THE_CPU = {
    "prefill": Calls(
        start_ns=tuple(range(0, 10 * 10**8, 10**8)), duration_ns=(10**7,) * 10, cpu_ns=(10**7,) * 6 + (10**6,) * 4
    ),
    "ttft": Calls(),
    "decode": (),
}


@pytest.fixture
def attempt(tiny_record: Record) -> Callable[..., Attempt]:
    """A calm attempt whose samples and surroundings a test changes by name."""

    def make(*, telemetry: tuple[TelemetryPoint, ...] = (), parent: float = 0.001, **samples: Any) -> Attempt:
        calm = {
            "foreign_cpu_share": 0.02,
            "steal_share": 0.0,
            "num_nonfinite_logits": 0,
            "major_page_faults": 0,
            "surroundings": CALM,
            "warmup": Warmup(classification="flat", calls=Calls()),
        }
        return Attempt(
            samples=tiny_record.samples[0].model_copy(update={**calm, **samples}),
            telemetry=telemetry or (TelemetryPoint(t_ns=1, process=0, cpu_clock_mhz=2600.0),),
            decode_joules=None,
            decode_span_s=1.0,
            decode_tokens=5,
            parent_cpu_share=parent,
        )

    return make


@pytest.fixture
def checks(tiny_record: Record, attempt: Callable[..., Attempt]) -> Callable[..., dict[str, Check]]:
    """The checks of one session with one attempt, by id."""

    def make(one: Attempt | None = None, **changes: Any) -> dict[str, Check]:
        usual = {
            "memory": tiny_record.memory,
            "device": tiny_record.device,
            "retry_reasons": (),
            "swap_growth_bytes": 0,
        }
        return {check.id: check for check in session_checks([one or attempt()], **{**usual, **changes})}

    return make


def _calls(*durations_ns: int) -> Calls:
    return Calls(start_ns=tuple(range(0, 10**9 * len(durations_ns), 10**9)), duration_ns=durations_ns)


def test_calm_session_is_ok(checks: Callable[..., dict[str, Check]], attempt: Callable[..., Attempt]) -> None:
    """Nothing disturbed: every check is ok or says that it could not look."""
    settled = Warmup(classification="flat", calls=Calls())
    found = checks(attempt(warmup=settled, prefill=_calls(*[100] * 8).model_copy(update={"cpu_ns": (100,) * 8})))
    assert {check.status for check in found.values()} == {"ok"}
    assert attempt_problems(attempt()) == []


@pytest.mark.parametrize(
    ("changes", "check", "status", "problem"),
    [
        ({"foreign_cpu_share": 0.4}, "cpu_contention", "invalid", "other processes used 40% of the CPU"),
        ({"foreign_cpu_share": None}, "cpu_contention", "unavailable", None),
        ({"steal_share": 0.2}, "cpu_steal", "invalid", "the hypervisor took 20% of the CPU"),
        ({"steal_share": None}, "cpu_steal", "unavailable", None),
        ({"surroundings": None}, "cpu_quota", "unavailable", None),
        ({"surroundings": STOPPED}, "cpu_quota", "invalid", "the CPU quota was used up in 50% of its periods"),
        ({"surroundings": BUSY}, "disturbance", "invalid", "it was disturbed in 100% of its time"),
        (OFF_THE_CPU, "disturbance", "warning", "it was disturbed in 40% of its time"),
        ({"num_nonfinite_logits": 3}, "finite_logits", "invalid", None),
        ({"warmup": Warmup(classification="slowdown", calls=Calls())}, "warmup", "warning", None),
        (
            {"warmup": Warmup(classification="no_steady_state", calls=Calls())},
            "warmup",
            "warning",
            "no two windows of calls agreed, so it did not reach a steady state",
        ),
        ({"major_page_faults": 101}, "paging", "warning", None),
        ({"major_page_faults": 100}, "paging", "ok", None),
        ({"major_page_faults": None}, "paging", "unavailable", None),
        ({"prefill": _calls(*[100] * 4, *[130] * 4)}, "drift", "warning", None),
        ({"prefill": _calls(*[100] * 4, *[105] * 4)}, "drift", "ok", None),
        ({"parent": 0.5}, "parent_asleep", "warning", None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value).replace(" ", "-"),
)
def test_each_disturbance_is_named(
    checks: Callable[..., dict[str, Check]],
    attempt: Callable[..., Attempt],
    changes: dict[str, Any],
    check: str,
    status: str,
    problem: str | None,
) -> None:
    """A disturbance turns its own check, and asks for a repetition where one could help."""
    disturbed = attempt(**changes)
    assert checks(disturbed)[check].status == status
    assert attempt_problems(disturbed) == ([] if problem is None else [problem])


def test_throttling_is_invalid_unless_harmless(
    checks: Callable[..., dict[str, Check]], attempt: Callable[..., Attempt]
) -> None:
    """A thermal reason invalidates; an idle card's does not; a stranger on the GPU asks for a repetition."""
    point = TelemetryPoint(t_ns=1, process=0, throttle_reasons=("sw_thermal_slowdown", "gpu_idle"))
    hot = attempt(telemetry=(point,))
    assert checks(hot)["throttling"].status == "invalid"
    assert attempt_problems(hot) == ["the device throttled (sw_thermal_slowdown)"]
    idle = attempt(telemetry=(point.model_copy(update={"throttle_reasons": ("gpu_idle",)}),))
    assert checks(idle)["throttling"].status == "ok"
    shared = attempt(telemetry=(point.model_copy(update={"throttle_reasons": (), "num_foreign_processes": 1}),))
    assert attempt_problems(shared) == ["another process used the GPU"]


def test_contention_is_invalid_in_every_profile(tiny_record: Record, attempt: Callable[..., Attempt]) -> None:
    """No profile goes on with a busy neighbour as if nothing were: the checks do not even know which one it is."""
    assert "profile" not in inspect.signature(session_checks).parameters
    assert not any("contention" in field.name for field in dataclasses.fields(Profile))


def test_neighbours_are_named(checks: Callable[..., dict[str, Check]], attempt: Callable[..., Attempt]) -> None:
    """Who took the CPU, by name and share of a core, the busiest first."""
    busy = replace(attempt(foreign_cpu_share=0.9), neighbours=(Neighbour("cc1plus", 0.98), Neighbour("rsync", 0.2)))
    words = "cc1plus (98% of a core), rsync (20% of a core)"
    assert checks(busy)["cpu_contention"].detail.endswith(words)
    assert attempt_problems(busy)[0].endswith(words)


def test_swap_and_repetitions(checks: Callable[..., dict[str, Check]], attempt: Callable[..., Attempt]) -> None:
    """Growing swap invalidates, unknown swap is said, repetitions are counted, missing telemetry too."""
    assert checks(swap_growth_bytes=10**9)["swap"].status == "invalid"
    assert checks(swap_growth_bytes=None)["swap"].status == "unavailable"
    repeated = checks(retry_reasons=("process 0: the device throttled (x)", "process 3: another"))["retries"]
    assert (repeated.status, repeated.value) == ("warning", 2.0)
    assert "process 0: the device throttled" in repeated.detail
    assert checks(replace(attempt(), telemetry=()))["telemetry"].status == "unavailable"


def test_device_memory_is_judged(checks: Callable[..., dict[str, Check]], tiny_record: Record) -> None:
    """On a card: unknown memory, methods that disagree, and a full card are each told; agreement is ok."""
    cpu = tiny_record.device
    witness = GpuWitness(name="card", memory_total_bytes=6_000_000_000)
    card = cpu.model_copy(update={"kind": "cuda", "gpu": Gpu(nvml=witness, cuda=None)})

    def status(caveat: str | None = None, **vram: Any) -> str:
        usual = {"process": 0, "method": "nvml_process", "baseline_bytes": 0, "peak_bytes": 10**9}
        series = (MemorySeries(**{**usual, **vram}),) if vram else ()
        memory = Memory(vram=series, vram_reason=None if vram else "nobody told", vram_caveat=caveat)
        return checks(device=card, memory=memory)["vram"].status

    assert status() == "unavailable"
    assert status(cross_check_method="nvml_device_delta", cross_check_bytes=2 * 10**9) == "invalid"
    assert status(peak_bytes=5_900_000_000) == "invalid"
    assert status(cross_check_method="nvml_device_delta", cross_check_bytes=1_010_000_000) == "ok"
    assert status(spilled_bytes=64_000_001) == "invalid"
    assert status(spilled_bytes=64_000_000) == "ok"
    assert status("only the allocator is known", method="ort_arena") == "warning"
    assert "vram" not in checks(device=cpu)
