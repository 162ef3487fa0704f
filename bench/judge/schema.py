"""The parts of a record: frozen, strictly typed pydantic models with the unit in every name.

Durations are integer nanoseconds (`_ns`) and positive, sizes integer bytes (2 GB is 2,000,000,000 bytes). A value that
could not be measured is null, never 0, NaN or Infinity; numbers used in computations have bounds beyond any real value.
Nothing here names the machine, its user or a path.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from ...export.runtime.devices import DEVICE_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

PositiveNs = Annotated[int, Field(gt=0, lt=2**62)]
TimestampNs = Annotated[int, Field(ge=0, lt=2**62)]
PositiveBytes = Annotated[int, Field(gt=0, lt=2**62)]
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=0, lt=2**62)]
PositiveCount = Annotated[int, Field(gt=0, lt=2**31)]
NumRows = Annotated[int, Field(ge=0, lt=2**24)]
ClockMhz = Annotated[int, Field(ge=0, lt=1_000_000)]
PowerW = Annotated[float, Field(ge=0, lt=1e6)]
Nats = Annotated[float, Field(ge=0, lt=1e6)]
IntervalMs = Annotated[float, Field(gt=0, lt=1e12)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=500)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=80)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=80)]
RelativeName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*$", max_length=200)
]

ROWS_PER_DIGIT = 4
RowBits = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$", max_length=2**24 // ROWS_PER_DIGIT)]


def _known_device(name: str) -> str:
    if name not in DEVICE_KINDS:
        raise ValueError(f"unknown kind of device {name!r}; known are {', '.join(DEVICE_KINDS)}")
    return name


DeviceName = Annotated[
    str, AfterValidator(_known_device), WithJsonSchema({"enum": list(DEVICE_KINDS), "type": "string"})
]
Evidence = Literal["measured", "simulated", "projected"]
Purpose = Literal["screen", "confirm", "release"]
WarmupClass = Literal["flat", "warmup", "slowdown", "no_steady_state"]
CheckStatus = Literal["ok", "warning", "invalid", "unavailable"]


_ROUNDING = 1e-6


class Part(BaseModel):
    """Base of every part of a record: frozen, strict types, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Tool(Part):
    """The program that wrote the record; commit and dirtiness only if it ran from a checkout."""

    name: Text = "havoc-core"
    version: Text
    git_commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    is_git_dirty: bool | None = None


