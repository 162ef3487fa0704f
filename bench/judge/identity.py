"""Check that a record is from the device and the artifact, and is the kind of evidence, that a release claims.

Each function is one rule of `rules.py`: it returns None if the rule holds, else a sentence with the found and the
wanted value. If the target requires a value that the record does not have, the rule does not hold.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from ...export.runtime.artifact import MANIFEST
from ...export.runtime.devices import DEVICE_KINDS
from .case import Case, rule
from .metrics import metric_of
from .record import seal_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .record import GpuWitness, Subject


_FIRST_DAY = datetime(2025, 1, 1, tzinfo=UTC)
_CLOCK_SKEW = timedelta(days=1)


@rule("I01", "The record is unchanged since it was written.")
def record_is_intact(case: Case) -> str | None:
    """Compare the seal with the content, either as it is or in an older version's form, without newer fields."""
    record = case.record
    if record.sha256 is None:
        return "the record has no seal: write it with `havoc bench`"
    if record.is_intact() or record.sha256 == seal_of(record.model_dump(mode="json", exclude_unset=True)):
        return None
    return "the record was changed after it was written: measure again"


@rule("I02", "The numbers were measured.", blocks="not_measured")
def evidence_is_measured(case: Case) -> str | None:
    """Refuse simulations and projections."""
    record = case.record
    if record.evidence == "measured" and not record.device.is_simulated and not record.device.simulation_reasons:
        return None
    if record.evidence == "measured" and not record.device.is_simulated:
        return f"the record says that its device is simulated ({record.device.simulation_reasons[0]})"
    reasons = "; ".join(record.device.simulation_reasons)
    because = f" ({reasons})" if reasons else ""
    return f"the record is {record.evidence}, not measured{because}: run `havoc bench` on the target"


@rule("I03", "The device has the target's kind.", blocks="not_measured")
def device_kind_matches(case: Case) -> str | None:
    """Compare processor kinds."""
    found, wanted = case.record.device.kind, case.target.device.kind
    return (
        None
        if found == wanted
        else f"measured on a {found} device ({case.record.device.name}), the target is a {wanted} device"
    )


@rule("I04", "The device has exactly the target's name.", blocks="not_measured")
def device_name_matches(case: Case) -> str | None:
    """Compare the name with each allowed one, whole and exact."""
    names, found = case.target.device.names, case.record.device.name
    if not names or found in names or case.record.device.kind != case.target.device.kind:
        return None
    return f"measured on {found!r}, the target is {names[0]!r}: a similar model does not count"


@rule("I05", "The CPU is this machine's, if the target asks for it.", blocks="not_measured")
def device_is_this_machine(case: Case) -> str | None:
    """Compare the record's CPU with the one the gate runs on, if the target asks for it."""
    if not case.target.device.is_this_machine:
        return None
    if case.this_cpu is None:
        return "this machine's CPU could not be identified"
    found, here = case.record.device.cpu, case.this_cpu
    same = ("name", "vendor", "architecture", "family", "features", "num_logical_cores", "num_usable_cores")
    different = [field for field in same if getattr(found, field) != getattr(here, field)]
    if not different:
        return None
    return (
        f"measured on {found.name!r} with {found.num_logical_cores} cores, this machine is {here.name!r} with "
        f"{here.num_logical_cores} ({', '.join(different)} differ): gate it here with a targets file that names its CPU"
    )


@rule("I06", "The CPU has the target's instruction sets.", blocks="not_measured")
def cpu_has_features(case: Case) -> str | None:
    """Require every instruction set that the target names."""
    missing = sorted(set(case.target.device.features) - set(case.record.device.cpu.features))
    return f"the CPU lacks {', '.join(missing)}" if missing else None


@rule("I07", "NVML and the CUDA driver agree on the card.", blocks="not_measured")
def gpu_has_two_witnesses(case: Case) -> str | None:
    """Require that both NVML and the CUDA driver identified the card, and that they agree."""
    gpu = case.record.device.gpu
    if case.target.device.kind != "cuda" or gpu is None:
        return None
    if gpu.nvml is None or gpu.cuda is None:
        return (
            f"{'NVML' if gpu.nvml is None else 'the CUDA driver'} did not identify the card: one witness is not enough"
        )
    if gpu.disagreements:
        return f"NVML and the CUDA driver disagree: {'; '.join(gpu.disagreements)}"
    names = case.target.device.names
    wrong = [witness.name for witness in (gpu.nvml, gpu.cuda) if witness.name not in names]
    return f"a witness reports the card as {wrong[0]!r}" if wrong else None


