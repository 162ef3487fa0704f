"""Measure an artifact in fresh child processes, one after another, while this process sleeps; write one record.

    record = measure(Path("artifact"), profile="standard")
    cost = measure_cost(Path("artifact"))            # a few seconds, for ranking candidates only

Latency processes are only timed; memory is watched in separate processes. A process that was throttled or disturbed by
other programs is repeated, within the profile's bound, and counted. Every file is hashed first, so models load from a
warm page cache; one more process measures the cold start. The folder stays open from before the first hash until every
file was found unchanged after the last call. Nothing is written to disk: the caller saves the record.
"""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .. import storage
from ..errors import HavocError, MeasurementError
from ..export.runtime.child import ENVIRONMENT_DEFAULTS
from ..export.runtime.devices import DEVICE_KINDS
from ..export.runtime.held import HeldArtifact
from ..progress import SILENT
from . import warmup
from .contender import Contender
from .device import identify_host, swap_used_bytes
from .findings import attempt_problems, session_checks
from .judge.record import Record
from .judge.schema import Energy, Memory, Protocol, Provenance
from .judge.validity import LOADED_BESIDE
from .memory import RSS_INTERVAL_MS, VRAM_INTERVAL_MS, MemoryWatch, joined, memory_process
from .neighbours import wait_until_quiet
from .profiles import profile_named
from .requests import COST
from .subject import describe, describe_model, is_graph_rebuilt
from .tool_version import identify_tool
from .watched_run import TELEMETRY_INTERVAL_MS, Attempt, Session, cold_start, latency_process, open_session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..progress import Progress, Stage
    from .judge.schema import ColdStart, Device, ProcessSamples, Purpose, Subject, Workload

_ENVIRONMENT = (
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ORT_CUDA_GEMM_OPTIONS",
    "PYTEST_XDIST_WORKER",
    "PYTHONHASHSEED",
)
_PRESENCE_ONLY = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", *LOADED_BESIDE)  # their values hold paths or identities


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """The cost of one structure from a short measurement, and its record (purpose "screen": no gate accepts it).

    `disturbance` says why the times are not reliable, in the words of the harness's checks; "" if they are.
    """

    prefill_ms: float
    decode_tok_per_s: float
    peak_bytes: int
    record: Record
    disturbance: str = ""


def measure(
    artifact: Path | str | Contender,
    *,
    profile: str = "standard",
    purpose: Purpose | None = None,
    provider: str | None = None,
    num_threads: int | None = None,
    workload: Workload | None = None,
    previous: Record | None = None,
    captures_steps: bool = False,
    alpha: Mapping[str, float] | None = None,
    wait_s: float = 0.0,
    progress: Progress = SILENT,
) -> Record:
    """Measure an artifact, or another engine's model that was entered, on this machine; return the sealed record.

    It waits up to `wait_s` seconds in total for a quiet CPU, before the first process and before each repeated one;
    then it measures anyway, and the record says what disturbed it. `provider` None uses the GPU if CUDA shows one, else
    the CPU; `num_threads` None is one thread per physical core; `captures_steps` runs the single steps of a static
    cache as a CUDA graph; `alpha` is the mixture of a live artifact, None for the manifest's. `purpose` follows the
    profile: "release" for release, else "confirm". Raises `HavocError` if the folder is not an artifact,
    `IdentityError` for a changed artifact or a missing device, `MeasurementError` if a process dies.
    """
    plan = profile_named(profile)
    chosen: Purpose = purpose or ("release" if profile == "release" else "confirm")
    with open_session(
        artifact if isinstance(artifact, Contender) else Path(artifact),
        profile=plan,
        provider=provider,
        num_threads=num_threads,
        workload=workload,
        captures_steps=captures_steps,
        alpha=alpha,
    ) as session:
        return run_session(session, purpose=chosen, previous=previous, wait_s=wait_s, progress=progress)


def run_session(
    session: Session,
    *,
    purpose: Purpose,
    previous: Record | None = None,
    wait_s: float = 0.0,
    progress: Progress = SILENT,
) -> Record:
    """Carry out every process of an open session and return the sealed record."""
    subject = _described(session)
    if isinstance(session.held, HeldArtifact):
        subject = subject.model_copy(update={"is_graph_rebuilt": is_graph_rebuilt(session.held)})
    swap_before = swap_used_bytes()
    try:
        attempts, reasons, memories, cold = _all_processes(session, subject, _Patience(wait_s, progress), progress)
    except HavocError:
        session.held.require_unchanged()  # if another artifact took its place, report that reason
        raise
    session.held.require_unchanged()
    return _assembled(
        session,
        subject=subject,
        attempts=attempts,
        memory=joined(memories),
        cold=cold,
        purpose=purpose,
        retry_reasons=reasons,
        swap_before_bytes=swap_before,
        previous=previous,
    )


