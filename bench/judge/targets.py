"""Targets: the device that a release is for, identified exactly, and the limits it must meet, read from TOML.

The bundled `targets.toml` holds `gtx1660` and `host`; `gtx1660-text` and `host-text` for bases that read only text; and
`ci` for HAVOC's own CI. A user's file has the same form: one table per target, which may extend another one (`extends`,
see `target_table.py`). Every limit names its unit, so milliseconds and seconds, or GB and GiB, cannot be mixed up.
Unknown keys are refused, and so are text or true for a number and figures that no device has.

Metrics and the unit each is judged in:

    prefill_ms, ttft_ms       ms     upper confidence bound of a percentile (p90 unless `percentile` says otherwise)
    load_s                    s      slowest process
    decode_tok_per_s          tok/s  lower confidence bound
    peak_vram_bytes, peak_rss_bytes  worst process plus a margin for the sampling gap
    energy_j_per_tok          J/tok  mean over one span
    accuracy/<task>           share  exact one-sided binomial bound
    kl_mean                   nats   upper confidence bound of the mean over pieces of the text
    top1_share                share  exact one-sided binomial bound
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from ...adapt.tasks.names import bundled_tasks
from ...errors import HavocError
from ...export.runtime.devices import DEVICE_KINDS
from ...mistakes import mistakes, nearest
from .metrics import metric_of
from .schema import DeviceName, Part, Sha256, Text
from .target_table import EXTENDS, WITHOUT, whole_entry

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from .record import Record
    from .schema import Workload

BUNDLED = Path(__file__).with_name("targets.toml")
MAX_TARGETS_BYTES = 200_000
MAX_DOTS = 32  # in one line; a dotted key is parsed in quadratic time
MEMORY_MARGIN_SHARE = 0.03

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=1e6, le=1e18)]  # per second: from a microcontroller's to more than any device's
Count = Annotated[int, Field(gt=0, le=10_000_000)]

_ROWS = {"rows", "seed", "rows_sha256", "must_be_pinned"}
_PINS = ("task_sha256", "data_sha256")


def title_of(name: str, workload: Workload | RequiredWorkload | None = None) -> str:
    """Return the title of a metric; that of a prefill with the prompt's length."""
    title = metric_of(name).title
    return f"{title}, {workload.prompt_tokens} tokens" if name == "prefill_ms" and workload is not None else title


class Limit(Part):
    """One bound a release must prove: `below` or `above` in `unit`; `value` gives it in the metric's own unit.

    A limit on accuracy may name the task's file, relative to the targets file, and pin the content of the task's file
    and the data it is scored on by the hashes that a record holds.

    It may also state its rows, so that they cannot be chosen afterwards: their number (`rows`; with another number the
    bound is one that holds for any number of looks), the `seed` of rows that HAVOC makes, and the hash of the rows.
    With `must_be_pinned` only rows count that HAVOC makes itself or that a hash in the limit pins.
    """

    metric: Text
    below: Positive | None = None
    above: Positive | None = None
    unit: Text
    percentile: Annotated[float, Field(ge=0.01, le=0.9999)] = 0.9
    confidence: Annotated[float, Field(ge=0.5, le=0.999999)] = 0.95
    task: Text | None = None
    task_sha256: Sha256 | None = None
    data_sha256: Sha256 | None = None
    rows: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    rows_sha256: Sha256 | None = None
    must_be_pinned: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        metric = metric_of(self.metric)
        if (self.below is None) == (self.above is None):
            raise ValueError(f"{self.metric} needs either `below` or `above`")
        if (self.below is not None) != metric.is_lower_better:
            raise ValueError(f"{self.metric} needs `{'below' if metric.is_lower_better else 'above'}`")
        if self.unit not in metric.scales:
            raise ValueError(f"{self.metric} has no unit {self.unit!r}: choose from {', '.join(metric.scales)}")
        if self.unit == "%" and (written := self.below or self.above or 0.0) < 1:
            raise ValueError(
                f"{self.metric} limit of {written:g} % is under one percent: "
                f'write {100 * written:g}, or {written:g} with unit "share"'
            )
        if metric.kind != "accuracy" and (wrong := sorted({"task", *_PINS} & self.model_fields_set)):
            raise ValueError(f"{self.metric} has no {', '.join(wrong)}: only limits on a task have it")
        if "percentile" in self.model_fields_set and metric.kind != "latency":
            raise ValueError(f"{self.metric} has no percentile")
        if metric.kind != "accuracy" and (stated := sorted(_ROWS & self.model_fields_set)):
            raise ValueError(f"{self.metric} is not judged on rows: leave out {', '.join(stated)}")
        if not metric.lowest <= self.value <= metric.highest:
            raise ValueError(
                f"{self.metric} limit of {self.value:g} {metric.unit} is outside the plausible range "
                f"{metric.lowest:g} to {metric.highest:g} {metric.unit}; check the unit"
            )
        return self

    @property
    def value(self) -> float:
        """The bound in the metric's own unit."""
        written = self.below or self.above or 0.0
        return written * metric_of(self.metric).scales[self.unit]

    @property
    def sign(self) -> str:
        """Give the relation that must hold: "<" or ">"."""
        return "<" if self.below is not None else ">"


