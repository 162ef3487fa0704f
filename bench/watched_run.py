"""One measurement session: the model, the device, and the latency processes, watched from outside.

This process sleeps while a child measures. It only reads the device's clocks twice per second, and the energy counter
at the beginning and end of decoding.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..cores import num_physical_cores
from ..errors import HavocError
from ..export.runtime.artifact import asked_alpha
from ..export.runtime.child import run_worker
from ..export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER, DEVICE_KINDS, kind_of_provider
from ..export.runtime.held import hold
from .contender import Contender
from .cuda_driver import CudaCard, open_cuda_card
from .device import default_provider, identify_device, runtime_package
from .instruments import Sampler, cpu_energy_j, cpu_reading, gpu_reading, telemetry_points
from .judge.schema import ColdStart, Device, ProcessSamples, TelemetryPoint, Workload
from .neighbours import Neighbour, snapshot
from .nvml import Card, Nvml, open_nvml
from .requests import COLD_START, ENGINE_WORKER, LATENCY, MeasureRequest, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..export.runtime.held import HeldArtifact
    from ..messages import Answer, ChildJob
    from .profiles import Profile
    from .requests import LatencyResult, Mark, PeakMemory

TELEMETRY_INTERVAL_MS = 500.0


@dataclass(frozen=True, kw_only=True)
class Session:
    """Values that are the same for every child of one measurement.

    Every child opens `held`: an artifact's folder, or the model of another engine. `card` is None if NVML does not
    watch the device; `idle_pids` were on it before the first child began. With `captures_steps` single steps run as a
    CUDA graph. `alpha` is the mixture of a live artifact, None for the manifest's.
    """

    held: HeldArtifact | Contender
    provider: str
    num_threads: int
    workload: Workload
    profile: Profile
    device: Device
    card: Card | None
    idle_pids: frozenset[int]
    zero_ns: int
    captures_steps: bool = False
    alpha: Mapping[str, float] | None = None

    @property
    def artifact(self) -> Path:
        """The path that every child opens."""
        return Path(self.held.place)

    @property
    def engine(self) -> str | None:
        """The other engine that runs the model, None for an artifact."""
        return self.held.engine if isinstance(self.held, Contender) else None

    def request(self, process: int) -> MeasureRequest:
        """The worker's request for one process."""
        return MeasureRequest(
            artifact=self.artifact.absolute(),
            provider=self.provider,
            num_threads=self.num_threads,
            captures_steps=self.captures_steps,
            alpha=None if self.alpha is None else dict(self.alpha),
            engine=self.engine,
            num_ids=(self.held.num_ids or 0) if isinstance(self.held, Contender) else 0,
            workload=Work(**self.workload.model_dump(include={part.name for part in fields(Work)})),
            profile=self.profile,
            process=process,
        )

    def run(
        self,
        job: ChildJob[MeasureRequest, Mark, Answer],
        process: int,
        *,
        on_start: Callable[[int], None] | None = None,
        listen: Callable[[Mark], None] | None = None,
    ) -> Answer:
        """Run one job in a fresh process, with the engine's own interpreter if it has one."""
        return run_worker(
            job if self.engine is None else replace(job, module=ENGINE_WORKER),
            self.request(process),
            timeout_s=self.profile.timeout_s,
            on_start=on_start,
            listen=listen,
            python=self.held.python if isinstance(self.held, Contender) else None,
        )


@contextmanager
def open_session(
    artifact: Path | Contender,
    *,
    profile: Profile,
    provider: str | None = None,
    num_threads: int | None = None,
    workload: Workload | None = None,
    device: Device | None = None,
    captures_steps: bool = False,
    alpha: Mapping[str, float] | None = None,
) -> Iterator[Session]:
    """Identify the device before any child starts, hash the artifact and keep its folder open.

    The model of another engine was hashed when it was entered (`contender.enter`); it is measured only on the CPU.
    NVML is kept open if it is needed. A changed artifact is an `IdentityError`; an `alpha` for an artifact that is not
    live is a `HavocError`.

    `device` replaces the identification: a simulated card is watched while the CPU does the work.
    """
    if isinstance(artifact, Contender):
        provider = require_plain_work(artifact, provider, workload or Workload(), alpha, captures_steps=captures_steps)
    if provider is None:
        provider = default_provider()
    if not kind_of_provider(provider).captures_steps and captures_steps:
        raise HavocError(f"a CUDA graph needs {CUDA_PROVIDER}, but the provider is {provider}")
    if num_threads is not None and num_threads < 1:
        raise HavocError(f"num_threads must be at least 1, not {num_threads}")
    runtime_package()  # two packages in one environment overwrite each other: refuse them before anything runs
    device = device or identify_device(provider)
    with _held(artifact, alpha) as held:
        session = Session(
            held=held,
            provider=provider,
            num_threads=num_threads or num_physical_cores(),
            workload=workload or Workload(),
            profile=profile,
            device=device,
            card=None,
            idle_pids=frozenset(),
            zero_ns=time.perf_counter_ns(),
            captures_steps=captures_steps,
            alpha=alpha,
        )
        with _watched(session) as watched:
            yield watched


@contextmanager
def _held(artifact: Path | Contender, alpha: Mapping[str, float] | None) -> Iterator[HeldArtifact | Contender]:
    if isinstance(artifact, Contender):
        yield artifact
        return
    with hold(artifact) as held:
        asked_alpha(held.manifest, alpha, where=str(artifact))
        yield held


