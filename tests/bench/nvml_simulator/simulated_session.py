"""Measure an artifact on the CPU while the simulated card is watched; one JSON document out: what was seen, or why not.

simulated_session.py ARTIFACT record|memory|latency [NUM_RETRIES]
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from havoc_core.bench.device import identify_device
from havoc_core.bench.findings import attempt_problems
from havoc_core.bench.judge.record import Workload
from havoc_core.bench.measure import run_session
from havoc_core.bench.memory import memory_process
from havoc_core.bench.profiles import PROFILES, Series
from havoc_core.bench.subject import identify_subject
from havoc_core.bench.watched_run import Session, latency_process, open_session
from havoc_core.errors import HavocError
from havoc_core.export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER

BRIEF = dataclasses.replace(
    PROFILES["quick"],
    num_processes=1,
    warmup_window_s=0.0,
    warmup_max_s=0.1,
    prefill=Series(3, 0.0, 2.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(2, 0.0, 2.0),
    memory=Series(5, 0.3, 2.0),
)
WORKLOAD = Workload(prompt_tokens=24, context_tokens=16, decode_tokens=5)


def see(session: Session, mode: str) -> dict[str, Any]:
    """Do one part of a measurement."""
    if mode == "record":
        return run_session(session, purpose="confirm").document()
    if mode == "memory":
        weight_bytes = identify_subject(session.artifact).weight_bytes
        return memory_process(session, 0, weight_bytes=weight_bytes).model_dump(mode="json")
    attempt = latency_process(session, 0)
    return {
        "problems": attempt_problems(attempt),
        "telemetry": [point.model_dump(mode="json") for point in attempt.telemetry],
        "joules": attempt.decode_joules,
    }


def main(artifact: str, mode: str, num_retries: str = "0") -> None:
    """Print what was seen, or the type and words of the error."""
    sys.executable = os.environ.get("SIMULATED_CHILD_PYTHON", sys.executable)
    try:
        device = identify_device(CUDA_PROVIDER)
        profile = dataclasses.replace(BRIEF, num_retries=int(num_retries))
        with open_session(
            Path(artifact), profile=profile, provider=CPU_PROVIDER, device=device, workload=WORKLOAD, num_threads=1
        ) as session:
            print(json.dumps({"device": device.model_dump(mode="json"), "seen": see(session, mode)}))
    except HavocError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