class DeviceRule(Part):
    """The device that a record must be from: every given field must be witnessed and exactly equal, not by prefix.

    A `cpu` rule with `is_this_machine` holds for records of the CPU that the gate runs on; a rule with `names` holds
    for those processors, on whatever machine the gate runs.
    """

    kind: DeviceName
    names: tuple[Text, ...] = ()
    is_this_machine: bool = False
    features: tuple[Text, ...] = ()
    pci_device_id: Text | None = None
    compute_capability: Text | None = None
    num_sms: Annotated[int, Field(gt=0)] | None = None
    memory_total_bytes: tuple[int, int] | None = None
    bus_width_bits: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _names_a_device(self) -> Self:
        if self.is_this_machine and (not DEVICE_KINDS[self.kind].is_host or self.names):
            raise ValueError("is_this_machine is only for a cpu without `names`")
        if not self.names and not self.is_this_machine:
            raise ValueError("a device needs `names`, each exactly as its driver reports it")
        gpu_fields = {"pci_device_id", "compute_capability", "num_sms", "memory_total_bytes", "bus_width_bits"}
        if DEVICE_KINDS[self.kind].is_host and (wrong := sorted(gpu_fields & self.model_fields_set)):
            raise ValueError(f"a cpu has no {', '.join(wrong)}")
        return self


class Roofline(Part):
    """The device's peaks on paper; `practical_*` are for estimates only and never prove anything.

    `on_chip_bytes` is the size of caches and registers together: weights in them are not read again. The default is
    larger than that of any card.
    """

    fp32_flop_per_s: Rate
    fp16_flop_per_s: Rate
    bandwidth_bytes_per_s: Rate
    on_chip_bytes: Annotated[float, Field(gt=0, le=1e12)] = 256e6
    practical_fp16_matmul_flop_per_s: Rate | None = None
    practical_share: Annotated[float, Field(ge=1e-3, le=1)] = 0.5

    @property
    def peak_flop_per_s(self) -> float:
        """Return the device's fastest arithmetic of any data type."""
        return max(self.fp32_flop_per_s, self.fp16_flop_per_s)


class RequiredProtocol(Part):
    """The least effort for a verdict on this target; `num_threads` is the required number of threads, if set."""

    min_processes: Annotated[int, Field(gt=0, le=1000)] = 5
    min_samples: Count = 64
    min_busy_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    num_threads: Annotated[int, Field(gt=0, le=10_000)] | None = None


class RequiredWorkload(Part):
    """The work that the limits are for; fields as in a record's workload."""

    batch_size: Count = 1
    prompt_tokens: Count = 512
    context_tokens: Count = 512
    decode_tokens: Annotated[int, Field(gt=1, le=10_000_000)] = 128
    passes: Count = 1


class TargetOrigin(Part):
    """Where a target was read from: the file's name without its folder, and the SHA-256 of its content."""

    file: Text
    sha256: Sha256


