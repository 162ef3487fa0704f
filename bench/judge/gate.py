"""The verdict: whether these records prove that every limit of a target is met, on its device, for this artifact.

It needs only the record files. The rules come first (`rules.py`): if one does not hold, no limit is judged. Then each
limit is judged by what its samples prove (`limits.py`). Verdict and exit code; the first that applies counts:

    5  not_measured or invalid   another, unknown, simulated or projected device; an edited record; another artifact
    4  invalid                   the measurement does not measure what it says
    1  fail                      a limit is proven missed
    3  inconclusive              a limit is neither proven met nor missed, or has no samples; or another engine ran it
    0  pass                      every limit is proven met on the target device
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError
from ...export.runtime.artifact import MANIFEST, verify_hashes
from ...storage import unreadable
from . import coherence
from .case import Case, Exit
from .engine_files import hash_files
from .limits import Line, judge_limit, line_without_data
from .metrics import measured, metric_of
from .rules import RULES
from .schema import asked_apart
from .targets import load_target, title_of
from .verdicts import VERDICTS, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...export.runtime.verification import Verified
    from .record import Cpu, Record, Subject
    from .targets import Target

EvidenceClass = Literal["measured_target", "measured_other_device", "projected", "simulated"]

DEVICE_EXIT = 5
NOT_CHECKED = "artifact not checked"
NOT_REBUILT = (
    "the figures meet the limit, but it is not proven that HAVOC built the graphs: run `havoc verify ARTIFACT --out "
    "FILE` where onnx-ir is installed, and gate with --verified FILE"
)
NOT_SHOWN = (
    "{met}, but {engine} is another engine: which graph ran (I21), whether every logit is finite (V07) and whether "
    "timed calls did the work (V32) were not measured, so it cannot pass"
)
ROWS_RULE = "No row counts twice."
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that does not hold: for which record, and why."""

    rule: str
    sentence: str
    reason: str
    run_id: str
    exit_code: Exit
    blocks: Literal["invalid", "not_measured"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured metric: its name, the statistic of its samples, and the value in its unit."""

    metric: str
    title: str
    statistic: str
    unit: str
    value: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with everything it rests on; `unlimited` are measured figures for which the target has no limit.

    `is_artifact_checked`: the artifact's files were hashed for this verdict. `target_file` and `target_sha256` name the
    limits, `signed_by` the keys that signed the records if signatures were asked for.
    """

    target: str
    verdict: Verdict
    evidence: EvidenceClass
    exit_code: int
    reason: str
    lines: tuple[Line, ...]
    findings: tuple[Finding, ...]
    run_ids: tuple[str, ...]
    unlimited: tuple[Figure, ...] = ()
    is_artifact_checked: bool = False
    target_file: str | None = None
    target_sha256: str | None = None
    signed_by: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def judge(
    records: Sequence[Record],
    target: Target,
    *,
    artifact_files: Mapping[str, str] | None = None,
    this_cpu: Cpu | None = None,
    now: datetime | None = None,
    verified: Verified | None = None,
) -> Judgement:
    """Judge records of one artifact on one device against a target.

    A record of another engine never passes, because the rules about HAVOC's own graphs cannot be checked for it.
    `artifact_files` maps the artifact's file names to their SHA-256 if the artifact is at hand: then an artifact passes
    only if its graphs were built again, at the measurement or by `havoc verify`. `this_cpu` is the CPU the gate runs
    on, for targets that ask for it; a record's age is counted up to `now`; `verified` is what `havoc verify` found
    about the artifact. Raises `HavocError` without a record.
    """
    if not records:
        raise HavocError("no record to judge: measure one with `havoc bench`")
    now = now or datetime.now(UTC)
    cases = [
        Case(
            record=record,
            target=target,
            artifact_files=artifact_files,
            this_cpu=this_cpu,
            now=now,
            verified=verified,
        )
        for record in records
    ]
    findings = (*join_findings(records), *(finding for case in cases for finding in rule_findings(case)))
    if findings:
        blocker = max(findings, key=lambda finding: finding.exit_code)
        workload = target.workload
        lines = [line_without_data(limit, blocker.blocks, blocker.reason, workload=workload) for limit in target.limits]
        verdict: Verdict = blocker.blocks
        exit_code, reason = int(blocker.exit_code), f"{blocker.rule}: {blocker.reason}"
    else:
        lines = [judge_limit(limit, records, target.protocol) for limit in target.limits]
        engine = records[0].subject.engine
        if engine is None and artifact_files is not None and not _are_graphs_havocs(records, verified):
            lines = [
                replace(line, verdict="inconclusive", reason=NOT_REBUILT) if line.verdict == "pass" else line
                for line in lines
            ]
        verdict = overall(lines)
        exit_code, reason = EXIT_CODES[verdict], summary(lines)
        if engine is not None and verdict == "pass":
            verdict = "inconclusive"
            exit_code, reason = EXIT_CODES[verdict], NOT_SHOWN.format(met=reason, engine=engine.name)
        elif verdict == "pass" and artifact_files is None:
            reason = f"{reason}; {NOT_CHECKED}"
    return Judgement(
        target=target.name,
        verdict=verdict,
        evidence=evidence_class(records, findings),
        exit_code=exit_code,
        reason=reason,
        lines=tuple(lines),
        findings=findings,
        run_ids=tuple(record.run_id for record in records),
        is_artifact_checked=artifact_files is not None,
        target_file=target.origin.file if target.origin else None,
        target_sha256=target.origin.sha256 if target.origin else None,
        unlimited=figures_without_limit(records, target),
    )


def _are_graphs_havocs(records: Sequence[Record], verified: Verified | None) -> bool:
    """Whether the graphs were built again from configuration and structure with the same bytes."""
    if verified is not None and verified.is_rebuilt:
        return True  # of this artifact: rule I20
    return all(record.subject.is_graph_rebuilt for record in records)


def figures_without_limit(records: Sequence[Record], target: Target) -> tuple[Figure, ...]:
    """Figures of all records together for which the target has no limit; they prove nothing."""
    joined = records[-1].model_copy(
        update={
            "samples": tuple(process for record in records for process in record.samples),
            "memory": records[-1].memory.model_copy(
                update={
                    "rss": tuple(series for record in records for series in record.memory.rss),
                    "vram": tuple(series for record in records for series in record.memory.vram),
                }
            ),
        }
    )
    limited = {limit.metric for limit in target.limits}
    return tuple(
        Figure(name, title_of(name, joined.workload), metric_of(name).statistic, metric_of(name).unit, value)
        for name, value in measured(joined).items()
        if name not in limited and value is not None
    )


def rule_findings(case: Case) -> list[Finding]:
    """Every rule that does not hold for one record."""
    found = ((rule, rule.check(case)) for rule in RULES)
    return [
        Finding(rule.id, rule.sentence, reason, case.record.run_id, rule.exit_code, rule.blocks)
        for rule, reason in found
        if reason is not None
    ]


CIRCUMSTANCES = frozenset({"V03", "V05", "V07", "V09", "V10", "V11", "V12", "V13", "V25", "V26"})
"""Rules about the circumstances of the measurement, which do not depend on the target."""


def why_invalid(record: Record) -> str | None:
    """Why no number of this record may decide anything on any target; None if it may.

    The sentence begins with the id of the rule that does not hold.
    """
    case = Case(record=record, target=load_target("host"))
    found = ((rule.id, rule.check(case)) for rule in RULES if rule.id in CIRCUMSTANCES)
    return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)


