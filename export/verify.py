"""Is this folder still the artifact it says it is: hashes, a session, and the stored logits. No torch.

Folding the weights again from base and experts needs them, and torch: `rederive`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import HavocError, IdentityError
from ..model.config_file import read_config
from ..model.cost import num_parameters
from ..storage import read_json, sha256_json
from .rebuilt import require_own_graphs, why_not_rebuilt
from .runtime.artifact import MANIFEST
from .runtime.devices import CPU_PROVIDER
from .runtime.foreign import foreign_fingerprints
from .runtime.held import hold
from .runtime.probe import fingerprint_distance
from .runtime.signature import verify_signature
from .runtime.verification import Checked

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .runtime.artifact import ArtifactManifest
    from .runtime.held import HeldArtifact
    from .runtime.probe import Fingerprint

CONFIG, MIXTURE = "config.json", "mixture.json"
FINGERPRINT_LIMITS = {"fp32": 1e-3, "fp16": 1e-3, "int8": 0.25, "int4": 0.25, "keep": 0.25}
"""Largest difference of a stored logit, in units of the logits' spread, by weight format.

Another machine rounds in another order (1e-6 in fp32), and its int8 kernels quantize activations in another way.
"""


def verify_artifact(
    directory: Path, *, provider: str = CPU_PROVIDER, public_key: Path | None = None, record: Path | None = None
) -> tuple[ArtifactManifest, list[Checked]]:
    """Hash every file, check the signature by `public_key` if given, open the graphs, run the fingerprint.

    With a `record` the artifact must be the record's, with its manifest. The first error is raised, and no file is
    opened before all its bytes were checked.
    """
    with hold(directory) as held:
        checks = [
            _hashes(held),
            _own_words(held),
            *_own_graphs(held),
            *([] if record is None else [_of_record(held, record)]),
        ]
        if public_key is not None:
            checks.append(Checked(name="signature", finding=verify_signature(held.place, held.manifest, public_key)))
        checks += _run(held, provider)
        held.require_unchanged()
        return held.manifest, checks


def _hashes(held: HeldArtifact) -> Checked:
    files = held.manifest.files
    return Checked(
        name="hashes", finding=f"{len(files)} files, {sum(file.num_bytes for file in files.values()):,} bytes"
    )


def _own_words(held: HeldArtifact) -> Checked:
    """Compare the manifest's facts about the export with the files that have the same facts, all of them hashed."""
    manifest = held.manifest
    mixture = {
        "name": manifest.base_name,
        "hash": manifest.base_hash,
        "random_weights": manifest.has_random_weights,
        "rule": manifest.rule,
        "experts": [
            {"domain": domain, "alpha": weight, "hash": manifest.expert_hashes[domain]}
            for domain, weight in manifest.alpha.items()
        ],
    }
    counted = {"num_parameters": num_parameters(read_config(held.place))}
    _require_words(held, {"num_parameters": manifest.num_parameters}, CONFIG, counted)
    if MIXTURE in manifest.files:
        found = read_json(held.place / MIXTURE)
        base = found.get("base") if isinstance(found, dict) else None
        _require_words(held, mixture, MIXTURE, {**found, **base} if isinstance(base, dict) else {})
    return Checked(name="manifest", finding=f"says what {CONFIG} and {MIXTURE} say, SHA-256 {manifest.sha256}")


def _own_graphs(held: HeldArtifact) -> list[Checked]:
    """Build the graphs again if that is possible here."""
    if (why_not := why_not_rebuilt()) is not None:
        return [Checked(name="graph", finding=f"not built again: {why_not}")]
    num_graphs = require_own_graphs(held.place, held.manifest)
    return [Checked(name="graph", finding=f"{num_graphs} built again from configuration and structure: the same bytes")]


def _require_words(held: HeldArtifact, said: dict[str, Any], where: str, found: dict[str, Any]) -> None:
    for name, value in said.items():
        if found.get(name) != value:
            there = f"{where} says {found.get(name)!r:.60}"
            raise IdentityError(f"{held.place / MANIFEST}: says {name} {value!r:.60}, {there}: one of them was changed")


def _of_record(held: HeldArtifact, path: Path) -> Checked:
    """Compare every hash with those in the record, whose seal is checked; its schema is the gate's affair."""
    document = read_json(path)
    subject = document.get("subject") if isinstance(document, dict) else None
    if not isinstance(subject, dict):
        raise HavocError(f"{path}: not a HAVOC record; give the record.json that `havoc bench` wrote")
    if sha256_json({key: value for key, value in document.items() if key != "sha256"}) != document.get("sha256"):
        raise IdentityError(f"{path}: the record was changed after it was written (its seal does not match)")
    if subject.get("files") != held.hashes or subject.get("manifest_sha256") != held.manifest.sha256:
        what = "files" if subject.get("files") != held.hashes else MANIFEST
        raise IdentityError(f"{held.place}: another artifact: not the {what} that {path} was measured on")
    return Checked(name="record", finding=f"the very files and manifest that {document.get('run_id')} was measured on")


def _run(held: HeldArtifact, provider: str) -> list[Checked]:
    """Open the graphs, in a process that can be ended, and compare the logits they give with the fingerprint."""
    manifest = held.manifest
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    experts = {} if manifest.live is None else manifest.live.fingerprints
    alphas = [None, *({domain: 1.0} for domain in experts)]
    found, *switched = foreign_fingerprints(held.place, alphas, provider=provider, num_bytes=num_bytes)
    weight_format = manifest.structure.get("weight_format", "fp32")
    is_half = manifest.structure.get("activation_dtype") == "fp16"
    limit = max(FINGERPRINT_LIMITS.get(weight_format, 1e-3), 0.05 if is_half else 0.0)
    distance = _distance(held, "", manifest.fingerprint, found, limit)
    apart = [
        _distance(held, f" of the {domain} expert", stored, now, limit)
        for (domain, stored), now in zip(experts.items(), switched, strict=True)
    ]
    within = (
        f"each of {len(apart)} experts alone answers within {max(apart, default=0):.1e} of its stored logits' spread"
    )
    return [
        Checked(name="provider", finding=f"{manifest.graph.get('dialect')} dialect opens on {provider}"),
        Checked(name="fingerprint", finding=f"logits within {distance:.1e} of their spread (allowed {limit:g})"),
        *([Checked(name="live", finding=within)] if apart else []),
    ]


def _distance(held: HeldArtifact, whose: str, stored: Mapping[str, Any], found: Fingerprint, limit: float) -> float:
    distance = fingerprint_distance(stored, found)
    if not distance <= limit:
        differ = f"the stored logits{whose} differ by {distance:.3g} of their spread (allowed {limit:g})"
        raise IdentityError(f"{held.place}: {differ}: another model or a broken runtime")
    return distance
