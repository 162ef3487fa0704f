"""Records for the gate's tests: one good record of a CPU, one of a GTX 1660, and a way to change one value of a copy.

Loaded with `runpy`, because tests are no package.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.judge.gate import hash_artifact
from havoc_core.bench.judge.record import Cpu, Record

DOMAINS = ("math", "code", "reasoning", "vision")
NUM_PROCESSES = 5
CPU = {
    "name": "Example 9000 8-Core Processor",
    "vendor": "AuthenticExample",
    "architecture": "x86_64",
    "family": "25/33",
    "features": ["avx2", "fma"],
    "num_logical_cores": 8,
    "num_usable_cores": 8,
}
THIS_CPU = Cpu.model_validate(CPU, strict=False)
WITNESS = {
    "name": "NVIDIA GeForce GTX 1660",
    "uuid_sha256": "1" * 64,
    "compute_capability": "7.5",
    "memory_total_bytes": 6_442_450_944,
    "library_sha256": "2" * 64,
}
GPU = {
    "nvml": WITNESS,
    "cuda": {**WITNESS, "num_sms": 22, "memory_total_bytes": 6_225_002_496, "library_sha256": "3" * 64},
    "pci_device_id": "0x2184",
    "bus_width_bits": 192,
    "driver_version": "580.95.05",
    "driver_model": None,
}


COST = {
    "kl_mean": 0.02,
    "kl_p99": 0.11,
    "kl_chunks": [0.018, 0.021, 0.019, 0.022, 0.02, 0.02, 0.018, 0.022, 0.019, 0.021, 0.02, 0.02],
    "top1_share": 0.9375,
    "perplexity_ratio": 1.004,
    "num_positions": 768,
    "text": "bundled text",
    "text_sha256": "7" * 64,
}


def document(kind: str = "cpu") -> dict[str, Any]:
    """Return a good record as JSON values, unsealed, of a `cpu` or a `cuda` device."""
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[kind]
    memory = "rss" if kind == "cpu" else "vram"
    return {
        "schema_version": 1,
        "run_id": f"good-{kind}",
        "created_utc": "2026-11-22T06:15:00Z",
        "tool": {"version": "0.1.0"},
        "evidence": "measured",
        "purpose": "confirm",
        "subject": {
            "name": "sample",
            "files": {"model.onnx": "a" * 64, "model.onnx.data": "b" * 64},
            "manifest_sha256": "c" * 64,
            "is_graph_rebuilt": True,
            "graph_sha256": "a" * 64,
            "num_parameters": 20_000_000,
            "weight_bytes": 80_000_000,
            "weight_format": "fp32",
            "activation_dtype": "fp32",
            "alpha": {"math": 1.2, "code": 0.8, "reasoning": 1.5, "vision": 0.9},
            "rule": "delta",
            "format_cost": copy.deepcopy(COST),
        },
        "workload": {},
        "device": device(kind),
        "host": {
            "os": "Linux",
            "kernel": "6.1.0",
            "ram_bytes": 16_000_000_000,
            "swap_bytes": 0,
            "versions": {"onnxruntime-gpu": "1.31.1", "python": "3.11.7"},
        },
        "protocol": {
            "profile": "standard",
            "provider": provider,
            "num_processes": NUM_PROCESSES,
            "num_threads": 8,
            "min_busy_s": 12.0,
            "warmup_tolerance": 0.02,
        },
        "samples": [process(index, provider) for index in range(NUM_PROCESSES)],
        "memory": {memory: [memory_series(index) for index in range(2)]},
        "checks": [{"id": "throttling", "status": "ok", "detail": "no throttling was reported"}],
        "telemetry": [point(index, kind) for index in range(20)],
        "accuracy": {domain: accuracy(index) for index, domain in enumerate(DOMAINS)},
        "provenance": {"protocol_sha256": "d" * 64},
    }


def device(kind: str) -> dict[str, Any]:
    """Return the identity of the sample CPU or of a genuine GTX 1660."""
    found: dict[str, Any] = {"kind": kind, "name": CPU["name"], "cpu": copy.deepcopy(CPU), "fingerprint": "c" * 64}
    if kind == "cuda":
        found |= {"name": GPU["nvml"]["name"], "gpu": copy.deepcopy(GPU), "fingerprint": "e" * 64}
    return found


def process(index: int, provider: str) -> dict[str, Any]:
    """Return one process: 20 prefills of about 20 ms, 20 first tokens of 0.65 s, 3 decode runs of 2 ms a token."""
    durations = [20_000_000 + 10_000 * ((7 * call + index) % 13) for call in range(20)]
    starts = [100_000_000 + 21_000_000 * call for call in range(20)]
    firsts = [650_000_000 + 10_000 * ((5 * call + index) % 13) for call in range(20)]
    first_starts = [600_000_000 + 651_000_000 * call for call in range(20)]
    runs = [
        {
            "start_ns": 13_700_000_000 + 300_000_000 * place,
            "prefill_ns": 20_000_000,
            "step_ns": [2_000_000 + 1_000 * (step % 7) + 3 * index + place for step in range(127)],
            "num_tokens": 128,
        }
        for place in range(3)
    ]
    return {
        "process": index,
        "load_ns": 150_000_000,
        "cold_ns": 30_000_000,
        "warmup": {"classification": "flat", "calls": {}},
        "prefill": {"start_ns": starts, "duration_ns": durations},
        "ttft": {"start_ns": first_starts, "duration_ns": firsts},
        "decode": runs,
        "nodes_by_provider": {provider: 120},
        "num_distinct_outputs": 20,
        "busy_ns": 13_000_000_000,
    }


def prefills(*per_process: list[float], **of_each: Any) -> dict[str, Any]:
    """Return changes that give each process these prefill times in ms, and further fields."""
    processes = []
    for index, times_ms in enumerate(per_process):
        durations = [round(1e6 * ms) for ms in times_ms]
        starts = [sum(durations[:place]) for place in range(len(durations))]
        calls = {"start_ns": starts, "duration_ns": durations}
        processes.append(process(index, "CPUExecutionProvider") | {"prefill": calls} | of_each)
    return {"samples": processes, "protocol__num_processes": max(len(per_process), 1)}


def surroundings(
    *,
    foreign: tuple[float, float] = (0.0, 0.0),
    waited: tuple[float, float] = (0.0, 0.0),
    stolen: tuple[float, float] = (0.0, 0.0),
    num_cpus: int = 8,
    share: float = 0.5,
) -> dict[str, Any]:
    """Return readings every 0.1 s of the 20 s of a process: what took `share` of the CPU from one second to another."""
    times = [100_000_000 * place for place in range(200)]
    own_ns = [num_cpus * t_ns for t_ns in times]

    def taken(span_s: tuple[float, float], capacity: int) -> list[int]:
        return [round(share * capacity * max(min(t_ns, span_s[1] * 1e9) - span_s[0] * 1e9, 0.0)) for t_ns in times]

    return {
        "num_cpus": num_cpus,
        "t_ns": times,
        "busy_ns": [own + other for own, other in zip(own_ns, taken(foreign, num_cpus), strict=True)],
        "own_ns": own_ns,
        "stolen_ns": taken(stolen, num_cpus),
        "waited_ns": taken(waited, 1),
    }


def busy_ns(measured: dict[str, Any]) -> int:
    """Return the time of all timed calls of a process."""
    runs = sum(run["prefill_ns"] + sum(run["step_ns"]) for run in measured["decode"])
    return sum(measured["prefill"]["duration_ns"]) + sum(measured["ttft"]["duration_ns"]) + runs


def memory_series(index: int) -> dict[str, Any]:
    """Return one memory process that peaked at about 400 MB."""
    return {
        "process": index,
        "method": "sampled",
        "interval_ms": 5.0,
        "baseline_bytes": 50_000_000,
        "peak_bytes": 400_000_000 + index,
        "time_ns": [0, 5_000_000, 10_000_000],
        "reading_bytes": [50_000_000, 300_000_000, 400_000_000 + index],
        "phase_start_ns": {"load": 0, "first_run": 5_000_000, "steady": 10_000_000},
    }


def point(index: int, kind: str) -> dict[str, Any]:
    """Return one reading of a device that runs steadily."""
    reading: dict[str, Any] = {"t_ns": 100_000_000 * index, "process": 0, "temperature_c": 60.0 + 0.1 * index}
    if kind == "cuda":
        return reading | {"sm_clock_mhz": 1785, "throttle_reasons": [], "num_foreign_processes": 0}
    return reading | {"cpu_clock_mhz": 3400.0}


def accuracy(index: int) -> dict[str, Any]:
    """Return 900 right of 1000 rows, which proves more than 85 %."""
    return {
        "num_right": 900,
        "num_rows": 1000,
        "split": "gate",
        "rows_sha256": str(index) * 64,
        "source": "built-in",
        "task_sha256": load_task(DOMAINS[index]).sha256,
    }


def made_from(artifact: Path) -> dict[str, Any]:
    """Return the changes that make a record one of this artifact."""
    files = hash_artifact(artifact)
    return {"subject__manifest_sha256": files.pop("manifest.json"), "subject__files": files}


def record(kind: str = "cpu", **changes: Any) -> Record:
    """Return a sealed record; `changes` map paths such as `samples__0__busy_ns` to new values."""
    values = changed(document(kind), **changes)
    if "subject__files" in changes and "subject__graph_sha256" not in changes:
        values["subject"]["graph_sha256"] = values["subject"]["files"].get("model.onnx", "a" * 64)
    if "device__cpu" in changes and "device__name" not in changes:
        values["device"]["name"] = values["device"]["cpu"]["name"]
    return sealed(values)


def second(*, run_id: str = "b", **changes: Any) -> Record:
    """Return a sealed record of the CPU from another session, every call a few nanoseconds longer."""
    values = document("cpu")
    for measured in values["samples"]:
        for part in (measured["prefill"], measured["ttft"]):
            part["duration_ns"] = [duration + 1 for duration in part["duration_ns"]]
        for run in measured["decode"]:
            run["step_ns"] = [step + 100 for step in run["step_ns"]]
    return sealed(changed(values, run_id=run_id, **changes))


def sealed(values: dict[str, Any]) -> Record:
    """Validate JSON values and seal them."""
    return Record.model_validate(values, strict=False).sealed()


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy in which each path has its new value; `each` in a path stands for all items of a list.

    Times set with `each` then differ by nanoseconds, as those of no two processes are equal.
    """
    result = copy.deepcopy(values)
    for path, value in changes.items():
        _set(result, path.split("__"), value)
    return result


def _apart(value: Any, num_ns: int) -> Any:
    """Make times that many nanoseconds longer: no two processes ever take the same."""
    return [item + num_ns for item in value] if isinstance(value, list) and value and type(value[0]) is int else value


def _set(node: Any, keys: list[str], value: Any) -> None:
    key, *rest = keys
    if key == "each":
        for place, item in enumerate(node):
            _set(item, rest, _apart(value, 10 * place + 1 if "each" in rest else place))
        return
    place: Any = int(key) if isinstance(node, list) else key
    if rest:
        _set(node[place], rest, value)
    else:
        node[place] = copy.deepcopy(value)