def join_findings(records: Sequence[Record]) -> list[Finding]:
    """Reasons why several records may not be judged as one."""
    first = records[0]
    found = []
    if len({record.sha256 for record in records}) < len(records) or len({record.run_id for record in records}) < len(
        records
    ):
        found.append(Finding("J01", "No record counts twice.", "a record is given twice", first.run_id, 5, "invalid"))
    for record in records[1:]:
        different = [name for name, read in _COMMON.items() if read(record) != read(first)]
        if different:
            reason = f"{record.run_id} and {first.run_id} differ in {', '.join(different)}: gate them one by one"
            found.append(Finding("J02", "The records are of one kind.", reason, record.run_id, 5, "invalid"))
    if len(records) > 1 and not found and (copied := coherence.copied_timings(records)):
        found.append(Finding("J04", "No process counts twice.", copied, first.run_id, 5, "invalid"))
    return [*found, *(Finding("J03", ROWS_RULE, reason, first.run_id, 4, "invalid") for reason in rows_apart(records))]


def rows_apart(records: Sequence[Record]) -> list[str]:
    """Sets of rows that contradict each other, or that are equally large, so that neither can stand for both."""
    domains = sorted({domain for record in records for domain in record.accuracy})
    pairs = (
        (domain, one, other)
        for domain in domains
        for one, other in itertools.combinations([r.accuracy[domain] for r in records if domain in r.accuracy], 2)
    )
    found = []
    for domain, one, other in pairs:
        scores = f"{one.num_right} of {one.num_rows} and {other.num_right} of {other.num_rows} right"
        if apart := asked_apart(one, other):
            found.append(f"{domain} was asked in two ways ({apart} differ): gate the records one by one")
        elif one.rows_sha256 == other.rows_sha256:
            if (one.num_right, one.num_rows) != (other.num_right, other.num_rows):
                found.append(f"the same {domain} rows gave {scores}: gate the records one by one")
        elif (one.split, one.num_rows) == (other.split, other.num_rows):
            found.append(f"two sets of {domain} rows gave {scores} and may overlap: measure one larger set with --n")
    return found


