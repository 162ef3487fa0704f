"""3. What is shipped: fold, ONNX graph, quantization, parity, artifact, and the torch-free runtime that opens it.

Names are loaded when first used, so a device without torch imports `DecoderSession` and nothing that needs the lab.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .candidates import CandidateSessions
    from .package import export_artifact
    from .runtime.artifact import ArtifactManifest, read_manifest, verify_hashes
    from .runtime.session import DecoderSession

_HOME = {
    "ArtifactManifest": "runtime.artifact",
    "CandidateSessions": "candidates",
    "DecoderSession": "runtime.session",
    "export_artifact": "package",
    "read_manifest": "runtime.artifact",
    "verify_hashes": "runtime.artifact",
}

__all__ = [
    "ArtifactManifest",
    "CandidateSessions",
    "DecoderSession",
    "export_artifact",
    "read_manifest",
    "verify_hashes",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any object with that name
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