class FormatCost(Part):
    """The cost of the artifact's formats against the exact fold in fp32, measured at its export on a text.

    KL divergences in nats: `kl_chunks` are the means over equal pieces of neighbouring positions, `kl_mean` is the mean
    of these. Without `text_sha256` the ids were random.
    """

    kl_mean: Nats
    kl_p99: Nats
    kl_chunks: Annotated[tuple[Nats, ...], Field(min_length=1, max_length=100_000)]
    top1_share: Annotated[float, Field(ge=0, le=1)]
    perplexity_ratio: Annotated[float, Field(gt=0, lt=1e30)]
    num_positions: PositiveCount
    text: Literal["bundled text", "given text", "random ids"]
    text_sha256: Sha256 | None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        mean = sum(self.kl_chunks) / len(self.kl_chunks)
        if not math.isclose(mean, self.kl_mean, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            raise ValueError(f"the pieces have {mean:.6g} nats on average, but kl_mean is {self.kl_mean:.6g}")
        if abs(self.top1_share * self.num_positions - self.num_same) > _ROUNDING * self.num_positions:
            raise ValueError(
                f"a share of {self.top1_share!r} of {self.num_positions} positions is not a whole number of positions"
            )
        if self.num_positions % len(self.kl_chunks):
            raise ValueError(f"{self.num_positions} positions cannot have {len(self.kl_chunks)} equal pieces")
        if (self.text == "random ids") != (self.text_sha256 is None):
            raise ValueError(f"text is {self.text}, but its SHA-256 is {self.text_sha256}")
        return self

    @property
    def num_same(self) -> int:
        """Number of positions with the same first choice."""
        return round(self.top1_share * self.num_positions)


class EngineVersion(Part):
    """The other engine that ran the model, such as `llama.cpp`, and the version of its package."""

    name: Text
    version: Text


class Subject(Part):
    """The artifact that was measured, with the hash of each of its files.

    With an `engine` it is that engine's model, not an artifact of HAVOC: then there is no manifest and no
    `graph_sha256`, and only the files of the model and the bytes of its weights are known.

    `config` and `structure` are its full shape and formats, from which the roofline of a measurement is computed.
    `graph` says how it was written: dialect, opset, kind of cache. `format_cost` is the cost of its formats, null if
    the artifact does not state it. `is_graph_rebuilt` says whether HAVOC built its graphs again from configuration and
    structure with the same bytes; null if that is not possible, as on a device without onnx-ir.
    """

    name: Text
    files: dict[RelativeName, Sha256]
    manifest_sha256: Sha256 | None = None
    graph_sha256: Sha256 | None = None
    num_parameters: Count | None = None
    weight_bytes: PositiveBytes
    weight_format: Text
    activation_dtype: Text
    opset: Count | None = None
    base_hash: Text | None = None
    alpha: dict[Text, float] | None = None
    rule: Text | None = None
    has_random_weights: bool = False
    structure: dict[Text, Text] | None = None
    graph: dict[Text, JsonValue] | None = None
    config: dict[Text, JsonValue] | None = None
    format_cost: FormatCost | None = None
    is_graph_rebuilt: bool | None = None
    engine: EngineVersion | None = None

    @model_validator(mode="after")
    def _has_graph_or_engine(self) -> Self:
        if self.engine is None and self.graph_sha256 is None:
            raise ValueError("an artifact needs graph_sha256; only a model of another engine may leave it out")
        havocs = ("graph_sha256", "manifest_sha256", "format_cost", "is_graph_rebuilt")
        stray = [name for name in havocs if getattr(self, name) is not None]
        if self.engine is not None and stray:
            raise ValueError(f"a model of {self.engine.name} cannot have {', '.join(stray)}")
        return self


class Workload(Part):
    """The work that the model was given: tokens are uniform random ids, drawn from the seed for every call.

    `decode_tokens` includes the first generated token, which belongs to the prefill and is not timed with the others.
    With `batch_size` prompts at once, tokens and rates are those of each prompt. A timed prefill, and the one before a
    first token, reads its prompt `passes` times: 2 if a first pass chooses the expert that answers in the second.
    """

    batch_size: PositiveCount = 1
    prompt_tokens: PositiveCount = 512
    context_tokens: PositiveCount = 512
    decode_tokens: Annotated[int, Field(gt=1, lt=2**31)] = 128
    passes: PositiveCount = 1
    ttft_from: Literal["text", "ids"] = "ids"
    seed: Count = 0


class Cpu(Part):
    """Identity of a CPU as its operating system reports it."""

    name: Text
    vendor: Text
    architecture: Text
    family: Text | None = None
    stepping: Text | None = None
    features: tuple[Text, ...] = ()
    num_logical_cores: PositiveCount
    num_usable_cores: PositiveCount


class GpuWitness(Part):
    """The card as one source reports it; UUIDs are stored hashed."""

    name: Text
    uuid_sha256: Sha256 | None = None
    compute_capability: Text | None = None
    num_sms: Count | None = None
    memory_total_bytes: PositiveBytes | None = None
    library_sha256: Sha256 | None = None


class Gpu(Part):
    """Identity of a graphics card by two independent witnesses: NVML and the CUDA driver API."""

    nvml: GpuWitness | None
    cuda: GpuWitness | None
    disagreements: tuple[Text, ...] = ()
    pci_device_id: Text | None = None
    bus_width_bits: Count | None = None
    vbios: Text | None = None
    driver_version: Text | None = None
    cuda_driver_version: Text | None = None
    driver_model: Text | None = None
    mig_mode: Text | None = None
    persistence_mode: Text | None = None
    accounting_mode: Text | None = None
    power_limit_w: PowerW | None = None
    max_sm_clock_mhz: ClockMhz | None = None
    max_memory_clock_mhz: ClockMhz | None = None


class Device(Part):
    """The processor that ran the model. Equal devices with equal drivers have the same `fingerprint`."""

    kind: DeviceName
    name: Text
    cpu: Cpu
    gpu: Gpu | None = None
    is_simulated: bool = False
    simulation_reasons: tuple[Text, ...] = ()
    fingerprint: Sha256

    @model_validator(mode="after")
    def _gpu_has_witness(self) -> Self:
        if self.kind == "cuda" and self.gpu is None:
            raise ValueError("a cuda device needs its gpu identity")
        return self


class Host(Part):
    """The machine around the device, without names that identify it.

    `cpu_quota_cores` is the CPU time that a container or service may use, in cores; null without such a limit.
    """

    os: Text
    kernel: Text
    libc: Text | None = None
    container: Text | None = None
    ram_bytes: PositiveBytes
    swap_bytes: Bytes
    cpu_governor: Text | None = None
    cpu_quota_cores: Annotated[float, Field(gt=0, lt=1e6)] | None = None
    versions: dict[Text, Text]


class Protocol(Part):
    """How it was measured.

    `kv_cache` is "preallocated" if keys and values stay in buffers that are bound once, "allocated" if the runtime
    allocates new ones at every step, and null in records older than the field.
    """

    profile: Text
    provider: Text
    provider_options: dict[Text, Text] = {}
    num_processes: PositiveCount
    num_threads: PositiveCount
    min_busy_s: Annotated[float, Field(ge=0, lt=1e9)]
    warmup_tolerance: Annotated[float, Field(gt=0, lt=1e6)]
    timer: Text = "perf_counter_ns"
    is_gc_off: bool = True
    io_binding: bool = False
    kv_cache: Literal["preallocated", "allocated"] | None = None
    memory_interval_ms: IntervalMs | None = None
    telemetry_interval_ms: IntervalMs | None = None
    num_retries: Count = 0
    retry_reasons: tuple[Text, ...] = ()
    environment: dict[Text, Text] = {}


class Calls(Part):
    """Timed calls in order: the start of each (ns since the process's first clock reading) and its duration.

    `cpu_ns` is the CPU time that all threads of the process used during each call; empty if it was not counted.
    """

    start_ns: tuple[TimestampNs, ...] = ()
    duration_ns: tuple[PositiveNs, ...] = ()
    cpu_ns: tuple[TimestampNs, ...] = ()

    @model_validator(mode="after")
    def _one_start_each(self) -> Self:
        if len(self.start_ns) != len(self.duration_ns):
            raise ValueError(f"{len(self.start_ns)} start times for {len(self.duration_ns)} durations")
        if self.cpu_ns and len(self.cpu_ns) != len(self.duration_ns):
            raise ValueError(f"{len(self.cpu_ns)} CPU times for {len(self.duration_ns)} durations")
        return self


class Episode(Part):
    """One decode run of `num_tokens` generated tokens: the first came with the prefill, every other took one step.

    `cpu_ns` is the CPU time of all threads over all steps; null if it was not counted.
    """

    start_ns: TimestampNs
    prefill_ns: PositiveNs
    step_ns: tuple[PositiveNs, ...]
    num_tokens: Count
    cpu_ns: TimestampNs | None = None

    @property
    def tok_per_s(self) -> float | None:
        """Tokens after the first per second of decoding; None when there was no step."""
        return len(self.step_ns) / (sum(self.step_ns) / 1e9) if self.step_ns else None


class Warmup(Part):
    """The calls before the counted ones, and how the process settled.

    `tolerance` is the allowed difference between the medians of two windows, as a share: the difference that the
    scatter of the calls explains. Null in records older than the field, whose protocol has one tolerance for all.
    """

    classification: WarmupClass
    calls: Calls
    window_ns: tuple[PositiveNs, ...] = ()
    tolerance: Annotated[float, Field(gt=0, lt=1e6)] | None = None


class Surroundings(Part):
    """Other work of the machine while a process ran: counters, read between calls, as columns of equal length.

    `t_ns` is on the clock of the process's calls. `busy_ns` is the CPU time of all processes and `stolen_ns` that taken
    by the hypervisor, both on the `num_cpus` that the process may use; `own_ns` is the process's own CPU time.
    `waited_ns` is the time that a thread of the process was ready to run and did not: of the thread that waited longest
    since the last reading. An empty column was not counted. The last three count how often the process's control group
    was stopped because its CPU quota was used up.
    """

    num_cpus: PositiveCount
    t_ns: tuple[TimestampNs, ...]
    busy_ns: tuple[TimestampNs, ...] = ()
    own_ns: tuple[TimestampNs, ...] = ()
    stolen_ns: tuple[TimestampNs, ...] = ()
    waited_ns: tuple[TimestampNs, ...] = ()
    num_periods: Count | None = None
    num_throttled_periods: Count | None = None
    throttled_ns: TimestampNs | None = None

    @model_validator(mode="after")
    def _columns_are_equally_long(self) -> Self:
        for name in ("busy_ns", "own_ns", "stolen_ns", "waited_ns"):
            column = getattr(self, name)
            if column and len(column) != len(self.t_ns):
                raise ValueError(f"{len(column)} readings of {name} at {len(self.t_ns)} times")
        if len(self.busy_ns) != len(self.own_ns):
            raise ValueError("busy_ns and own_ns must be given together")
        return self


class WorkDone(Part):
    """Proof that timed calls did the work: after `num_calls` of them the cache was as if the tokens were read untimed.

    `largest_error` is the largest RMS difference of keys or values, in units of their own RMS, outside the timed spans.
    `step_error` is the same for the steps of a decode episode and for the last step's logits, against one call that
    reads all its tokens; None if it was not compared. `short_step_ns` are single steps after a few tokens, which must
    not take longer than those after many.
    """

    num_calls: Count
    largest_error: Annotated[float, Field(ge=0, le=1e6)]
    step_error: Annotated[float, Field(ge=0, le=1e6)] | None = None
    short_step_ns: tuple[PositiveNs, ...] = ()


class ProcessSamples(Part):
    """Everything one fresh latency process measured.

    `clock_span_ns` is the duration of the counted part by each independent clock. `num_shape_nodes` counts the nodes
    that compute lengths from shapes, which ONNX Runtime runs on the CPU even with a card: they are not in
    `nodes_by_provider`. `num_nonfinite_logits` is null if an engine does not show logits.
    """

    process: Count
    load_ns: PositiveNs
    cold_ns: PositiveNs
    warmup: Warmup
    prefill: Calls
    ttft: Calls
    decode: tuple[Episode, ...] = ()
    nodes_by_provider: dict[Text, Count] = {}
    num_shape_nodes: Count = 0
    num_nonfinite_logits: Count | None = 0
    num_distinct_outputs: Count = 0
    involuntary_switches: Count | None = None
    major_page_faults: Count | None = None
    foreign_cpu_share: Annotated[float, Field(ge=0, le=1)] | None = None
    steal_share: Annotated[float, Field(ge=0, le=1)] | None = None
    surroundings: Surroundings | None = None
    clock_span_ns: dict[Word, PositiveNs] = {}
    work_done: WorkDone | None = None
    busy_ns: TimestampNs = 0

    @property
    def prefill_ms(self) -> list[float]:
        """Milliseconds of each counted prefill."""
        return [ns / 1e6 for ns in self.prefill.duration_ns]

    @property
    def ttft_ms(self) -> list[float]:
        """Milliseconds from the request to the first token, for each counted request."""
        return [ns / 1e6 for ns in self.ttft.duration_ns]

    @property
    def decode_tok_per_s(self) -> list[float]:
        """Tokens per second of each decode episode, without its first token."""
        return [rate for episode in self.decode if (rate := episode.tok_per_s) is not None]


class ColdStart(Part):
    """A separate process that started with the artifact's files out of the page cache, if that was possible.

    `page_cache` is the state that the load proved by the bytes it read from the disk, even if another was requested.
    `startup_ns` is the time from the start of the process to its first access to the artifact: interpreter and imports,
    which are never cold here.
    """

    page_cache: Literal["cold", "warm", "unknown"]
    read_bytes: Bytes | None = None
    startup_ns: PositiveNs
    load_ns: PositiveNs
    first_call_ns: PositiveNs


class MemorySeries(Part):
    """Bytes over time in one process, the highest reading of each phase, and the method of reading.

    `spilled_bytes` is the part of a card's memory that was in system memory instead, if the system reports it
    (Windows).
    """

    process: Count
    method: Text
    interval_ms: IntervalMs | None = None
    max_gap_ms: Annotated[float, Field(ge=0, lt=1e12)] | None = None
    baseline_bytes: Bytes
    peak_bytes: PositiveBytes
    phase_peak_bytes: dict[Literal["start", "load", "first_run", "steady"], PositiveBytes] = {}
    phase_start_ns: dict[Literal["start", "load", "first_run", "decode", "steady"], TimestampNs] = {}
    time_ns: tuple[TimestampNs, ...] = ()
    reading_bytes: tuple[Bytes, ...] = ()
    cross_check_method: Text | None = None
    cross_check_bytes: PositiveBytes | None = None
    spilled_bytes: Bytes | None = None

    @model_validator(mode="after")
    def _one_reading_each(self) -> Self:
        if len(self.time_ns) != len(self.reading_bytes):
            raise ValueError(f"{len(self.reading_bytes)} memory readings at {len(self.time_ns)} times")
        return self


class Memory(Part):
    """Memory passes, separate from the timed ones. An empty list means not measured; `*_reason` says why.

    `vram_caveat` says how the figure was obtained if it is not the driver's own figure for that process.
    """

    rss: tuple[MemorySeries, ...] = ()
    vram: tuple[MemorySeries, ...] = ()
    rss_reason: Text | None = None
    vram_reason: Text | None = None
    vram_caveat: Text | None = None

    @property
    def peak_rss_bytes(self) -> int | None:
        """The worst process's peak resident set; None if not measured."""
        return max((series.peak_bytes for series in self.rss), default=None)

    @property
    def peak_vram_bytes(self) -> int | None:
        """The worst process's peak device memory; None if not measured."""
        return max((series.peak_bytes for series in self.vram), default=None)


class TelemetryPoint(Part):
    """One reading of the device while it worked; a value that the device does not offer is null."""

    t_ns: TimestampNs
    process: Count
    sm_clock_mhz: ClockMhz | None = None
    memory_clock_mhz: ClockMhz | None = None
    cpu_clock_mhz: Annotated[float, Field(ge=0, lt=1e6)] | None = None
    temperature_c: Annotated[float, Field(gt=-274, lt=10_000)] | None = None
    power_w: PowerW | None = None
    throttle_reasons: tuple[Text, ...] = ()
    used_bytes: Bytes | None = None
    num_foreign_processes: Count | None = None


class Energy(Part):
    """Energy of a span of decoding: `joules / num_tokens` is `energy_j_per_tok`; each process has its own figure."""

    method: Text
    joules: Annotated[float, Field(gt=0, lt=1e12)]
    num_tokens: Annotated[int, Field(gt=0, lt=2**62)]
    span_s: Annotated[float, Field(gt=0, lt=1e9)]
    process_j_per_tok: tuple[Annotated[float, Field(gt=0, lt=1e12)], ...] = ()


class Check(Part):
    """One validity check: `invalid` means that no number of this record may decide anything."""

    id: Text
    status: CheckStatus
    detail: Text
    value: float | None = None
    limit: float | None = None


class MetricCounts(Part):
    """Right rows of a task by one of its metrics; a row the judge could not decide counts as wrong."""

    num_right: NumRows
    num_rows: Annotated[int, Field(gt=0, lt=2**24)]

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if self.num_right > self.num_rows:
            raise ValueError(f"{self.num_right} right of {self.num_rows} rows")
        return self


def row_bits(right: Sequence[bool]) -> str:
    """Encode which rows were right, in the form of `DomainAccuracy.right_rows`."""
    bits = "".join("01"[is_right] for is_right in right)
    bits += "0" * (-len(bits) % ROWS_PER_DIGIT)
    return f"{int(bits, 2):0{len(bits) // ROWS_PER_DIGIT}x}"


class DomainAccuracy(Part):
    """Right answers of the exported artifact on rows of one split, identified by the hash of their content.

    `num_right` counts by `metric`, `metrics` by each metric of the task. `task_sha256` is the hash of the task file,
    `data_sha256` that of the files with the rows (null: the rows were made by HAVOC, or come from the hub). `few_shot`
    counts the solved rows before every question, and `chat` says whether prompts used the model's chat template.
    `right_rows` holds one bit per row, as hexadecimal digits; the first row is the highest bit of the first digit.
    These fields are null or empty in records older than the fields.
    """

    num_right: NumRows
    num_rows: Annotated[int, Field(gt=0, lt=2**24)]
    num_failed: NumRows = 0
    split: Literal["train", "search", "gate"]
    rows_sha256: Sha256
    source: Text
    seed: Count = 0
    metric: Word | None = None
    metrics: dict[Word, MetricCounts] = {}
    few_shot: Count | None = None
    chat: bool | None = None
    task_sha256: Sha256 | None = None
    data_sha256: Sha256 | None = None
    right_rows: RowBits | None = None

    def is_right(self) -> tuple[bool, ...] | None:
        """Whether each row was right, in the order of the rows in `rows_sha256`; None if only sums are kept."""
        if self.right_rows is None:
            return None
        bits = "".join(f"{int(digit, 16):04b}" for digit in self.right_rows)
        return tuple(bit == "1" for bit in bits[: self.num_rows])

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if self.right_rows is not None:
            right = self.is_right() or ()
            num_digits = -(-self.num_rows // ROWS_PER_DIGIT)
            if len(self.right_rows) != num_digits or sum(right) != self.num_right:
                raise ValueError(
                    f"right_rows has {sum(right)} right of {len(right)} rows, but num_right is {self.num_right}"
                )
        return self

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        if self.num_right + self.num_failed > self.num_rows:
            raise ValueError(f"{self.num_right} right and {self.num_failed} failed of {self.num_rows} rows")
        if self.metrics and (
            self.metric not in self.metrics
            or self.metrics[self.metric].num_right != self.num_right
            or any(counts.num_rows != self.num_rows for counts in self.metrics.values())
        ):
            raise ValueError(
                f"num_right {self.num_right} of {self.num_rows} rows differs from {self.metric} in metrics"
            )
        return self


_ASKED = {"metric": "metric", "task_sha256": "task file", "few_shot": "solved rows", "chat": "chat template"}
"""The fields that a score depends on besides model and rows, with their names for people."""


def asked_apart(one: DomainAccuracy, other: DomainAccuracy) -> str:
    """Name how two scores of one task were asked differently; a field missing in an older record does not count."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in _ASKED}
    return ", ".join(_ASKED[name] for name, pair in pairs.items() if None not in pair and pair[0] != pair[1])


class Provenance(Part):
    """Links to the protocol and to the record before."""

    protocol_sha256: Sha256
    previous_record_sha256: Sha256 | None = None
