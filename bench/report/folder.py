"""Turn a measured folder into pages for people and files for machines.

    report.html    one file, opens offline, no script     report.md     under 60 KB, for a pull request
    junit.xml      one case a limit; undecided = error    badge.json    shields.io endpoint
    telemetry.csv  what the device said of itself         SHA256SUMS    of all of these and the record

`record.json` is needed; `scores.json` (base, experts and mixture by domain) and `front.json` (the search) are shown
where they exist and are of the record's artifact. The same folder gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from ... import storage
from ...errors import HavocError
from ...export.runtime.verification import load_verified
from ..device import identify_cpu
from ..judge.figures import printable
from ..judge.gate import NOT_CHECKED, Judgement, hash_artifact, judge
from ..judge.record import Record, load_record
from ..judge.targets import Target, load_target, require_known_tasks, require_pinned
from . import page
from .search_files import Front, Scores, read_front, read_scores, why_not_its_front, why_not_its_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WRITTEN = ("report.html", "report.md", "junit.xml", "badge.json", "telemetry.csv")
RECORD, SCORES, FRONT, SUMS = "record.json", "scores.json", "front.json", "SHA256SUMS"
MAX_MARKDOWN_BYTES = 60_000
_BADGE_COLOURS = {"pass": "brightgreen", "fail": "red", "inconclusive": "yellow", "invalid": "orange"}
_TELEMETRY_FIELDS = (
    "t_ns",
    "process",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "cpu_clock_mhz",
    "temperature_c",
    "power_w",
    "throttle_reasons",
    "used_bytes",
    "num_foreign_processes",
)


_JUDGEMENT_FIELDS = ("verdict", "reason", "exit_code", "evidence")
_LINE_FIELDS = (
    "verdict",
    "statistic",
    "unit",
    "value",
    "low",
    "high",
    "sign",
    "limit",
    "num_samples",
    "num_processes",
    "num_disturbed",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measured folder, read and judged: the only input of every page. `left_out` says which file is not, and why.

    `target_names` are what `--target` takes, as they were asked for.
    """

    record: Record
    judged: tuple[tuple[Target, Judgement], ...]
    scores: Scores | None = None
    front: Front | None = None
    previous: Record | None = None
    command: str | None = None
    left_out: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()


def write_report(
    directory: Path,
    *,
    targets: Sequence[str] = ("host", "gtx1660"),
    command: str | None = None,
    artifact: Path | None = None,
    verified: Path | None = None,
) -> tuple[Path, list[Judgement]]:
    """Judge `record.json` of a folder against targets and write every page beside it.

    `command` is the line that made the folder, shown as the way to repeat it; with `artifact` its files must be those
    of the record, as `havoc gate --artifact` asks; `verified` is the file that `--verified` names. Returns the HTML
    page and the judgements.
    """
    refuse_links(directory, (*WRITTEN, SUMS))
    run = read_run(directory, targets=targets, command=command, artifact=artifact, verified=verified)
    pages = {
        "report.html": page.html(run).encode(),
        "report.md": _within(page.markdown(run).encode(), MAX_MARKDOWN_BYTES),
        "junit.xml": junit(run),
        "badge.json": storage.canonical_json(badge(run.judged[0][1])) + b"\n",
        "telemetry.csv": telemetry_csv(run.record).encode(),
    }
    for name, data in pages.items():
        storage.write_bytes(directory / name, data)
    storage.write_text(directory / SUMS, checksums(directory))
    return directory / "report.html", [judgement for _, judgement in run.judged]


def refuse_links(directory: Path, names: Sequence[str]) -> None:
    """Refuse to write where a link leads: pages belong into the folder, and what lies elsewhere is not theirs."""
    for path in (directory / name for name in names):
        if path.is_symlink():
            raise HavocError(f"{path}: a link to {str(path.readlink())!r}, and pages stay in their folder: remove it")


def read_run(
    directory: Path,
    *,
    targets: Sequence[str],
    command: str | None = None,
    artifact: Path | None = None,
    verified: Path | None = None,
) -> Run:
    """Read a folder and judge its record, of `artifact` where it is given; `HavocError` without a sound record."""
    if not (directory / RECORD).is_file():
        raise HavocError(f"{directory}: holds no {RECORD}; `havoc bench ARTIFACT --out {directory}` writes one")
    record = load_record(directory / RECORD)
    cpu, files = identify_cpu(), None if artifact is None else hash_artifact(artifact)
    found = None if verified is None else load_verified(verified)
    loaded = [load_target(name) for name in targets]
    for target in loaded:
        require_known_tasks(target, list(record.accuracy))
        require_pinned(target, [record])
    scores, front = read_scores(directory / SCORES), read_front(directory / FRONT)
    no_scores = None if scores is None else why_not_its_scores(scores, record)
    no_front = None if front is None else why_not_its_front(front, record)
    return Run(
        record=record,
        judged=tuple(
            (target, judge([record], target, artifact_files=files, this_cpu=cpu, verified=found)) for target in loaded
        ),
        scores=None if no_scores else scores,
        front=None if no_front else front,
        previous=_previous(directory, record),
        command=command,
        target_names=tuple(targets),
        left_out=tuple(
            f"{what} beside the record is left out: {why}."
            for what, why in ((f"{SCORES} (accuracy by domain)", no_scores), (f"{FRONT} (the search)", no_front))
            if why
        ),
    )


