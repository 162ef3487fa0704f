"""Requests of the bench to the measuring child, and its answers: both ends read one type for each.

The child imports this module, so it uses neither pydantic nor the record: see `messages`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..messages import ChildJob
from .profiles import Profile  # noqa: TC001 - `messages.read` needs it

_WORKER = "havoc_core.bench.worker"
ENGINE_WORKER = "havoc_core.bench.engine_worker"
"""The module that does the same jobs for the model of another engine."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The part of a record's `Workload` that the child needs."""

    batch_size: int
    prompt_tokens: int
    context_tokens: int
    decode_tokens: int
    passes: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """One process of a measurement, the `process`-th of its session."""

    artifact: Path
    provider: str
    num_threads: int
    captures_steps: bool
    alpha: dict[str, float] | None = None
    """The mixture of a live artifact; None is its own."""
    engine: str | None = None
    """Another engine that runs the model, one of the files in `engines`; `num_ids` is the size of its vocabulary."""
    num_ids: int = 0
    workload: Work
    profile: Profile
    process: int


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A phase begins now: `t_ns` on the clock that all processes share; the end also has the decoded tokens."""

    name: str
    t_ns: int
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Resident memory as the kernel counts it, in the whole process or by phase; None if it does not report it."""

    baseline_bytes: int | None
    peak_bytes: int | None = None
    phase_peak_bytes: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """The fields of the record's `ProcessSamples`, which the parent validates; and the session's provider options.

    `memory` is that of the same process, where it counts.
    """

    samples: dict[str, Any]
    provider_options: dict[str, str]
    memory: PeakMemory | None = None


@dataclass(frozen=True, kw_only=True)
class ColdStartResult:
    """The fields of the record's `ColdStart`, except the time to start a process, which the parent measures."""

    page_cache: str
    read_bytes: int | None
    load_ns: int
    first_call_ns: int


@dataclass(frozen=True, kw_only=True)
class ArenaResult:
    """The highest memory of the runtime's allocator; None if its profile does not have it."""

    arena_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class LogitsRequest:
    """The likelihood of each of `num_ids` tokens after each piece of token ids, as an array [P, num_ids] in `out`."""

    artifact: str
    provider: str
    num_threads: int
    engine: str | None
    num_ids: int
    pieces: tuple[tuple[int, ...], ...]
    out: Path


@dataclass(frozen=True, kw_only=True)
class LogitsResult:
    """The number of pieces with an answer."""

    num_told: int


LATENCY = ChildJob(module=_WORKER, name="latency", asked=MeasureRequest, told=Mark, answer=LatencyResult)
COST = ChildJob(module=_WORKER, name="cost", asked=MeasureRequest, told=Mark, answer=LatencyResult)
MEMORY = ChildJob(module=_WORKER, name="memory", asked=MeasureRequest, told=Mark, answer=PeakMemory)
COLD_START = ChildJob(module=_WORKER, name="cold_start", asked=MeasureRequest, told=Mark, answer=ColdStartResult)
ARENA = ChildJob(module=_WORKER, name="arena", asked=MeasureRequest, told=Mark, answer=ArenaResult)
LOGITS = ChildJob(module=_WORKER, name="logits", asked=LogitsRequest, told=Mark, answer=LogitsResult)
ENGINE_LOGITS = ChildJob(module=ENGINE_WORKER, name="logits", asked=LogitsRequest, told=Mark, answer=LogitsResult)
