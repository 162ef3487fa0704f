"""Is this folder still the artifact it says it is: hashes, a session, and the stored logits. No torch.

Folding the weights again from base and experts needs them, and torch: `rederive`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import IdentityError
from .artifact import ArtifactManifest, verify_hashes
from .probe import fingerprint, fingerprint_distance
from .runtime import CPU
from .session import DecoderSession
from .signature import verify_signature

if TYPE_CHECKING:
    from pathlib import Path

FINGERPRINT_LIMITS = {"fp32": 1e-3, "fp16": 1e-3, "int8": 0.25, "int4": 0.25, "keep": 0.25}
"""Largest difference of a stored logit, in units of the logits' spread, by weight format.

Another machine rounds in another order (1e-6 in fp32), and its int8 kernels quantize activations in another way.
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked and found right, in words."""

    name: str
    finding: str


def verify_artifact(
    directory: Path, *, provider: str = CPU, public_key: Path | None = None
) -> tuple[ArtifactManifest, list[Check]]:
    """Hash every file, check the signature by `public_key` where one is given, open the graphs, run the fingerprint.

    The first thing that is wrong is raised, and nothing is opened before every byte of it was found right.
    """
    manifest = verify_hashes(directory)
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    checks = [Check(name="hashes", finding=f"{len(manifest.files)} files, {num_bytes:,} bytes")]
    if public_key is not None:
        checks.append(Check(name="signature", finding=verify_signature(directory, manifest, public_key)))
    session = DecoderSession.open(directory, provider=provider)
    checks.append(Check(name="graph", finding=f"{manifest.graph.get('dialect')} dialect opens on {provider}"))
    weight_format = manifest.structure.get("weight_format", "fp32")
    is_half = manifest.structure.get("activation_dtype") == "fp16"
    limit = max(FINGERPRINT_LIMITS.get(weight_format, 1e-3), 0.05 if is_half else 0.0)
    distance = fingerprint_distance(manifest.fingerprint, fingerprint(session))
    if not distance <= limit:
        found = f"the stored logits differ by {distance:.3g} of their spread (allowed {limit:g})"
        msg = f"{directory}: {found}: another model or a broken runtime"
        raise IdentityError(msg)
    checks.append(
        Check(name="fingerprint", finding=f"logits within {distance:.1e} of their spread (allowed {limit:g})")
    )
    return manifest, checks