_COMMON: dict[str, Callable[[Record], object]] = {
    "engine": lambda record: record.subject.engine,
    "artifact": lambda record: record.subject.files,
    "manifest": lambda record: record.subject.manifest_sha256,
    "weights": lambda record: record.subject.weight_bytes,
    "device": lambda record: record.device.fingerprint,
    "workload": lambda record: record.workload.model_copy(update={"seed": 0}),
    "provider": lambda record: record.protocol.provider,
    "provider options": lambda record: record.protocol.provider_options,
    "keys and values": lambda record: (record.protocol.kv_cache, record.protocol.io_binding),
    "threads": lambda record: record.protocol.num_threads,
    "versions": lambda record: record.host.versions,
}


def overall(lines: Sequence[Line]) -> Literal["pass", "fail", "inconclusive"]:
    """Join the verdicts of all limits: a proven miss outweighs an undecided one, and nothing undecided passes."""
    verdicts = {line.verdict for line in lines}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "inconclusive"


def summary(lines: Sequence[Line]) -> str:
    """One sentence about all limits, the worst first."""
    num_met = sum(line.verdict == "pass" for line in lines)
    worst_first: tuple[Verdict, ...] = ("fail", "inconclusive", "not_measured")
    for verdict in worst_first:
        found = [line for line in lines if line.verdict == verdict]
        if found:
            names = ", ".join(line.metric for line in found)
            because = _disturbed(found) if verdict == "inconclusive" else ""
            return f"{num_met} of {len(lines)} limits proven met; {VERDICTS[verdict].word}: {names}{because}"
    return f"all {len(lines)} limits proven met"


def _disturbed(lines: Sequence[Line]) -> str:
    """Words about disturbed samples for the sentence on undecided limits; empty if there were none."""
    num_disturbed = sum(line.num_disturbed for line in lines)
    num_samples = sum(line.num_samples for line in lines)
    return f" ({num_disturbed} of {num_samples} samples were disturbed: free the machine)" if num_disturbed else ""


def evidence_class(records: Sequence[Record], findings: Sequence[Finding]) -> EvidenceClass:
    """Return what kind of evidence the records are for this target; the weakest record decides."""
    if any(record.evidence == "projected" for record in records):
        return "projected"
    if any(record.evidence == "simulated" or record.device.is_simulated for record in records):
        return "simulated"
    is_other = any(finding.exit_code == DEVICE_EXIT and finding.blocks == "not_measured" for finding in findings)
    return "measured_other_device" if is_other else "measured_target"


def hash_measured(path: Path, subject: Subject) -> dict[str, str]:
    """SHA-256 of every file of the measured model: an artifact's folder, or the model of another engine."""
    return hash_artifact(path) if subject.engine is None else hash_files(path)


def hash_artifact(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact with its manifest, by relative name; every file is read.

    Raises `HavocError` (exit 2) for a folder that is not an artifact or is unreadable, `IdentityError` (exit 5) for a
    changed byte.
    """
    try:
        manifest = verify_hashes(directory)
        return {MANIFEST: manifest.sha256, **{name: file.sha256 for name, file in manifest.files.items()}}
    except OSError as error:
        raise unreadable(error, directory) from error
