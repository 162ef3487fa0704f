"""Read an artifact on the device: its manifest, its files, their hashes. No torch, no onnx; it writes nothing.

A folder is untrusted input. So names in the manifest must be plain relative paths; every file must be a regular file
with one name (no symbolic or hard link may lead the runtime out of the folder); the weights of every graph must be in
listed files; the folder has no unlisted file that a runtime would read; and every byte is hashed before a session opens
it. pydantic is not used, because a process that is measured reads the manifest too (docs/decisions/0020).
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import HavocError, IdentityError
from ...storage import parse_json, read_bounded, sha256_file, unreadable
from .companions import CHAT_TEMPLATES, TOKENIZER_FILES
from .external import external_locations
from .live_table import LiveTable, parse_live, weights_of

if TYPE_CHECKING:
    from collections.abc import Mapping

MANIFEST = "manifest.json"
SIGNATURE = "model.sig"
FORMAT_NAME = "havoc-artifact"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16_000_000

_T = TypeVar("_T")
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")  # as a record keeps it
_MAX_NAME_CHARS, _MAX_TEXT_CHARS, _MAX_COUNT = 200, 500, 2**62
READ_BY_RUNTIMES = frozenset(
    {
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "processor_config.json",
        *TOKENIZER_FILES,
        *CHAT_TEMPLATES,
    }
)
"""Files that tell a runtime how the model is built, how text becomes token ids, and when an answer ends."""

_REQUIRED = ("config.json", "model.onnx", "model.onnx.data")


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """The manifest's facts about one file."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ArtifactManifest:
    """The manifest of an artifact: its sources, its storage, and the hash of every other file.

    `sha256` is that of the file it was read from, so it covers the whole content; "" if it is not written yet.
    """

    files: dict[str, ArtifactFile]
    base_hash: str
    base_name: str
    has_random_weights: bool
    alpha: dict[str, float]
    rule: str
    expert_hashes: dict[str, str]
    structure: dict[str, str]
    graph: dict[str, Any]
    versions: dict[str, str]
    num_parameters: int
    fingerprint: dict[str, Any]
    parity: dict[str, Any]
    format_cost: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    live: LiveTable | None = None
    sha256: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """The document that `read_manifest` reads back."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "base": {"name": self.base_name, "hash": self.base_hash, "random_weights": self.has_random_weights},
            "mixture": {"alpha": self.alpha, "rule": self.rule, "expert_hashes": self.expert_hashes},
            "structure": self.structure,
            "graph": self.graph,
            "versions": self.versions,
            "num_parameters": self.num_parameters,
            "fingerprint": self.fingerprint,
            "parity": self.parity,
            **({} if self.format_cost is None else {"format_cost": self.format_cost}),
            **({} if self.calibration is None else {"calibration": self.calibration}),
            **({} if self.live is None else {"live": self.live.to_json()}),
            "files": {
                name: {"sha256": file.sha256, "num_bytes": file.num_bytes} for name, file in sorted(self.files.items())
            },
        }


def refuse_artifact(model: Path | str) -> None:
    """Refuse an artifact if a base with its experts is needed, by `HavocError`."""
    if (Path(model) / MANIFEST).is_file():
        raise HavocError(
            f"{model}: an artifact holds one mixture, so there is no expert to choose: give its base instead"
        )


def read_manifest(directory: Path) -> ArtifactManifest:
    """Parse `manifest.json`; a folder without one, or with one that is cut short, is a `HavocError`."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise HavocError(f"{directory}: no such artifact directory")
    if not path.is_file():
        raise HavocError(
            f"{directory}: not an artifact (no {MANIFEST}); an interrupted export leaves none, so run it again"
        )
    try:
        data = read_bounded(path, max_bytes=MAX_MANIFEST_BYTES)
    except OSError as error:
        raise unreadable(error, path) from error
    document = parse_json(data, path)
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        raise HavocError(f"{path}: not the manifest of a HAVOC artifact")
    if document.get("format_version") != FORMAT_VERSION:
        raise HavocError(
            f"{path}: format version {document.get('format_version')!r}; this HAVOC reads {FORMAT_VERSION}"
        )
    try:
        return _parse(document, sha256=hashlib.sha256(data).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise HavocError(
            f"{path}: damaged manifest ({type(error).__name__}: {error}); export the artifact again"
        ) from error


def _parse(document: dict[str, Any], *, sha256: str) -> ArtifactManifest:
    base, mixture = document["base"], document["mixture"]
    manifest = ArtifactManifest(
        files={_plain_name(name): _parse_file(entry) for name, entry in document["files"].items()},
        base_hash=_hash(base["hash"]),
        base_name=_text(base["name"]),
        has_random_weights=_typed(base["random_weights"], bool),
        alpha={_text(domain): _finite(weight) for domain, weight in mixture["alpha"].items()},
        rule=_text(mixture["rule"]),
        expert_hashes={_text(domain): _hash(value) for domain, value in mixture["expert_hashes"].items()},
        structure={_text(key): _text(value) for key, value in document["structure"].items()},
        graph={_text(key): value for key, value in document["graph"].items()},
        versions={_text(key): _text(value) for key, value in document["versions"].items()},
        num_parameters=_count(document["num_parameters"]),
        fingerprint=_typed(document["fingerprint"], dict),
        parity=_typed(document["parity"], dict),
        format_cost=_typed(document["format_cost"], dict) if "format_cost" in document else None,
        calibration=_typed(document["calibration"], dict) if "calibration" in document else None,
        sha256=sha256,
    )
    if "live" in document:
        sizes = {name: file.num_bytes for name, file in manifest.files.items()}
        manifest = replace(manifest, live=parse_live(document["live"], list(manifest.alpha), manifest.rule, sizes))
    if set(manifest.alpha) != set(manifest.expert_hashes):
        raise ValueError("alpha and expert_hashes name different domains")
    missing = [name for name in _REQUIRED if name not in manifest.files]
    if missing:
        raise ValueError(f"{', '.join(missing)} not listed")
    return manifest


def _parse_file(entry: dict[str, Any]) -> ArtifactFile:
    num_bytes = entry["num_bytes"]
    if type(num_bytes) is not int or not 0 <= num_bytes < _MAX_COUNT:
        raise ValueError(f"num_bytes is {num_bytes!r}")
    return ArtifactFile(sha256=_hash(entry["sha256"]), num_bytes=num_bytes)


def _typed(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} is not of type {kind.__name__}")
    return value


def _text(value: object) -> str:
    text = _typed(value, str)
    if len(text) > _MAX_TEXT_CHARS:
        raise ValueError(f"a text of {len(text)} characters; HAVOC reads at most {_MAX_TEXT_CHARS}")
    return text


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.80} is not a finite number")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_COUNT:
        raise ValueError(f"num_parameters is {value!r:.80}")
    return value