def _previous(directory: Path, record: Record) -> Record | None:
    """Find the record this one names as its predecessor among the neighbouring runs."""
    wanted = record.provenance.previous_record_sha256
    if wanted is None:
        return None
    for path in sorted(path for path in directory.resolve().parent.glob(f"*/{RECORD}") if path.is_file()):
        try:
            candidate = load_record(path)
        except HavocError:
            continue
        if candidate.sha256 == wanted:
            return candidate
    return None


def junit(run: Run) -> bytes:
    """One suite a target, one case a limit: missed is a failure; undecided, invalid and not measured are errors.

    Verdict and reason are the first properties of a suite, what has no limit the last; a case has its figures.
    """
    root = ET.Element("testsuites", name="havoc gate")
    for target, judgement in run.judged:
        outcomes = [_junit_outcome(line.verdict) for line in judgement.lines]
        suite = ET.SubElement(root, "testsuite", name=printable(target.name), tests=str(len(outcomes)), skipped="0")
        suite.set("failures", str(outcomes.count("fail")))
        suite.set("errors", str(outcomes.count("error")))
        others = {f"{item.metric}, {item.statistic}, {item.unit}": item.value for item in judgement.unlimited}
        checked = {
            "artifact": "checked" if judgement.is_artifact_checked else NOT_CHECKED,
            "target file": judgement.target_file,
            "target SHA-256": judgement.target_sha256,
        }
        _junit_properties(suite, {name: getattr(judgement, name) for name in _JUDGEMENT_FIELDS} | checked | others)
        for line, outcome in zip(judgement.lines, outcomes, strict=True):
            case = ET.SubElement(suite, "testcase", classname=f"havoc.{printable(target.name)}", name=line.metric)
            _junit_properties(case, {name: getattr(line, name) for name in _LINE_FIELDS})
            if outcome != "pass":
                kind = "failure" if outcome == "fail" else "error"
                ET.SubElement(case, kind, type=line.verdict, message=printable(line.reason)).text = printable(
                    judgement.reason
                )
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root) + b"\n"


def _junit_properties(parent: ET.Element, values: Mapping[str, object]) -> None:
    """Add names and values, those that are not known left out."""
    properties = ET.SubElement(parent, "properties")
    for name, value in values.items():
        if value is not None:
            ET.SubElement(properties, "property", name=printable(name), value=printable(str(value)))


def _junit_outcome(verdict: str) -> str:
    return verdict if verdict in {"pass", "fail"} else "error"


def badge(judgement: Judgement) -> dict[str, object]:
    """Return a shields.io endpoint document for the first target."""
    unchecked = f", {NOT_CHECKED}" if judgement.verdict == "pass" and not judgement.is_artifact_checked else ""
    return {
        "schemaVersion": 1,
        "label": f"havoc {judgement.target}",
        "message": judgement.verdict.replace("_", " ") + unchecked,
        "color": _BADGE_COLOURS.get(judgement.verdict, "lightgrey"),
    }


def telemetry_csv(record: Record) -> str:
    """One line a reading; what the device does not offer stays empty, and no text of its driver is a formula."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_TELEMETRY_FIELDS)
    for point in record.telemetry:
        row = [getattr(point, field) for field in _TELEMETRY_FIELDS]
        writer.writerow([_as_text(";".join(value)) if isinstance(value, tuple) else value for value in row])
    return buffer.getvalue()


def _as_text(cell: str) -> str:
    """Mark a cell that a spreadsheet would carry out as the text it is."""
    safe = printable(cell)
    return f"'{safe}" if safe.startswith(("=", "+", "-", "@")) else safe


def checksums(directory: Path) -> str:
    """Lines for `sha256sum --check`: the record, what was measured with it, and the pages."""
    names = [name for name in (RECORD, SCORES, FRONT, *WRITTEN) if (directory / name).is_file()]
    return "".join(f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def _within(data: bytes, limit_bytes: int) -> bytes:
    """Cut a page at a line end so that it fits where a comment's size is limited, and say so."""
    if len(data) <= limit_bytes:
        return data
    note = b"\n\n(cut here: the whole report is report.html)\n"
    kept = data[: limit_bytes - len(note)]
    return kept[: kept.rfind(b"\n")] + note
