"""The results of one measurement session, as one sealed JSON file.

A record holds raw samples, memory, telemetry, identity and provenance, but no statistic and no verdict: those are
computed when it is read. The seal is the SHA-256 over the canonical JSON of everything else: it detects accidents and
edits, not a determined forger. The parts are defined in `schema.py` and re-exported here.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ... import storage
from ...errors import HavocError, IdentityError
from ...mistakes import mistakes
from .schema import (
    Calls,
    Check,
    ColdStart,
    Cpu,
    Device,
    DomainAccuracy,
    Energy,
    Episode,
    Evidence,
    FormatCost,
    Gpu,
    GpuWitness,
    Host,
    Memory,
    MemorySeries,
    Part,
    ProcessSamples,
    Protocol,
    Provenance,
    Purpose,
    Sha256,
    Subject,
    Surroundings,
    TaskName,
    TelemetryPoint,
    Tool,
    Warmup,
    Workload,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MAX_RECORD_BYTES",
    "SCHEMA_VERSION",
    "Calls",
    "Check",
    "ColdStart",
    "Cpu",
    "Device",
    "DomainAccuracy",
    "Energy",
    "Episode",
    "Evidence",
    "FormatCost",
    "Gpu",
    "GpuWitness",
    "Host",
    "Memory",
    "MemorySeries",
    "ProcessSamples",
    "Protocol",
    "Provenance",
    "Purpose",
    "Record",
    "Subject",
    "Surroundings",
    "TelemetryPoint",
    "Tool",
    "Warmup",
    "Workload",
    "json_schema",
    "load_record",
    "seal_of",
]

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 64_000_000


class Record(Part):
    """One measurement session. Build it, then call `sealed()`; `load_record` returns only intact records."""

    schema_version: Literal[1] = 1
    run_id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9\-]{0,79}$")]
    created_utc: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    tool: Tool
    evidence: Evidence
    purpose: Purpose
    subject: Subject
    workload: Workload
    device: Device
    host: Host
    protocol: Protocol
    samples: tuple[ProcessSamples, ...] = ()
    cold_start: ColdStart | None = None
    memory: Memory = Memory()
    telemetry: tuple[TelemetryPoint, ...] = ()
    energy: Energy | None = None
    checks: tuple[Check, ...] = ()
    accuracy: dict[TaskName, DomainAccuracy] = Field(default_factory=dict)
    provenance: Provenance
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _simulation_is_admitted(self) -> Self:
        if self.device.is_simulated and self.evidence == "measured":
            raise ValueError("a simulated device cannot give measured evidence")
        return self

    def sealed(self) -> Record:
        """Return the same record with `sha256` set to the hash of everything else."""
        return self.model_copy(update={"sha256": seal_of(self.document())})

    def is_intact(self) -> bool:
        """Whether the record has a seal that matches the content."""
        return self.sha256 is not None and self.sha256 == seal_of(self.document())

    def document(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Write the record atomically, sealed."""
        document = (self if self.is_intact() else self.sealed()).document()
        storage.write_bytes(path, json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def seal_of(document: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a record's document without its own `sha256`."""
    return storage.sha256_json(_content_of(document))


def _content_of(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "sha256"}


def load_record(path: Path) -> Record:
    """Read a record and check its seal.

    Raises `HavocError` (exit 2) for a file that is not a record with a known schema, `IdentityError` (exit 5) for one
    whose content no longer matches its seal.
    """
    _refuse_no_file(path)
    document = storage.read_json(path, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(document, dict) or "schema_version" not in document:
        raise HavocError(f"{path}: not a HAVOC record (no schema_version)")
    _refuse_newer(path, document["schema_version"])
    try:
        sealed = storage.canonical_json(_content_of(document))  # as long as the record: made once, hashed and parsed
        record = Record.model_validate_json(sealed)
    except (ValueError, RecursionError) as error:
        said = mistakes(error, Record, is_handwritten=False)
        raise HavocError(f"{path}: not a valid record: {said}") from error
    if document.get("sha256") != hashlib.sha256(sealed).hexdigest():
        raise IdentityError(
            f"{path}: the record was changed after it was written (its seal does not match); measure again"
        )
    return record.model_copy(update={"sha256": document["sha256"]})


def _refuse_no_file(path: Path) -> None:
    """Refuse a path that would block reading for ever (a pipe) or never end (a device)."""
    try:
        is_other = path.exists() and not path.is_file()
    except OSError as error:
        raise storage.unreadable(error, path) from error
    if is_other:
        raise HavocError(f"{path}: not a file but a folder, pipe or device; give the record.json itself")


def _refuse_newer(path: Path, version: object) -> None:
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise HavocError(
            f"{path}: record schema {version} is newer than this program's {SCHEMA_VERSION}; update havoc-core"
        )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema that is published beside this file as `record.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Record.model_json_schema()}


if __name__ == "__main__":  # python -m havoc_core.bench.judge.record: write the schema again
    from pathlib import Path

    storage.write_json(Path(__file__).with_name("record.schema.json"), json_schema())
