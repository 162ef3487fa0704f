"""Known-bad records, each the good one with a single fault, under the rule that must find it; and odd but right ones.

Loaded with `runpy`, because tests are no package.
"""

from __future__ import annotations

import runpy
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from havoc_core.bench.judge.case import Case
from havoc_core.bench.judge.targets import Target, load_target
from havoc_core.export.runtime.verification import Verified

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))

NOW = datetime(2026, 11, 23, tzinfo=UTC)
GOOD_FILES = {"manifest.json": "c" * 64, "model.onnx": "a" * 64, "model.onnx.data": "b" * 64}
SUPER = "NVIDIA GeForce GTX 1660 SUPER"
TWO_CALLS = {"start_ns": [0, 20_000_000], "duration_ns": [20_000_000, 20_000_000]}
FAULT = {"id": "pid", "status": "invalid", "detail": "memory of another process was read"}

FIRST = samples.process(0, "CPUExecutionProvider")
EIGHT_CALLS = {
    "start_ns": [21_000_000 * call for call in range(8)],
    "duration_ns": [20_000_000 + call for call in range(8)],
}
SEVEN_CALLS = {name: values[:7] for name, values in EIGHT_CALLS.items()}
BUSY_NS = samples.busy_ns(samples.process(2, "CPUExecutionProvider"))
ALL_THE_TIME = (0.0, 1e9)
THROTTLED = {"num_periods": 100, "num_throttled_periods": 2, "throttled_ns": 1_000_000}
SPAN = {"method": "counter", "joules": 50.0, "num_tokens": 100, "span_s": 10.0}

# what was verified, by the kind of the case; the target of all but the last one asks for it
VERIFIED = {
    "verified": Verified(GOOD_FILES["manifest.json"], is_folded=True, is_rebuilt=True),
    "unfolded": Verified(GOOD_FILES["manifest.json"], is_folded=False, is_rebuilt=True),
    "verified elsewhere": Verified("d" * 64, is_folded=True, is_rebuilt=True),
}