@rule("I08", "NVML and the CUDA driver report the same UUID.", blocks="not_measured")
def gpu_uuid_agrees(case: Case) -> str | None:
    """Compare the card's identity as reported by the two witnesses."""
    gpu = case.record.device.gpu
    if case.target.device.kind != "cuda" or gpu is None or gpu.nvml is None or gpu.cuda is None:
        return None
    if gpu.nvml.uuid_sha256 is None or gpu.nvml.uuid_sha256 != gpu.cuda.uuid_sha256:
        return "NVML and the CUDA driver do not report the same card (UUID)"
    return None


@rule("I09", "The compute capability is the target's.", blocks="not_measured")
def gpu_compute_capability_matches(case: Case) -> str | None:
    """Compare the compute capability."""
    wanted = case.target.device.compute_capability
    return _each_witness(case, wanted, "compute capability", lambda gpu: gpu.compute_capability)


@rule("I10", "The number of multiprocessors is the target's.", blocks="not_measured")
def gpu_num_sms_matches(case: Case) -> str | None:
    """Compare the number of multiprocessors by the CUDA driver; NVML's, if it reports one, must agree (I07)."""
    gpu, wanted = case.record.device.gpu, case.target.device.num_sms
    if gpu is None or wanted is None:
        return None
    found = gpu.cuda.num_sms if gpu.cuda else None
    others = gpu.nvml.num_sms if gpu.nvml else None
    if others is not None and others != found:
        return f"the card has {others} multiprocessors by NVML and {found} by the CUDA driver"
    return None if found == wanted else f"the card has {found} multiprocessors, the target {wanted}"


@rule("I11", "The memory size is the target's.", blocks="not_measured")
def gpu_memory_matches(case: Case) -> str | None:
    """Require that both witnesses report a memory size within the target's range."""
    gpu, span = case.record.device.gpu, case.target.device.memory_total_bytes
    if gpu is None or span is None:
        return None
    sizes = [witness.memory_total_bytes for witness in (gpu.nvml, gpu.cuda) if witness is not None]
    if sizes and all(size is not None and span[0] <= size <= span[1] for size in sizes):
        return None
    return f"the card's memory is {sizes} bytes, the target's is {span[0]}..{span[1]}"


@rule("I12", "The PCI device id is the target's.", blocks="not_measured")
def gpu_pci_id_matches(case: Case) -> str | None:
    """Compare the PCI device id, which differs between a GTX 1660 and a GTX 1660 SUPER."""
    gpu, wanted = case.record.device.gpu, case.target.device.pci_device_id
    if gpu is None or wanted is None:
        return None
    return (
        None
        if gpu.pci_device_id == wanted
        else f"the card's PCI device id is {gpu.pci_device_id}, the target's {wanted}"
    )


@rule("I13", "The memory bus is the target's.", blocks="not_measured")
def gpu_bus_width_matches(case: Case) -> str | None:
    """Compare the width of the memory bus."""
    gpu, wanted = case.record.device.gpu, case.target.device.bus_width_bits
    if gpu is None or wanted is None:
        return None
    return (
        None if gpu.bus_width_bits == wanted else f"the memory bus has {gpu.bus_width_bits} bits, the target's {wanted}"
    )


@rule("I17", "The whole card was measured.", blocks="not_measured")
def gpu_is_whole(case: Case) -> str | None:
    """Refuse a card that is split into instances: only a part of it was measured."""
    gpu = case.record.device.gpu
    if case.target.device.kind != "cuda" or gpu is None or gpu.mig_mode in (None, "off"):
        return None
    return f"the card's MIG mode is {gpu.mig_mode}, so a part of it was measured: turn it off and measure again"


@rule("I18", "The weights are trained, if the target limits accuracy.")
def weights_are_trained(case: Case) -> str | None:
    """Refuse random weights if the target limits accuracy: their accuracy is not a property of a trained model."""
    limits = [limit.metric for limit in case.target.limits if metric_of(limit.metric).kind == "accuracy"]
    if not (limits and case.record.subject.has_random_weights):
        return None
    return f"the weights are random, but {limits[0]} is a property of a trained model"


