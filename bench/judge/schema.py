"""The parts a record is made of: frozen, strictly typed pydantic models with the unit in every name.

Durations are integer nanoseconds (`_ns`) and positive, sizes integer bytes (2 GB is 2,000,000,000 bytes). A value that
could not be measured is null, never 0, NaN or Infinity; numbers that are computed with end where nothing real reaches.
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
    """What wrote the record; commit and dirtiness only where it ran from a checkout."""

    name: Text = "havoc-core"
    version: Text
    git_commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    is_git_dirty: bool | None = None


class FormatCost(Part):
    """What the artifact's formats cost against the exact fold in fp32, as its export measured them on a text.

    KL divergences in nats: `kl_chunks` are the means of equal pieces of neighbouring positions, `kl_mean` is theirs.
    Without `text_sha256` the ids were random.
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
            raise ValueError(f"pieces of {mean:.6g} nats on average and a mean of {self.kl_mean:.6g}")
        if abs(self.top1_share * self.num_positions - self.num_same) > _ROUNDING * self.num_positions:
            raise ValueError(
                f"a share of {self.top1_share!r} of {self.num_positions} positions is not a whole number of them"
            )
        if self.num_positions % len(self.kl_chunks):
            raise ValueError(f"{self.num_positions} positions in {len(self.kl_chunks)} equal pieces")
        if (self.text == "random ids") != (self.text_sha256 is None):
            raise ValueError(f"{self.text} with the SHA-256 {self.text_sha256}")
        return self

    @property
    def num_same(self) -> int:
        """Positions with the same first choice."""
        return round(self.top1_share * self.num_positions)


class EngineVersion(Part):
    """The other engine that ran the model, `llama.cpp` say, and the version of its package."""

    name: Text
    version: Text