# rule -> records that break it: (kind of device, changes). Each is the good record but for what is named.
BAD: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "I01": [("cpu", {"run_id": "edited-after-sealing"}), ("cpu", {"sha256": None})],
    "I02": [
        ("cpu", {"evidence": "projected"}),
        ("cpu", {"evidence": "simulated"}),
        (
            "cuda",
            {"evidence": "simulated", "device__is_simulated": True, "device__simulation_reasons": ["test library"]},
        ),
        ("cuda", {"device__simulation_reasons": ["test library"]}),
    ],
    "I03": [("cpu", {"device": samples.device("cuda"), "protocol__provider": "CUDAExecutionProvider"})],
    "I04": [("cuda", {"device__name": SUPER}), ("cuda", {"device__name": "NVIDIA GeForce GTX 1660 Ti"})],
    "I05": [
        ("cpu", {"device__cpu__vendor": "AnotherVendor"}),
        ("cpu", {"device__cpu__name": "Another Processor"}),
        ("cpu", {"device__cpu__num_logical_cores": 64}),
        ("cpu", {"device__cpu__num_usable_cores": 4}),
        ("cpu", {"device__cpu__features": ["avx2"]}),
        ("cpu", {"device__cpu__family": "6/85"}),
    ],
    "I06": [("cpu", {"device__cpu__features": ["sse4_2"]})],
    "I07": [
        ("cuda", {"device__gpu__nvml": None}),
        ("cuda", {"device__gpu__cuda": None}),
        ("cuda", {"device__gpu__disagreements": ["name: NVML A, CUDA B"]}),
        ("cuda", {"device__gpu__cuda__name": SUPER}),
        ("cuda", {"device__gpu__nvml__name": SUPER}),
    ],
    "I08": [("cuda", {"device__gpu__cuda__uuid_sha256": "9" * 64}), ("cuda", {"device__gpu__nvml__uuid_sha256": None})],
    "I09": [
        ("cuda", {"device__gpu__cuda__compute_capability": "8.6"}),
        ("cuda", {"device__gpu__nvml__compute_capability": "8.6"}),
        ("cuda", {"device__gpu__nvml__compute_capability": None}),
    ],
    "I10": [
        ("cuda", {"device__gpu__cuda__num_sms": 24}),
        ("cuda", {"device__gpu__nvml__num_sms": 24}),
        ("cuda", {"device__gpu__cuda__num_sms": None}),
    ],
    "I11": [
        ("cuda", {"device__gpu__nvml__memory_total_bytes": 8_589_934_592}),
        ("cuda", {"device__gpu__cuda__memory_total_bytes": 4_000_000_000}),
        ("cuda", {"device__gpu__cuda__memory_total_bytes": None}),
    ],
    "I12": [("cuda", {"device__gpu__pci_device_id": "0x21c4"}), ("cuda", {"device__gpu__pci_device_id": None})],
    "I13": [("cuda", {"device__gpu__bus_width_bits": 128}), ("cuda", {"device__gpu__bus_width_bits": None})],
    "I14": [
        ("cpu", {"subject__files__model.onnx.data": "f" * 64}),
        ("cpu", {"subject__files__model.onnx": "f" * 64}),
        ("cpu", {"subject__files": {"model.onnx": "a" * 64}}),
        ("cpu", {"subject__files__extra.onnx": "a" * 64}),
        ("cpu", {"subject__files": {}}),
        ("cpu", {"subject__manifest_sha256": "f" * 64}),
        ("cpu", {"subject__manifest_sha256": None}),
    ],
    "I15": [("cpu", {"subject__graph_sha256": "f" * 64})],
    "I16": [("cpu", {"device__name": "Another Processor"})],
    "I17": [("cuda", {"device__gpu__mig_mode": "on"}), ("cuda", {"device__gpu__mig_mode": "unknown"})],
    "I18": [("cuda", {"subject__has_random_weights": True}), ("cpu", {"subject__has_random_weights": True})],
    "I19": [
        ("cuda", {"created_utc": "1970-01-01T00:00:00Z"}),
        ("cuda", {"created_utc": "9999-12-31T23:59:59Z"}),
        ("cpu", {"created_utc": "2026-02-31T00:00:00Z"}),
    ],
    "I20": [("unverified", {}), ("unfolded", {}), ("verified elsewhere", {})],
    "I21": [("cpu", {"subject__is_graph_rebuilt": False}), ("cuda", {"subject__is_graph_rebuilt": False})],
    "V01": [("cpu", {"purpose": "screen"})],
    "V02": [
        ("cpu", {"workload__batch_size": 2}),
        ("cpu", {"workload__prompt_tokens": 256}),
        ("cpu", {"workload__context_tokens": 64}),
        ("cpu", {"workload__passes": 2}),
        ("threads", {"protocol__num_threads": 7}),
    ],
    "V03": [("cpu", {"checks": [FAULT]}), ("cpu", {"checks": [FAULT, FAULT]}), ("cpu", {"checks": [FAULT] * 3})],
    "V04": [("cpu", {"protocol__num_processes": 6}), ("cpu", {"samples__1__process": 0})],
    "V05": [
        ("cuda", {"samples__2__nodes_by_provider": {"CUDAExecutionProvider": 119, "CPUExecutionProvider": 1}}),
        ("cuda", {"samples__2__nodes_by_provider": {}}),
        ("cuda", {"samples__2__num_shape_nodes": 9}),
        ("cpu", {"samples__0__nodes_by_provider": {"CPUExecutionProvider": 0}}),
        ("cuda", {"protocol__provider": "CPUExecutionProvider"}),
    ],
    "V06": [
        ("cpu", {"samples__1__decode__0__num_tokens": 64}),
        ("cpu", {"samples__1__decode__2__step_ns": [2_000_000] * 63}),
    ],
    "V07": [("cpu", {"samples__4__num_nonfinite_logits": 1})],
    "V08": [
        ("cpu", {"samples__3__num_distinct_outputs": 1}),
        ("cpu", {"samples__3__num_distinct_outputs": 1, "samples__3__prefill": TWO_CALLS}),
        ("cpu", {"samples__3__num_distinct_outputs": 0}),
    ],
    "V09": [
        ("cuda", {"telemetry__5__throttle_reasons": ["hw_thermal_slowdown"]}),
        ("cuda", {"telemetry__19__throttle_reasons": ["gpu_idle", "hw_slowdown"]}),
        ("cpu", {"telemetry__5__throttle_reasons": ["cpu_thermal_throttle"]}),
    ],
    "V10": [
        (
            "cuda",
            {"telemetry__0__sm_clock_mhz": 300, "telemetry__1__sm_clock_mhz": 300, "telemetry__2__sm_clock_mhz": 900},
        ),
        ("cpu", {f"telemetry__{place}__cpu_clock_mhz": 2000.0 for place in range(3)}),
    ],
    "V11": [("cuda", {"telemetry__7__num_foreign_processes": 1})],
    "V12": [("cpu", {"samples__2__steal_share": 0.4, "samples__2__surroundings": samples.surroundings()})],
    "V13": [("cpu", {"protocol__environment": {"PYTEST_XDIST_WORKER": "gw0"}})],
    "V14": [("cuda", {"memory__vram__0__peak_bytes": 79_999_999}), ("cpu", {"memory__rss__1__peak_bytes": 2_000_000})],
    "V15": [
        ("cpu", {"memory__rss__0__cross_check_method": "b", "memory__rss__0__cross_check_bytes": 464_000_001}),
        ("cpu", {"memory__rss__0__cross_check_method": "b", "memory__rss__0__cross_check_bytes": 335_999_999}),
        ("cpu", {"memory__rss__0__peak_bytes": 4_000_000_000, "memory__rss__0__cross_check_bytes": 4_200_000_001}),
    ],
    "V16": [
        ("cpu", {"samples__0__prefill__start_ns": [100_000 + 21_000 * call for call in range(20)]}),
        ("cpu", {"samples__0__prefill__start_ns": [15_000_000 * call for call in range(20)]}),
        ("cpu", {"samples__0__decode__each__start_ns": 13_700_000_000}),
        ("cpu", {"samples__0__decode__each__start_ns": 0}),
        ("cpu", {"samples__0__ttft__start_ns": [100_000_000 + 651_000_000 * call for call in range(20)]}),
        ("cpu", {"samples__0__ttft__start_ns": [100_000 + 21_000 * call for call in range(20)]}),
    ],
    "V17": [
        ("cuda", {"samples__0__prefill__duration_ns": [600_000] * 20}),
        ("cpu", {"samples__0__prefill__duration_ns": [20] * 20}),
        ("cuda", {"samples__0__prefill__duration_ns": [20] * 20}),
        ("cuda", {"samples__each__decode__each__step_ns": [130_000] * 127}),
        ("cpu", {"samples__each__decode__each__step_ns": [2_000] * 127}),
        ("cpu", {"samples__2__ttft__duration_ns": [20] * 20}),
        ("cpu", {"samples__2__load_ns": 1}),
        ("cpu", {"samples__2__load_ns": 9_999}),
        *(("cpu", {"subject__num_parameters": n, "samples__0__prefill__duration_ns": [1] * 20}) for n in (None, 1)),
    ],
    "V18": [
        ("cpu", {"samples": [FIRST | {"process": index} for index in range(5)]}),
        ("cpu", {"samples__1__prefill__duration_ns": FIRST["prefill"]["duration_ns"]}),
        ("cpu", {"samples__1__ttft__duration_ns": FIRST["ttft"]["duration_ns"]}),
        ("cpu", {"samples__1__decode__2__step_ns": FIRST["decode"][0]["step_ns"]}),
        ("cpu", {f"samples__{index}__prefill": EIGHT_CALLS for index in (0, 1)}),
    ],
    "V19": [
        ("cpu", {"samples__2__busy_ns": 10**18}),
        ("cpu", {"samples__2__ttft": {}}),
        ("cpu", {"samples__2__busy_ns": BUSY_NS + 1001}),
    ],
    "V20": [("cpu", {"samples__each__ttft__duration_ns": [18_000_000] * 20, "samples__each__busy_ns": 0})],
    "V21": [
        ("cpu", {"memory__rss__0__reading_bytes__1": 9_000_000_000}),
        ("cpu", {"memory__rss__0__phase_peak_bytes": {"steady": 400_000_001}}),
        ("cuda", {"memory__vram__0__phase_peak_bytes": {"load": 1, "steady": 400_000_001}}),
        ("cpu", {"memory__rss__0__reading_bytes__1": 464_000_001}),
        ("cpu", {"memory__rss__0__peak_bytes": 4_000_000_000, "memory__rss__0__reading_bytes__1": 4_200_000_001}),
    ],
    "V22": [("cpu", {"accuracy__math__rows_sha256": "1" * 64})],
    "V23": [("cpu", {"checks": []})],
    "V24": [("cpu", {"energy": SPAN | {"joules": joules}}) for joules in (1e-9, 0.099, 1_000_001.0)],
    "V25": [
        ("cpu", {"samples__2__foreign_cpu_share": 0.26}),
        ("cuda", {"samples__0__foreign_cpu_share": 0.9}),
        ("cpu", {"samples__1__surroundings": samples.surroundings(foreign=ALL_THE_TIME)}),
        ("cpu", {"samples__1__surroundings": samples.surroundings(waited=ALL_THE_TIME)}),
        ("cpu", {"samples__1__surroundings": samples.surroundings(stolen=ALL_THE_TIME)}),
        ("cpu", {"samples__3__foreign_cpu_share": 0.11}),
    ],
    "V26": [
        ("cpu", {"samples__1__surroundings": samples.surroundings() | THROTTLED}),
        ("cpu", {"samples__1__surroundings": samples.surroundings() | THROTTLED, "host__cpu_quota_cores": 0.2}),
        (
            "cpu",
            {
                "samples__0__surroundings": samples.surroundings()
                | {"num_periods": 10_000, "num_throttled_periods": 5, "throttled_ns": 1},
                "samples__1__surroundings": samples.surroundings() | THROTTLED,
            },
        ),
    ],
    "V30": [("cpu", {"protocol__environment": {name: "set"}}) for name in ("LD_PRELOAD", "PYTHONPATH", "LD_AUDIT")],
    "V31": [
        ("cpu", {"samples__1__clock_span_ns": {"perf_counter": 5_000_000_000, "uptime": 10_000_000_000}}),
        ("cuda", {"samples__0__clock_span_ns": {"perf_counter": 9_850_000_000, "monotonic_raw": 10_060_000_000}}),
    ],
    "V32": [
        ("cpu", {"samples__1__work_done": {"num_calls": 3, "largest_error": 0.26}}),
        ("cpu", {"samples__0__work_done": {"num_calls": 3, "largest_error": 0.0, "step_error": 0.26}}),
        ("cuda", {"samples__0__work_done": {"num_calls": 3, "largest_error": 0.0, "short_step_ns": [900_000_000] * 3}}),
    ],
}