@rule("I19", "The record's date is plausible and recent enough.")
def record_is_of_its_time(case: Case) -> str | None:
    """Refuse a date before HAVOC's first version or after today, and a record older than the target allows."""
    text, oldest_days = case.record.created_utc, case.target.max_age_days
    try:
        created = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return f"{text} is not a date"
    if created < _FIRST_DAY:
        return f"made on {text}, before HAVOC's first version: the clock of its machine was wrong"
    if case.now is None:
        return None
    age = case.now - created
    if age < -_CLOCK_SKEW:
        return f"made on {text}, which is {-age.days} days ahead of now: one of the two clocks is wrong"
    if oldest_days is not None and age > timedelta(days=oldest_days):
        days = f"{age.total_seconds() / 86400:.1f}"
        return f"made {days} days ago, but the target allows at most {oldest_days:g} days: measure again"
    return None


@rule("I14", "The artifact is the one that was measured.")
def artifact_is_the_measured_one(case: Case) -> str | None:
    """Compare the SHA-256 of every file of the artifact and of its manifest with the measured ones."""
    return None if case.artifact_files is None else artifact_problem(case.record.subject, case.artifact_files)


@rule("I20", "The artifact was derived again, if the target asks for it.")
def artifact_is_verified(case: Case) -> str | None:
    """Compare the verified artifact with the measured one; a target can require a verification against the base."""
    verified = case.verified
    if verified is not None and verified.manifest_sha256 != case.record.subject.manifest_sha256:
        return "the verified artifact is not the measured one: verify the measured one"
    if not case.target.requires_verification:
        return None
    if verified is None:
        return "the target requires what `havoc verify --base BASE --out FILE` writes: gate with --verified FILE"
    if not verified.is_folded:
        return "verified without its base, so graphs and weights are not proven to be those of an export: give --base"
    return None


@rule("I21", "The graph is the one that HAVOC writes.")
def graph_is_havocs(case: Case) -> str | None:
    """Refuse a graph that differs from the one that HAVOC built again at the measurement."""
    if case.record.subject.is_graph_rebuilt is not False:
        return None
    return (
        "the graph is not the one that HAVOC builds for this configuration, so the figures are those of another "
        "model; export it again with the version of HAVOC that measures"
    )


def artifact_problem(subject: Subject, files: Mapping[str, str]) -> str | None:
    """Say how the files of an artifact, as `hash_artifact` returns them, differ from the measured ones."""
    measured = dict(subject.files)
    if subject.engine is None:
        if subject.manifest_sha256 is None:
            return f"the record has no hash of {MANIFEST}, so the manifest may have been changed: measure again"
        measured[MANIFEST] = subject.manifest_sha256
    for name in sorted(measured.keys() | files.keys()):
        if name not in files:
            return f"{name} was measured but is not in the artifact"
        if name not in measured:
            return f"{name} is in the artifact but was not measured"
        if files[name] != measured[name]:
            return f"{name} is not the file that was measured: its SHA-256 differs"
    return None


@rule("I15", "The record names its graph among its files.")
def files_hold_the_graph(case: Case) -> str | None:
    """Require that the graph that was run is one of the record's files."""
    subject = case.record.subject
    if subject.engine is not None:
        return None if subject.files else "the record names no file of the measured model: measure again"
    if subject.graph_sha256 in subject.files.values():
        return None
    return f"none of the record's {len(subject.files)} files is the graph that was measured: measure again"


@rule("I16", "The device is the CPU that the record names.")
def cpu_has_one_name(case: Case) -> str | None:
    """Compare the two names in the record of a CPU."""
    device = case.record.device
    if not DEVICE_KINDS[device.kind].is_host or device.name == device.cpu.name:
        return None
    return f"the device is called {device.name!r}, its CPU {device.cpu.name!r}"


def _each_witness(case: Case, wanted: str | None, what: str, read: Callable[[GpuWitness], str | None]) -> str | None:
    gpu = case.record.device.gpu
    if gpu is None or wanted is None:
        return None
    found = [read(witness) for witness in (gpu.nvml, gpu.cuda) if witness is not None]
    return (
        None
        if found and all(value == wanted for value in found)
        else f"the card's {what} is {found}, the target's {wanted}"
    )
