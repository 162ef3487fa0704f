"""The result of `havoc verify`, as a file that the gate reads: bound to one manifest, and through it to every byte.

    {"format", "manifest_sha256", "is_folded", "is_rebuilt", "checks": [{"name", "finding"}], "sha256"}

`is_folded` says that graphs and weights were made again from base, experts and alpha, and compared. `is_rebuilt` says
this of the graphs; older files do not have it. `sha256` seals the rest against accidents and edits; as with a record,
anyone who computes it again can write another result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...errors import HavocError, IdentityError
from ...storage import read_json, sha256_json, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_FORMAT = "havoc-verified/1"
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One thing that was checked and found right, in words."""

    name: str
    finding: str


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a verification; a failed one has none, for `havoc verify` ends before it writes."""

    manifest_sha256: str
    is_folded: bool
    is_rebuilt: bool


def save_verified(path: Path, verified: Verified, checks: Sequence[Checked]) -> None:
    """Write the file atomically, sealed."""
    document: dict[str, Any] = {
        "format": _FORMAT,
        **asdict(verified),
        "checks": [asdict(check) for check in checks],
    }
    write_json(path, {**document, "sha256": sha256_json(document)})


def load_verified(path: Path) -> Verified:
    """Read the file; one of another form is a `HavocError`, one that was edited an `IdentityError`."""
    document = read_json(path, max_bytes=_MAX_BYTES)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise HavocError(f"{path}: not the result of a verification; write one with `havoc verify ARTIFACT --out FILE`")
    if sha256_json({key: value for key, value in document.items() if key != "sha256"}) != document.get("sha256"):
        raise IdentityError(f"{path}: edited after it was written: its seal does not match; verify the artifact again")
    manifest_sha256, is_folded = document.get("manifest_sha256"), document.get("is_folded")
    is_rebuilt = document.get("is_rebuilt", is_folded)
    if not isinstance(manifest_sha256, str) or not isinstance(is_folded, bool) or not isinstance(is_rebuilt, bool):
        raise HavocError(f"{path}: damaged; verify the artifact again")
    return Verified(manifest_sha256, is_folded=is_folded, is_rebuilt=is_rebuilt)