def _hash(value: object) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"{value!r:.80} is not a SHA-256")
    return value


def _plain_name(name: str) -> str:
    """Refuse names that lead out of the folder, and names that a record cannot hold."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME_CHARS:
        raise ValueError(f"{name!r:.80} is not a plain relative path of letters, digits and . _ -")
    return name


def asked_alpha(manifest: ArtifactManifest, alpha: Mapping[str, float] | None, *, where: str) -> dict[str, float]:
    """The weight of each expert at which an artifact is to be opened; None takes the manifest's.

    Asking an artifact that is not live for a mixture is a `HavocError`, even for its own: see also `weights_of`.
    """
    if alpha is None:
        return dict(manifest.alpha)
    if manifest.live is None:
        raise HavocError(f"{where} holds one mixture, folded: export it with --live to choose another alpha")
    return weights_of(manifest.alpha, alpha, where=where)


def check_files(directory: Path, manifest: ArtifactManifest) -> None:
    """Raise unless every listed file is a regular file of the listed size inside the folder, with no other name.

    Cheap (no hashing): what must hold before the runtime maps the files. A missing file is a `HavocError`, a link
    too, and so is a graph with weights in a file that is not listed; a file of another size is an `IdentityError`.
    """
    _check_kinds(directory, manifest)
    _require_listed_weights(directory, manifest)


def _check_kinds(directory: Path, manifest: ArtifactManifest) -> None:
    for name, expected in manifest.files.items():
        path = directory / name
        _refuse_links(directory, name)
        try:
            status = path.lstat()
        except OSError as error:
            raise HavocError(
                f"{path}: listed in {MANIFEST} but {error.strerror or 'missing'}; copy or export the artifact again"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise HavocError(f"{path}: not a regular file")
        if status.st_nlink != 1:
            raise HavocError(
                f"{path}: has {status.st_nlink} hard links; copy the artifact's files instead of linking them"
            )
        if status.st_size != expected.num_bytes:
            raise IdentityError(f"{path}: {status.st_size} bytes, the manifest says {expected.num_bytes}")
    _refuse_unlisted(directory, manifest)


def _refuse_links(directory: Path, name: str) -> None:
    path = directory
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            raise HavocError(f"{path}: a symbolic link; an artifact holds regular files only")


def _refuse_unlisted(directory: Path, manifest: ArtifactManifest) -> None:
    """Refuse a file that a runtime would read but the manifest does not list: it would never be hashed."""
    for path in sorted(directory.iterdir()):
        is_read = path.name.endswith((".onnx", ".data")) or path.name in READ_BY_RUNTIMES
        if is_read and path.name not in manifest.files:
            raise HavocError(f"{path}: not listed in {MANIFEST}; remove it")


def _require_listed_weights(directory: Path, manifest: ArtifactManifest) -> None:
    """Refuse weights in a file that the manifest does not list: they would never be hashed."""
    for name in manifest.files:
        if not name.endswith(".onnx"):
            continue
        for location in sorted(external_locations(directory / name)):
            home = str(PurePosixPath(name).parent / location)
            if home not in manifest.files or str(PurePosixPath(location)) != location:
                msg = f"{directory / name}: takes weights from {location[:200]!r}, which {MANIFEST} does not list"
                raise HavocError(f"{msg}; export the artifact again")


def verify_hashes(directory: Path, manifest: ArtifactManifest | None = None) -> ArtifactManifest:
    """Check and hash every file; a differing byte is an `IdentityError` that names the file."""
    manifest = manifest or read_manifest(directory)
    _check_kinds(directory, manifest)
    for name, expected in manifest.files.items():
        actual = sha256_file(directory / name)
        if actual != expected.sha256:
            hashes = f"SHA-256 is {actual[:16]}..., the manifest says {expected.sha256[:16]}..."
            raise IdentityError(f"{directory / name}: the file was changed ({hashes})")
    _require_listed_weights(directory, manifest)
    return manifest


def refuse_files_of_others(directory: Path) -> None:
    """Refuse to replace an artifact if its folder also holds files that HAVOC did not write: they would be lost.

    Names that begin with a dot belong to the system or a downloader and are ignored. A folder without a manifest, or
    with a damaged one, is not checked here: a new export repairs it.
    """
    try:
        manifest = read_manifest(directory)
    except HavocError:
        return
    ours = {MANIFEST, SIGNATURE, *manifest.files}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not name.startswith(".") and not path.is_dir() and name not in ours:
            raise HavocError(
                f"{directory} also holds {name}, which HAVOC did not write: move it away or choose another --out"
            )