def require_plain_work(
    model: Contender,
    provider: str | None,
    work: Workload,
    alpha: Mapping[str, float] | None,
    *,
    captures_steps: bool,
) -> str:
    """Refuse options for artifacts only, and a workload that the model cannot hold; return the CPU's provider."""
    options = {
        "--provider": provider not in {None, CPU_PROVIDER},
        "--alpha": alpha is not None,
        "--cuda-graph": captures_steps,
        "--batch": work.batch_size != 1,
        "--passes": work.passes != 1,
    }
    for option in (name for name, is_given in options.items() if is_given):
        raise HavocError(
            f"{model.shown}: {option} is only for artifacts; another engine reads one prompt at a time on a CPU"
        )
    needed = max(work.prompt_tokens + 1, work.context_tokens + work.decode_tokens)
    if model.max_tokens is None or model.num_ids is None:
        raise HavocError(
            f"{model.shown}: a server at an address reports neither its file nor its memory, so it cannot have a "
            "record: give the .gguf file, or compare it with `havoc duel`"
        )
    if needed > model.max_tokens:
        raise HavocError(f"the workload needs {needed} tokens of context, but {model.shown} has {model.max_tokens}")
    return CPU_PROVIDER


@contextmanager
def _watched(session: Session) -> Iterator[Session]:
    if not DEVICE_KINDS[session.device.kind].has_nvml:
        yield session
        return
    with open_nvml() as nvml:
        cuda = open_cuda_card()
        uuid = cuda.uuid if isinstance(cuda, CudaCard) else None
        card = (nvml.card(uuid) or nvml.card()) if isinstance(nvml, Nvml) else None
        present = (card.processes() if card else None) or ()
        yield replace(session, card=card, idle_pids=frozenset(process.pid for process in present))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One latency process: its samples, and the readings of the device and of other processes meanwhile."""

    samples: ProcessSamples
    telemetry: tuple[TelemetryPoint, ...]
    decode_joules: float | None
    decode_span_s: float
    decode_tokens: int
    parent_cpu_share: float
    neighbours: tuple[Neighbour, ...] = ()
    provider_options: dict[str, str] = field(default_factory=dict)
    memory: PeakMemory | None = None


class Watch(Protocol):
    """The interface of objects that watch a child at work, such as `memory.MemoryWatch`."""

    def on_start(self, pid: int) -> None:
        """Receive the process id."""

    def listen(self, mark: Mark) -> None:
        """Receive the start of a phase."""


def latency_process(
    session: Session,
    process: int,
    *,
    job: ChildJob[MeasureRequest, Mark, LatencyResult] = LATENCY,
    watch: Watch | None = None,
) -> Attempt:
    """Run one latency process.

    Readings count from the first timed call to the last, because a device has its lowest clocks while a model loads.
    """
    pid = 0
    window: dict[str, int] = {}
    energy: dict[str, tuple[int, float | None, int]] = {}

    def start(started: int) -> None:
        nonlocal pid
        pid = started
        if watch is not None:
            watch.on_start(pid)
        stack.enter_context(sampler)

    def listen(mark: Mark) -> None:
        if watch is not None:
            watch.listen(mark)
        if mark.name in ("decode", "end"):
            energy[mark.name] = (mark.t_ns, _energy_j(session), mark.num_tokens)
        if mark.name in ("prefill", "end"):
            before_ns = time.perf_counter_ns()
            sampler.take()
            window[mark.name] = before_ns if mark.name == "prefill" else time.perf_counter_ns()

    def read() -> dict[str, Any] | None:
        if session.card is None:
            return cpu_reading() if DEVICE_KINDS[session.device.kind].is_host else None
        return gpu_reading(session.card, own_pid=pid, idle_pids=session.idle_pids)

    sampler = Sampler(read, interval_ms=TELEMETRY_INTERVAL_MS)
    beside = snapshot()
    cpu_before, wall_before = time.process_time(), time.perf_counter()
    with ExitStack() as stack:
        result = session.run(job, process, on_start=start, listen=listen)
    share = (time.process_time() - cpu_before) / (time.perf_counter() - wall_before)
    timed = sorted(
        (taken for taken in sampler.readings if window["prefill"] <= taken[0] <= window["end"]),
        key=lambda taken: taken[0],
    )
    begin, end = energy["decode"], energy["end"]
    joules = None if begin[1] is None or end[1] is None or end[1] <= begin[1] else end[1] - begin[1]
    return Attempt(
        samples=ProcessSamples.model_validate(result.samples, strict=False),
        telemetry=tuple(telemetry_points(timed, process=process, zero_ns=session.zero_ns)),
        decode_joules=joules,
        decode_span_s=(end[0] - begin[0]) / 1e9,
        decode_tokens=end[2],
        parent_cpu_share=share,
        neighbours=snapshot().since(beside, own_pids={pid, os.getpid()}).neighbours,
        provider_options=result.provider_options,
        memory=result.memory,
    )


def cold_start(session: Session) -> ColdStart:
    """Run one process that loads and calls the artifact once, without the page cache if that is possible."""
    started_ns = loading_ns = 0

    def start(_pid: int) -> None:
        nonlocal started_ns
        started_ns = time.perf_counter_ns()

    def listen(mark: Mark) -> None:
        nonlocal loading_ns
        loading_ns = mark.t_ns

    result = session.run(COLD_START, 0, on_start=start, listen=listen)
    return ColdStart(**asdict(result), startup_ns=max(loading_ns - started_ns, 1))


def _energy_j(session: Session) -> float | None:
    if session.card is not None:
        return session.card.energy_j()
    return cpu_energy_j() if DEVICE_KINDS[session.device.kind].is_host else None