class Subject(Part):
    """The artifact that was measured, down to the hash of each of its files.

    With an `engine` it is that engine's model and no artifact of HAVOC: then there is no manifest and no
    `graph_sha256`, and nothing of the model is known but its files and the bytes of its weights.

    `config` and `structure` are its shape and formats in full, what the roofline of a measurement is computed from;
    `graph` is how it was written: dialect, opset, kind of cache; `format_cost` what its formats cost in answers, null
    in records of artifacts that do not say. `is_graph_rebuilt` tells whether its graphs, built anew by HAVOC from
    configuration and structure, are the same bytes; null where that cannot be done, as on a device without onnx-ir.
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
            raise ValueError("an artifact needs graph_sha256; only the model of another engine has none")
        havocs = ("graph_sha256", "manifest_sha256", "format_cost", "is_graph_rebuilt")
        stray = [name for name in havocs if getattr(self, name) is not None]
        if self.engine is not None and stray:
            raise ValueError(f"{', '.join(stray)} of a model that {self.engine.name} ran")
        return self


class Workload(Part):
    """What was asked of the model: tokens are uniform random ids, drawn anew for every call from the seed.

    `decode_tokens` counts the first generated token, which belongs to the prefill and is not timed with the others. Of
    `batch_size` prompts at once, tokens and rates are those of each. A timed prefill, and the one before a first token,
    reads its prompt `passes` times: 2 where a first pass chooses the expert that answers in the second.
    """

    batch_size: PositiveCount = 1
    prompt_tokens: PositiveCount = 512
    context_tokens: PositiveCount = 512
    decode_tokens: Annotated[int, Field(gt=1, lt=2**31)] = 128
    passes: PositiveCount = 1
    ttft_from: Literal["text", "ids"] = "ids"
    seed: Count = 0


class Cpu(Part):
    """Identity of a central processor as its operating system reports it."""

    name: Text
    vendor: Text
    architecture: Text
    family: Text | None = None
    stepping: Text | None = None
    features: tuple[Text, ...] = ()
    num_logical_cores: PositiveCount
    num_usable_cores: PositiveCount


class GpuWitness(Part):
    """One source's word on the card; UUIDs are stored hashed."""

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
    """The processor that ran the model. `fingerprint` is equal for equal devices of equal driver."""

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
    """The machine around the device, without anything that names it.

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

    `kv_cache` is "preallocated" where keys and values stay in buffers bound once, "allocated" where the runtime makes
    new ones at every step, and null in records older than the field.
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
    """Timed calls in order: when each began (ns since the process's first clock reading) and how long it took.

    `cpu_ns` is the CPU time that all threads of the process used during each call; empty where it was not counted.
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
    """One decode run: `num_tokens` generated, of which the first came with the prefill and each other took one step.

    `cpu_ns` is the CPU time of all threads over all steps; null where it was not counted.
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
    """The calls before the counted ones and how the process settled.

    `tolerance` is how far the medians of two windows were allowed to lie apart, as a share: what the scatter of the
    calls explains. Null in records older than the field, whose protocol has one for all.
    """

    classification: WarmupClass
    calls: Calls
    window_ns: tuple[PositiveNs, ...] = ()
    tolerance: Annotated[float, Field(gt=0, lt=1e6)] | None = None


class Surroundings(Part):
    """What else the machine did while a process worked: counters, read between calls, as columns of equal length.

    `t_ns` is on the clock of the process's calls. CPU time that anybody used (`busy_ns`) and that the hypervisor took
    (`stolen_ns`) is that of the `num_cpus` the process may use; `own_ns` is its own. `waited_ns` is the time that one
    of its threads, the one which waited longest since the reading before, was ready to run and did not. An empty column
    was not counted. The last three count how often the process's control group stood still because its CPU quota was
    used up.
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
    """What shows that timed calls did the work: `num_calls` of them left in the cache what the same tokens leave alone.

    `largest_error` is the largest RMS difference of keys or values, in units of their own RMS, outside the timed spans;
    `step_error` is the same of the steps of a decode episode and of the last step's logits, against one call that reads
    all its tokens; None where it was not compared. `short_step_ns` are single steps after a few tokens, which take no
    longer than those after many.
    """

    num_calls: Count
    largest_error: Annotated[float, Field(ge=0, le=1e6)]
    step_error: Annotated[float, Field(ge=0, le=1e6)] | None = None
    short_step_ns: tuple[PositiveNs, ...] = ()


class ProcessSamples(Part):
    """Everything one fresh latency process measured.

    `clock_span_ns` is how long the counted part took by each clock that reached the process by a way of its own.
    `num_shape_nodes` are those that compute lengths from shapes, which ONNX Runtime runs on the CPU beside a card: they
    are not in `nodes_by_provider`. `num_nonfinite_logits` is null where an engine shows no logits.
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
        """Milliseconds from the request to the first token, each counted request."""
        return [ns / 1e6 for ns in self.ttft.duration_ns]

    @property
    def decode_tok_per_s(self) -> list[float]:
        """Tokens per second of each decode episode, its first token excluded."""
        return [rate for episode in self.decode if (rate := episode.tok_per_s) is not None]


class ColdStart(Part):
    """A process of its own that started with the artifact's files out of the page cache, where that could be had.

    `page_cache` is what the load proved by the bytes it fetched from the disk, whatever was asked for. `startup_ns` is
    the time from starting the process to its first look at the artifact: interpreter and imports, never cold here.
    """

    page_cache: Literal["cold", "warm", "unknown"]
    read_bytes: Bytes | None = None
    startup_ns: PositiveNs
    load_ns: PositiveNs
    first_call_ns: PositiveNs


class MemorySeries(Part):
    """Bytes over time in one process, the highest reading of each phase, and how they were read.

    `spilled_bytes` is what of a card's memory lay in the system's instead, where that is told (Windows).
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
    """Memory passes, apart from the timed ones. An empty list means not measured; `*_reason` says why.

    `vram_caveat` is what the figure rests on where it was not the driver's own of that one process.
    """

    rss: tuple[MemorySeries, ...] = ()
    vram: tuple[MemorySeries, ...] = ()
    rss_reason: Text | None = None
    vram_reason: Text | None = None
    vram_caveat: Text | None = None

    @property
    def peak_rss_bytes(self) -> int | None:
        """Worst process's peak resident set, None when not measured."""
        return max((series.peak_bytes for series in self.rss), default=None)

    @property
    def peak_vram_bytes(self) -> int | None:
        """Worst process's peak device memory, None when not measured."""
        return max((series.peak_bytes for series in self.vram), default=None)


class TelemetryPoint(Part):
    """One reading of the device while it worked; what it does not offer is null."""

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
    """Energy of a span of decoding: `joules / num_tokens` is `energy_j_per_tok`, and each process has its own."""

    method: Text
    joules: Annotated[float, Field(gt=0, lt=1e12)]
    num_tokens: Annotated[int, Field(gt=0, lt=2**62)]
    span_s: Annotated[float, Field(gt=0, lt=1e9)]
    process_j_per_tok: tuple[Annotated[float, Field(gt=0, lt=1e12)], ...] = ()


class Check(Part):
    """One validity check: `invalid` means no number of this record may decide anything."""

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
    """Write which rows were right as `DomainAccuracy.right_rows` holds it."""
    bits = "".join("01"[is_right] for is_right in right)
    bits += "0" * (-len(bits) % ROWS_PER_DIGIT)
    return f"{int(bits, 2):0{len(bits) // ROWS_PER_DIGIT}x}"


class DomainAccuracy(Part):
    """Right answers of the exported artifact on rows of one split, named by the hash of their content.

    `num_right` counts by `metric`, `metrics` by each metric of the task. `task_sha256` names what its file says,
    `data_sha256` the files that the rows were read from (null: made here, or from the hub), `few_shot` counts the
    solved rows in front of every question, and `chat` says whether prompts went through the model's chat template.
    `right_rows` holds one bit a row, in hexadecimal digits, the first row in the highest bit of the first. They are
    null or empty in records older than these fields.
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
        """Whether each row was answered right, in the order that `rows_sha256` names; None where only sums are kept."""
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
                    f"right_rows tells of {sum(right)} right of {len(right)} rows, num_right of {self.num_right}"
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
                f"num_right {self.num_right} of {self.num_rows} rows is not what metrics says of {self.metric}"
            )
        return self


_ASKED = {"metric": "metric", "task_sha256": "task file", "few_shot": "solved rows", "chat": "chat template"}
"""What a score depends on beside model and rows, and what each is called."""


def asked_apart(one: DomainAccuracy, other: DomainAccuracy) -> str:
    """Say in what two scores of one task were asked differently; what an older record leaves out is no difference."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in _ASKED}
    return ", ".join(_ASKED[name] for name, pair in pairs.items() if None not in pair and pair[0] != pair[1])


class Provenance(Part):
    """Links to what came before."""

    protocol_sha256: Sha256
    previous_record_sha256: Sha256 | None = None