class Target(Part):
    """One entry of a targets file; `origin` is set when the file is read, never in the file.

    A record older than `max_age_days` proves nothing any more: drivers and heat change a device. With
    `requires_verification` an artifact counts only if `havoc verify` made it again from its base.
    """

    name: Text
    title: Text
    device: DeviceRule
    roofline: Roofline | None = None
    protocol: RequiredProtocol = RequiredProtocol()
    workload: RequiredWorkload = RequiredWorkload()
    max_age_days: Annotated[float, Field(gt=0, le=36_500)] | None = None
    requires_verification: bool = False
    origin: TargetOrigin | None = None
    limits: Annotated[tuple[Limit, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _limits_each_metric_once(self) -> Self:
        names = [limit.metric for limit in self.limits]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two limits on {', '.join(twice)}")
        return self


def load_target(name: str) -> Target:
    """Return a bundled target by name, or one from a user's TOML file: a path, with `:entry` if it holds several.

    Raises `HavocError` for an unknown name and for a file that is unreadable or not exactly in the documented form.
    """
    bundled = read_targets(BUNDLED)
    if name in bundled:
        return bundled[name]
    is_path = name.endswith(".toml") or _is_file(name)
    path, _, entry = (name, "", "") if is_path else name.rpartition(":")
    if not path or not (path.endswith(".toml") or _is_file(path)):
        raise HavocError(f"unknown target {name!r}: choose from {', '.join(bundled)}, or give the path of a .toml file")
    targets = read_targets(Path(path))
    if not entry and len(targets) == 1:
        return next(iter(targets.values()))
    if entry not in targets:
        raise HavocError(f"{path} holds the targets {', '.join(targets)}: choose one with --target {path}:NAME")
    return targets[entry]


def require_known_tasks(target: Target, names: Collection[str]) -> None:
    """Refuse a limit on a task that is neither bundled nor in `names`, such as a misspelt one."""
    known = [*bundled_tasks(), *names]
    for limit in target.limits:
        prefix, _, task = limit.metric.partition("/")
        if prefix == "accuracy" and limit.task is None and task not in known:
            raise HavocError(
                f"target {target.name}: {limit.metric} is a limit on a task that does not exist; "
                f"{nearest(limit.metric, [f'accuracy/{name}' for name in dict.fromkeys(known)])}"
            )


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a file name
        return False


def read_targets(path: Path) -> dict[str, Target]:
    """Read every target of a TOML file; any other form than the documented one is a one-line `HavocError`."""
    data = _read(path)
    table = _parsed(path, data)
    if not table:
        raise HavocError(f"{path}: holds no target (a table like [my-device])")
    if path != BUNDLED:
        _refuse_reserved(path, table)
    bundled = {} if path == BUNDLED else _parsed(BUNDLED, _read(BUNDLED))
    origin = TargetOrigin(file=path.name[:500], sha256=hashlib.sha256(data).hexdigest())
    return {name: _target_of(path, name, table, bundled).model_copy(update={"origin": origin}) for name in table}


def _refuse_reserved(path: Path, names: Iterable[str]) -> None:
    """Refuse a user's target with a bundled one's name in any spelling: a pass "on gtx1660" means the bundled one."""
    reserved = {_bare(name): name for name in _parsed(BUNDLED, _read(BUNDLED))}
    for name in names:
        if _bare(name) in reserved:
            raise HavocError(
                f"{path}: the name {name!r} belongs to the bundled target {reserved[_bare(name)]}: choose another"
            )


def _bare(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum())


def _target_of(path: Path, name: str, table: Mapping[str, object], bundled: Mapping[str, object]) -> Target:
    entry = table[name]
    if not isinstance(entry, dict):
        raise HavocError(f"{path}: {name} is not a table")
    if "origin" in entry:
        raise HavocError(f"{path}: target {name}: origin: no such key")
    try:
        entry = _with_tasks(whole_entry(name, table, bundled), path.parent)
        return Target.model_validate_json(json.dumps({**entry, "name": name}))  # strict, but a list may be a tuple
    except HavocError as error:
        raise HavocError(f"{path}: target {name}: {error}") from error
    except (RecursionError, ValueError, TypeError) as error:  # not JSON: a date, a number that is too long
        keys = [key for key in (*Target.model_fields, EXTENDS, WITHOUT) if key != "name"]
        raise HavocError(f"{path}: target {name}: {mistakes(error, Target, keys=keys)}") from error


def _with_tasks(entry: dict[str, object], folder: Path) -> dict[str, object]:
    """Read the tasks that limits name: the task file is pinned, and its own limit applies if the target gives none."""
    limits = entry.get("limits")
    if not isinstance(limits, list):
        return entry
    return {**entry, "limits": [_with_task(limit, folder) if isinstance(limit, dict) else limit for limit in limits]}


def _with_task(limit: dict[str, object], folder: Path) -> dict[str, object]:
    prefix, _, name = str(limit.get("metric", "")).partition("/")
    file, has_bound = limit.get("task"), "above" in limit or "below" in limit
    if prefix != "accuracy" or (file is None and (has_bound or name not in bundled_tasks())):
        return limit
    from ...adapt.tasks.task import load_task

    task = load_task(name if file is None else folder / str(file), few_shot=0)
    if task.name != name:
        raise HavocError(f"accuracy/{name} names {file}, which is the file of the task {task.name}")
    above = task.definition.limits.above
    if above is not None and not has_bound:
        limit = {**limit, "above": above, "unit": "share"}
    return limit if file is None else {"task_sha256": task.sha256, **limit}


def require_pinned(target: Target, records: Sequence[Record]) -> None:
    """Refuse records whose accuracy was measured with a task file or on data that the target does not pin."""
    for limit in target.limits:
        name = limit.metric.partition("/")[2]
        for record in records:
            found = record.accuracy.get(name)
            for pin in _PINS if found is not None else ():
                wanted, there = getattr(limit, pin), getattr(found, pin)
                if wanted is not None and there != wanted:
                    is_there = "none" if there is None else there
                    raise HavocError(
                        f"target {target.name}: {limit.metric} is pinned to {pin} {wanted}, but {record.run_id} has "
                        f"{is_there}: score the same file and data, or correct the target"
                    )


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise HavocError(f"{path}: not a file but a folder, pipe or device")
        with path.open("rb") as file:
            data = file.read(MAX_TARGETS_BYTES + 1)
    except OSError as error:
        raise HavocError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise HavocError(f"{str(path)!r}: not a valid file name ({error})") from error
    if len(data) > MAX_TARGETS_BYTES:
        raise HavocError(f"{path}: larger than {MAX_TARGETS_BYTES} bytes; no valid targets file is that large")
    return data


def _parsed(path: Path, data: bytes) -> Mapping[str, object]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if (num_dots := line.count(b".")) > MAX_DOTS and not line.lstrip().startswith(b"#"):
            raise HavocError(
                f"{path}: line {number} has {num_dots} dots, more than {MAX_DOTS}: no valid target is nested that deep"
            )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HavocError(
            f"{path}: not valid TOML ({' '.join(str(error).split())[:200] or 'nested too deep'})"
        ) from error