def case_of(kind: str, changes: dict[str, Any]) -> Case:
    """Return a changed record before its own target, sealed after the change but for the cases of the seal."""
    unsealed = {key: value for key, value in changes.items() if key == "sha256" or value == "edited-after-sealing"}
    record = samples.record(
        "cuda" if kind == "cuda" else "cpu", **{key: value for key, value in changes.items() if key not in unsealed}
    )
    return Case(
        record=record.model_copy(update=unsealed),
        target=target_of(kind),
        artifact_files=GOOD_FILES,
        this_cpu=samples.THIS_CPU,
        now=NOW,
        verified=VERIFIED.get(kind),
    )


def target_of(kind: str) -> Target:
    """Return the record's own target; the CPU's also names an instruction set, which `host` does not."""
    if kind == "cuda":
        return load_target("gtx1660")
    host = load_target("host")
    if kind == "threads":
        return host.model_copy(update={"protocol": host.protocol.model_copy(update={"num_threads": 8})})
    if kind in {"verified", "unverified", "unfolded"}:
        return host.model_copy(update={"requires_verification": True})
    return host.model_copy(update={"device": host.device.model_copy(update={"features": ("avx2",)})})


# Of a GTX 1660: looks odd, and is right.
ODD: list[dict[str, Any]] = [
    {"device__gpu__cuda__memory_total_bytes": 5_800_000_000},
    {"samples__each__num_distinct_outputs": 2},
    {"samples__0__prefill": TWO_CALLS},
    {f"samples__{index}__prefill": SEVEN_CALLS for index in (0, 1)},
    {"samples__2__busy_ns": BUSY_NS + 1000},
    {"samples__2__busy_ns": 0},
    {"samples__2__load_ns": 10_000},
    {"samples__each__ttft__duration_ns": [20_000_000] * 20, "samples__each__busy_ns": 0},
    {"samples__each__ttft": {}, "samples__each__busy_ns": 0},
    {
        "samples__each__ttft": {},
        "samples__0__ttft": {"start_ns": [600_000_000], "duration_ns": [20_000_000]},
        "samples__each__busy_ns": 0,
    },
    {"memory__vram__0__phase_peak_bytes": {"steady": 400_000_000}},
    {"memory__rss": [samples.memory_series(0) | {"reading_bytes": [0, 464_000_000, 1]}]},
    {"memory__rss": [samples.memory_series(0) | {"peak_bytes": 4 * 10**9, "reading_bytes": [0, 4_200_000_000, 1]}]},
    *({"energy": SPAN | {"joules": joules}} for joules in (0.1, 1_000_000.0)),
    {"telemetry__each__sm_clock_mhz": 2000} | {f"telemetry__{place}__sm_clock_mhz": 1800 for place in range(3)},
    {"memory__rss": [samples.memory_series(0) | {"peak_bytes": 30_000_000, "time_ns": [], "reading_bytes": []}]},
    {"memory__vram__0__peak_bytes": 4_000_000_000, "memory__vram__0__cross_check_bytes": 4_200_000_000},
    {"telemetry__each__throttle_reasons": ["gpu_idle", "applications_clocks_setting"]},
    {"telemetry": []},
    {"telemetry__each__sm_clock_mhz": None},
    {"telemetry__3__sm_clock_mhz": 1640},
    {"samples__each__steal_share": 0.10, "samples__each__surroundings": samples.surroundings()},
    {"samples__each__foreign_cpu_share": 0.25, "samples__each__surroundings": samples.surroundings()},
    {"samples__each__foreign_cpu_share": 0.10},
    {"samples__each__surroundings": samples.surroundings() | THROTTLED | {"num_throttled_periods": 1}},
    {"samples__each__surroundings": samples.surroundings() | THROTTLED | {"num_periods": None}},
    {"samples__each__surroundings": samples.surroundings() | {"num_periods": 10, "num_throttled_periods": None}},
    {"memory__vram__0__peak_bytes": 80_000_000},
    {"memory__vram__0__cross_check_bytes": 464_000_000, "memory__vram__0__cross_check_method": "b"},
    {"samples__each__prefill__duration_ns": [700_000] * 20, "samples__each__busy_ns": 0},
    {"samples__each__decode__each__step_ns": [140_000] * 127, "samples__each__busy_ns": 0},
    {"subject__num_parameters": None},
    {
        "device__name": "GeForce GTX 1660",
        "device__gpu__nvml__name": "GeForce GTX 1660",
        "device__gpu__cuda__name": "GeForce GTX 1660",
    },
    {
        "samples__0__prefill": {"start_ns": [0], "duration_ns": [20_000_000]},
        "samples__0__busy_ns": 0,
        "samples__0__num_distinct_outputs": 1,
    },
    {"protocol__environment": {"OMP_NUM_THREADS": "8"}},
    {"checks": [{"id": "clock", "status": "warning", "detail": "not locked"}]},
]