def _described(session: Session) -> Subject:
    """Describe the measured model."""
    if isinstance(session.held, Contender):
        return describe_model(session.held)
    return describe(session.held, alpha=session.alpha)


def finish_writes() -> None:
    """Let the kernel write the new files to the disk now: this work would disturb the first process."""
    if hasattr(os, "sync"):
        os.sync()


class _Patience:
    """Waits for a quiet machine, up to a total number of seconds."""

    def __init__(self, wait_s: float, progress: Progress) -> None:
        self._left_s, self._progress = wait_s, progress

    def wait(self) -> None:
        """Wait until the machine is quiet or the time is over."""
        if self._left_s > 0:
            began = time.monotonic()
            wait_until_quiet(self._left_s, progress=self._progress)
            self._left_s -= time.monotonic() - began


def _all_processes(
    session: Session, subject: Subject, patience: _Patience, progress: Progress
) -> tuple[list[Attempt], list[str], list[Memory], ColdStart]:
    """Latency, then memory, then the cold start, one process after another."""
    profile = session.profile
    finish_writes()
    num_stages = profile.num_processes + profile.num_memory_processes + 1
    patience.wait()
    with progress.stage("measure", num_stages, unit="processes") as stage:
        attempts, reasons = _latency_processes(session, patience, stage)
        memories = []
        for process in range(profile.num_memory_processes):
            memories.append(memory_process(session, process, weight_bytes=subject.weight_bytes))
            stage.advance(note=_memory_note(memories[-1]))
        cold = cold_start(session)
        stage.advance(note=f"cold start {(cold.startup_ns + cold.load_ns + cold.first_call_ns) / 1e9:.2f} s")
    return attempts, reasons, memories, cold


def _latency_processes(session: Session, patience: _Patience, stage: Stage) -> tuple[list[Attempt], list[str]]:
    """Every latency process, repeated while it is disturbed and the profile allows it; and the reasons."""
    attempts: list[Attempt] = []
    reasons: list[str] = []
    for process in range(session.profile.num_processes):
        attempt = latency_process(session, process)
        while len(reasons) < session.profile.num_retries and (problems := attempt_problems(attempt)):
            reasons.append(f"process {process}: {problems[0]}")
            stage.advance(0, note=f"repeating: {problems[0]}")
            patience.wait()
            attempt = latency_process(session, process)
        attempts.append(attempt)
        stage.advance(note=_note(attempt.samples))
    return attempts, reasons


def measure_cost(
    artifact: Path | str,
    *,
    provider: str | None = None,
    num_threads: int | None = None,
    workload: Workload | None = None,
    device: Device | None = None,
    captures_steps: bool = False,
    alpha: Mapping[str, float] | None = None,
    num_retries: int = 0,
    wait_s: float = 0.0,
) -> MeasuredCost:
    """Measure one artifact for a few seconds in one fresh process, to rank it among others; errors as `measure`.

    Unlike in `measure`, memory is watched in the same process; the figures are medians. A disturbed process is repeated
    up to `num_retries` times, after waits of up to `wait_s` seconds in total for a quiet machine. `device` replaces the
    identification, as in `open_session`.
    """
    plan = profile_named("screen")
    with open_session(
        Path(artifact),
        profile=plan,
        provider=provider,
        num_threads=num_threads,
        workload=workload,
        device=device,
        captures_steps=captures_steps,
        alpha=alpha,
    ) as session:
        subject = _described(session)
        swap_before = swap_used_bytes()
        patience = _Patience(wait_s, SILENT)
        finish_writes()
        attempt, memory = _watched_process(session, subject)
        reasons: list[str] = []
        while len(reasons) < num_retries and (problems := attempt_problems(attempt)):
            reasons.append(problems[0])
            patience.wait()
            attempt, memory = _watched_process(session, subject)
        session.held.require_unchanged()
        record = _assembled(
            session,
            subject=subject,
            attempts=[attempt],
            memory=memory,
            cold=None,
            purpose="screen",
            retry_reasons=reasons,
            swap_before_bytes=swap_before,
            previous=None,
        )
    peak_bytes = memory.peak_rss_bytes if DEVICE_KINDS[session.device.kind].is_host else memory.peak_vram_bytes
    if peak_bytes is None:
        raise MeasurementError(f"peak memory could not be measured: {memory.vram_reason or memory.rss_reason}")
    return MeasuredCost(
        prefill_ms=_middle(attempt.samples.prefill_ms),
        decode_tok_per_s=_middle(attempt.samples.decode_tok_per_s),
        peak_bytes=peak_bytes,
        record=record,
        disturbance=next(iter(attempt_problems(attempt)), ""),
    )


