"""Turn a measured folder into pages for people and files for machines.

    report.html    one file, opens offline, no script     report.md     under 60 KB, for a pull request
    junit.xml      one case per limit; undecided = error  badge.json    shields.io endpoint
    telemetry.csv  the readings of the device             SHA256SUMS    of all of these and the record

`record.json` is required; `scores.json` (base, experts and mixture by domain) and `front.json` (the search) are shown
if they exist and belong to the record's artifact. The same folder gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from ... import storage
from ...errors import HavocError
from ..judge.figures import printable
from ..judge.gate import NOT_CHECKED, Judgement
from ..judge.verdicts import VERDICTS, spelled
from . import page
from .run import FRONT, RECORD, SCORES, Run, read_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..judge.record import Record

WRITTEN = ("report.html", "report.md", "junit.xml", "badge.json", "telemetry.csv")
SUMS = "SHA256SUMS"
MAX_MARKDOWN_BYTES = 60_000
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


def write_report(
    directory: Path,
    *,
    targets: Sequence[str] = ("host", "gtx1660"),
    command: str | None = None,
    artifact: Path | None = None,
    verified: Path | None = None,
) -> tuple[Path, list[Judgement]]:
    """Judge `record.json` of a folder against targets and write every page beside it.

    `command` is the command line that made the folder; pages show it as the way to repeat the run. If `artifact` is
    given, its files must be those of the record, as with `havoc gate --artifact`. `verified` is the file that
    `--verified` names. Returns the HTML page and the judgements.
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
    """Refuse to write through a link: pages are written only into the folder itself."""
    for path in (directory / name for name in names):
        if path.is_symlink():
            raise HavocError(
                f"{path}: this is a link to {str(path.readlink())!r}, but pages are written only into their own "
                "folder: remove the link"
            )


def junit(run: Run) -> bytes:
    """One suite per target, one case per limit: missed is a failure; undecided, invalid and not measured are errors.

    The first properties of a suite are verdict and reason, the last are figures without a limit; a case has its
    figures.
    """
    root = ET.Element("testsuites", name="havoc gate")
    for target, judgement in run.judged:
        outcomes = [VERDICTS[line.verdict].junit for line in judgement.lines]
        suite = ET.SubElement(root, "testsuite", name=printable(target.name), tests=str(len(outcomes)), skipped="0")
        suite.set("failures", str(outcomes.count("failure")))
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
            if outcome is not None:
                ET.SubElement(case, outcome, type=line.verdict, message=printable(line.reason)).text = printable(
                    judgement.reason
                )
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root) + b"\n"


def _junit_properties(parent: ET.Element, values: Mapping[str, object]) -> None:
    """Add names and values; unknown values are left out."""
    properties = ET.SubElement(parent, "properties")
    for name, value in values.items():
        if value is not None:
            ET.SubElement(properties, "property", name=printable(name), value=printable(str(value)))


def badge(judgement: Judgement) -> dict[str, object]:
    """Return a shields.io endpoint document for the first target."""
    unchecked = f", {NOT_CHECKED}" if judgement.verdict == "pass" and not judgement.is_artifact_checked else ""
    return {
        "schemaVersion": 1,
        "label": f"havoc {judgement.target}",
        "message": spelled(judgement.verdict) + unchecked,
        "color": VERDICTS[judgement.verdict].badge,
    }


def telemetry_csv(record: Record) -> str:
    """One line per reading; a value that the device does not offer is empty, and texts never become formulas."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_TELEMETRY_FIELDS)
    for point in record.telemetry:
        row = [getattr(point, field) for field in _TELEMETRY_FIELDS]
        writer.writerow([_as_text(";".join(value)) if isinstance(value, tuple) else value for value in row])
    return buffer.getvalue()


def _as_text(cell: str) -> str:
    """Mark a cell as text if a spreadsheet would execute it as a formula."""
    safe = printable(cell)
    return f"'{safe}" if safe.startswith(("=", "+", "-", "@")) else safe


def checksums(directory: Path) -> str:
    """Lines for `sha256sum --check`: the record, the files measured with it, and the pages."""
    names = [name for name in (RECORD, SCORES, FRONT, *WRITTEN) if (directory / name).is_file()]
    return "".join(f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def _within(data: bytes, limit_bytes: int) -> bytes:
    """Cut a page at a line end so that it fits into the limit of a comment, and say so."""
    if len(data) <= limit_bytes:
        return data
    note = b"\n\n(cut here: the whole report is report.html)\n"
    kept = data[: limit_bytes - len(note)]
    return kept[: kept.rfind(b"\n")] + note
