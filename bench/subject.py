"""Which artifact was measured: every file's hash, checked anew, and what its manifest says it is."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath

from pydantic import ValidationError

from ..errors import HavocError, IdentityError
from ..export.artifact import ArtifactManifest, verify_hashes
from ..model.config import HavocConfig
from .schema import FormatCost, Subject

_MAX_PLACE_CHARS = 80


def identify_subject(artifact: Path) -> Subject:
    """Hash every file of an artifact and describe it.

    Raises `HavocError` for a folder that is no artifact, `IdentityError` for one whose bytes are not its manifest's.
    """
    try:
        manifest = verify_hashes(artifact)
    except OSError as error:
        raise HavocError(f"{error.filename or artifact}: {error.strerror or error}") from error
    weight_bytes = sum(file.num_bytes for name, file in manifest.files.items() if name.endswith(".data"))
    if weight_bytes == 0:
        raise HavocError(f"{artifact}: the artifact holds no weights")
    try:
        return _described(artifact, manifest, weight_bytes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:_MAX_PLACE_CHARS]
        raise HavocError(f"{artifact}: no record can hold this artifact ({where}: {first['msg']})") from error


def _described(artifact: Path, manifest: ArtifactManifest, weight_bytes: int) -> Subject:
    opset = manifest.graph.get("opset")
    return Subject(
        name=PurePath(manifest.base_name).name[:200] or "unnamed",
        files={name: file.sha256 for name, file in manifest.files.items()},
        graph_sha256=manifest.files["model.onnx"].sha256,
        num_parameters=manifest.num_parameters,
        weight_bytes=weight_bytes,
        weight_format=manifest.structure.get("weight_format", "unknown"),
        activation_dtype=manifest.structure.get("activation_dtype", "unknown"),
        opset=opset if type(opset) is int else None,
        base_hash=manifest.base_hash,
        alpha=dict(manifest.alpha) or None,
        rule=manifest.rule,
        has_random_weights=manifest.has_random_weights,
        structure=manifest.structure,
        graph=manifest.graph,
        config=HavocConfig.from_directory(artifact).to_hf(),
        format_cost=_format_cost(manifest),
    )


def _format_cost(manifest: ArtifactManifest) -> FormatCost | None:
    """What the manifest says the formats cost; None in one written before it did."""
    if manifest.format_cost is None:
        return None
    return FormatCost.model_validate_json(json.dumps(manifest.format_cost))  # strict, but a list may be a tuple


def file_states(artifact: Path) -> dict[str, tuple[int, ...]]:
    """What changes when somebody replaces or rewrites a file of the artifact, in a folder inside it too.

    Inode, size and two times of every file: when it was written, which anyone can set back, and when it was changed in
    any way, which the system alone sets.
    """
    states: dict[str, tuple[int, ...]] = {}
    try:
        for folder, _, names in os.walk(artifact, onerror=_raise):
            for path in (Path(folder, name) for name in names):
                state = path.lstat()
                found = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                states[path.relative_to(artifact).as_posix()] = found
    except OSError as error:
        raise HavocError(f"{error.filename or artifact}: {error.strerror or error}") from error
    return states


def _raise(error: OSError) -> None:
    raise error


def require_unchanged(artifact: Path, before: dict[str, tuple[int, ...]]) -> None:
    """Raise `IdentityError` where the artifact is no longer as `file_states` saw it: another was timed."""
    try:
        now = file_states(artifact)
    except HavocError as error:
        raise IdentityError(f"the artifact went away while it was measured ({error}): measure it again") from error
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise IdentityError(f"{artifact / changed[0]} changed while the artifact was measured: measure it again")