def _watched_process(session: Session, subject: Subject) -> tuple[Attempt, Memory]:
    """One process that is timed and whose memory is watched."""
    with MemoryWatch(session) as watch:
        attempt = latency_process(session, 0, job=COST, watch=watch)
    assert attempt.memory is not None  # noqa: S101 - this job always has it
    return attempt, watch.memory(0, attempt.memory, weight_bytes=subject.weight_bytes)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _assembled(
    session: Session,
    *,
    subject: Subject,
    attempts: Sequence[Attempt],
    memory: Memory,
    cold: ColdStart | None,
    purpose: Purpose,
    retry_reasons: Sequence[str],
    swap_before_bytes: int | None,
    previous: Record | None,
) -> Record:
    swap_after = swap_used_bytes()
    protocol = _protocol(session, attempts, retry_reasons)
    now = datetime.now(UTC)
    checks = session_checks(
        attempts,
        memory=memory,
        device=session.device,
        retry_reasons=retry_reasons,
        swap_growth_bytes=None if swap_after is None or swap_before_bytes is None else swap_after - swap_before_bytes,
    )
    return Record(
        run_id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        created_utc=f"{now:%Y-%m-%dT%H:%M:%SZ}",
        tool=identify_tool(),
        evidence="simulated" if session.device.is_simulated else "measured",
        purpose=purpose,
        subject=subject,
        workload=session.workload.model_copy(
            update={"ttft_from": "text" if session.engine is None and "tokenizer.json" in subject.files else "ids"}
        ),
        device=session.device,
        host=identify_host(),
        protocol=protocol,
        samples=tuple(attempt.samples for attempt in attempts),
        cold_start=cold,
        memory=memory,
        telemetry=tuple(point for attempt in attempts for point in attempt.telemetry),
        energy=_energy(session, attempts),
        checks=checks,
        provenance=Provenance(
            protocol_sha256=storage.sha256_json(
                [
                    protocol.model_dump(mode="json", exclude={"num_retries", "retry_reasons"}),  # what was planned
                    session.workload.model_dump(mode="json"),
                ]
            ),
            previous_record_sha256=previous.sha256 if previous else None,
        ),
    ).sealed()


def _protocol(session: Session, attempts: Sequence[Attempt], retry_reasons: Sequence[str]) -> Protocol:
    environment = {**ENVIRONMENT_DEFAULTS, **os.environ}
    profile = session.profile
    return Protocol(
        profile=profile.name,
        provider=session.provider,
        provider_options=attempts[0].provider_options,
        num_processes=profile.num_processes,
        num_threads=session.num_threads,
        min_busy_s=profile.prefill.min_busy_s + profile.ttft.min_busy_s + profile.decode.min_busy_s,
        warmup_tolerance=warmup.LEAST_TOLERANCE,
        io_binding=session.engine is None,
        kv_cache="preallocated" if session.engine is None else None,
        memory_interval_ms=RSS_INTERVAL_MS if session.card is None else VRAM_INTERVAL_MS,
        telemetry_interval_ms=TELEMETRY_INTERVAL_MS,
        num_retries=len(retry_reasons),
        retry_reasons=tuple(retry_reasons),
        environment={
            **{name: environment[name][:100] for name in _ENVIRONMENT if name in environment},
            **{name: "set" for name in _PRESENCE_ONLY if environment.get(name)},
        },
    )


def _energy(session: Session, attempts: Sequence[Attempt]) -> Energy | None:
    """Energy of all decode spans, with each episode's prefill; None if a counter gave no reading."""
    if not attempts or any(attempt.decode_joules is None for attempt in attempts):
        return None
    return Energy(
        method="rapl_package" if session.card is None else "nvml_total_energy",
        joules=sum(attempt.decode_joules or 0.0 for attempt in attempts),
        num_tokens=sum(attempt.decode_tokens for attempt in attempts),
        span_s=sum(attempt.decode_span_s for attempt in attempts),
        process_j_per_tok=tuple((attempt.decode_joules or 0.0) / attempt.decode_tokens for attempt in attempts),
    )


def _note(samples: ProcessSamples) -> str:
    return f"prefill {_middle(samples.prefill_ms):.1f} ms, {_middle(samples.decode_tok_per_s):.0f} tok/s"


def _memory_note(memory: Memory) -> str:
    peak_bytes = memory.peak_vram_bytes or memory.peak_rss_bytes
    return f"peak {peak_bytes / 1e6:.0f} MB" if peak_bytes else "peak memory unknown"
