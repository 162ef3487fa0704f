"""What must hold before any number of a record may decide: one rule, one id, one sentence, one pure function.

Identity rules (I, exit code 5) ask whether this is the device, the artifact and the kind of evidence the release
claims; validity rules (V, exit code 4) ask whether the measurement measured what it says. Every rule has a known-bad
record and its known-good twin in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import coherence, identity, validity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from ..export.verified import Verified
    from .record import Cpu, Device, Record
    from .targets import Target

Exit = Literal[4, 5]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One record before one target, with what the gate knows of the world.

    That is its own CPU, the artifact's files, and what `havoc verify` found of them.
    """

    record: Record
    target: Target
    artifact_files: Mapping[str, str] | None = None
    this_cpu: Cpu | None = None
    now: datetime | None = None
    verified: Verified | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A named condition; `blocks` is the verdict of every limit while it does not hold."""

    id: str
    sentence: str
    exit_code: Exit
    blocks: Literal["invalid", "not_measured"]
    check: Callable[[Case], str | None]


RULES = (
    Rule("I01", "The record is as it was written.", 5, "invalid", identity.record_is_intact),
    Rule("I02", "The numbers were measured.", 5, "not_measured", identity.evidence_is_measured),
    Rule("I03", "The device is of the target's kind.", 5, "not_measured", identity.device_kind_matches),
    Rule("I04", "The device has exactly the target's name.", 5, "not_measured", identity.device_name_matches),
    Rule(
        "I05",
        "The CPU is this machine's, where the target says so.",
        5,
        "not_measured",
        identity.device_is_this_machine,
    ),
    Rule("I06", "The CPU has the target's instruction sets.", 5, "not_measured", identity.cpu_has_features),
    Rule("I07", "NVML and the CUDA driver agree on the card.", 5, "not_measured", identity.gpu_has_two_witnesses),
    Rule("I08", "NVML and the CUDA driver name one UUID.", 5, "not_measured", identity.gpu_uuid_agrees),
    Rule("I09", "The compute capability is the target's.", 5, "not_measured", identity.gpu_compute_capability_matches),
    Rule("I10", "The number of multiprocessors is the target's.", 5, "not_measured", identity.gpu_num_sms_matches),
    Rule("I11", "The memory size is the target's.", 5, "not_measured", identity.gpu_memory_matches),
    Rule("I12", "The PCI device id is the target's.", 5, "not_measured", identity.gpu_pci_id_matches),
    Rule("I13", "The memory bus is the target's.", 5, "not_measured", identity.gpu_bus_width_matches),
    Rule("I14", "The artifact is the one that was measured.", 5, "invalid", identity.artifact_is_the_measured_one),
    Rule("I15", "The record names its graph among its files.", 5, "invalid", identity.files_hold_the_graph),
    Rule("I16", "The device is the CPU it names.", 5, "invalid", identity.cpu_has_one_name),
    Rule("I17", "The whole card was measured.", 5, "not_measured", identity.gpu_is_whole),
    Rule("I18", "The weights are trained, where accuracy is limited.", 5, "invalid", identity.weights_are_trained),
    Rule("I19", "The record is neither of another age nor too old.", 5, "invalid", identity.record_is_of_its_time),
    Rule(
        "I20", "The artifact was derived again, where the target says so.", 5, "invalid", identity.artifact_is_verified
    ),
    Rule("I21", "The graph is the one that HAVOC writes.", 5, "invalid", identity.graph_is_havocs),
    Rule("V01", "The record was made for a release.", 4, "invalid", validity.purpose_is_release),
    Rule("V02", "The work is what the limits speak of.", 4, "invalid", validity.workload_is_the_targets),
    Rule("V03", "The harness found no fault when it measured.", 4, "invalid", validity.recorded_checks_hold),
    Rule("V04", "Every process is there, once.", 4, "invalid", validity.every_process_is_there),
    Rule("V05", "Every node ran on the provider.", 4, "invalid", validity.every_node_ran_on_the_provider),
    Rule("V06", "Every token was generated and timed.", 4, "invalid", validity.every_token_was_generated),
    Rule("V07", "Every logit is finite.", 4, "invalid", validity.logits_are_finite),
    Rule("V08", "Different inputs gave different outputs.", 4, "invalid", validity.outputs_vary),
    Rule("V09", "The device did not throttle.", 4, "invalid", validity.nothing_throttled),
    Rule("V10", "The clocks were steady.", 4, "invalid", validity.clocks_are_steady),
    Rule("V11", "Nobody else used the device.", 4, "invalid", validity.no_foreign_process),
    Rule("V12", "The CPU was not given away.", 4, "invalid", validity.cpu_was_not_stolen),
    Rule("V13", "No parallel tests ran beside it.", 4, "invalid", validity.not_under_xdist),
    Rule("V14", "The peak memory holds the weights.", 4, "invalid", validity.memory_holds_the_weights),
    Rule("V15", "Two memory methods agree.", 4, "invalid", validity.memory_methods_agree),
    Rule("V16", "Times are in one unit on one clock.", 4, "invalid", validity.clock_is_one),
    Rule("V17", "Nothing was faster than the device can be.", 4, "invalid", validity.not_faster_than_physics),
    Rule("V18", "No timings are copies of others.", 4, "invalid", coherence.no_timings_are_copies),
    Rule("V19", "Busy time is the time of calls.", 4, "invalid", coherence.busy_time_is_that_of_calls),
    Rule("V20", "A first token takes a prefill.", 4, "invalid", coherence.first_token_takes_a_prefill),
    Rule("V21", "A peak is the highest reading.", 4, "invalid", coherence.peak_is_the_highest_reading),
    Rule("V22", "Every domain has its own rows.", 4, "invalid", coherence.domains_have_rows_of_their_own),
    Rule("V23", "The harness checked the measurement.", 4, "invalid", coherence.harness_checks_are_there),
    Rule("V24", "Energy is that of a processor at work.", 4, "invalid", coherence.energy_is_possible),
    Rule("V25", "The CPU did no other work.", 4, "invalid", validity.cpu_was_not_busy),
    Rule("V26", "No CPU quota was used up.", 4, "invalid", validity.quota_was_not_used_up),
    Rule("V30", "Nothing was loaded beside the runtime.", 4, "invalid", validity.nothing_was_loaded_beside),
    Rule("V31", "Clocks that know nothing of each other agree.", 4, "invalid", validity.clocks_agree),
    Rule("V32", "Timed calls did the work.", 4, "invalid", validity.timed_calls_did_the_work),
)


def device_problem(device: Device, target: Target, *, this_cpu: Cpu) -> str | None:
    """Ask the identity rules about a device, before there is any record of it; None where records of it may decide."""
    from .record import Record as AnyRecord

    if device.is_simulated:
        return f"the device is simulated ({'; '.join(device.simulation_reasons)})"
    record = AnyRecord.model_construct(device=device, evidence="measured")
    case = Case(record=record, target=target, this_cpu=this_cpu)
    asked = (rule for rule in RULES if rule.exit_code == 5 and rule.blocks == "not_measured")  # noqa: PLR2004
    return next((reason for rule in asked if (reason := rule.check(case)) is not None), None)
