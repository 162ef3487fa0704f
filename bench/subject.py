"""Which artifact was measured: every file's hash, checked anew, and what its manifest says it is."""

from __future__ import annotations

from pathlib import Path, PurePath

from ..errors import HavocError
from ..export.artifact import verify_hashes
from .schema import Subject


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
    opset = manifest.graph.get("opset")
    return Subject(
        name=PurePath(manifest.base_name).name[:200] or "unnamed",
        files={name: file.sha256 for name, file in manifest.files.items()},
        graph_sha256=manifest.files["model.onnx"].sha256,
        num_parameters=manifest.num_parameters,
        weight_bytes=weight_bytes,
        weight_format=manifest.structure.get("weight_format", "unknown"),
        activation_dtype=manifest.structure.get("activation_dtype", "unknown"),
        opset=opset if isinstance(opset, int) else None,
        base_hash=manifest.base_hash,
        alpha=dict(manifest.alpha) or None,
        rule=manifest.rule,
        has_random_weights=manifest.has_random_weights,
    )
