"""The bill of materials of an artifact, `bom.cdx.json`: CycloneDX 1.6 around a machine-learning model. No torch.

It has the data for inventories: the model with its architecture, measured parity and limits, its base and experts,
every file with its SHA-256, and the tools that wrote it. It has no time and no random number, so one export always has
the same form; its serial number is a hash of the files. It is written as plain JSON, because the maintained Python
library of the standard does not support model cards. Source: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from ..model.hf_config import to_hf
from ..storage import sha256_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.config import HavocConfig
    from .runtime.artifact import ArtifactManifest
    from .runtime.companions import Licence

BOM_FILE = "bom.cdx.json"
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause"}
_MODEL = "model"


def bill_of_materials(config: HavocConfig, manifest: ArtifactManifest, licence: Licence) -> dict[str, Any]:
    """The document; `manifest.files` are those it lists (all but itself, the manifest and a signature)."""
    files = [
        {
            "type": "file",
            "bom-ref": f"file/{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": file.sha256}],
        }
        for name, file in sorted(manifest.files.items())
    ]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": list(_tools(manifest))},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": _MODEL,
                "name": manifest.base_name,
                "description": f"{manifest.base_name} as an ONNX artifact, exported by HAVOC",
                **_licences(licence),
                "pedigree": {"ancestors": [_base(manifest), *_experts(manifest)]},
                "modelCard": _model_card(config, manifest),
                "properties": list(_properties(manifest)),
            },
        },
        "components": files,
        "dependencies": [{"ref": _MODEL, "dependsOn": [file["bom-ref"] for file in files]}],
    }
    return {**document, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, sha256_json(document))}"}


def _base(manifest: ArtifactManifest) -> dict[str, Any]:
    """The base; its hash is over names, shapes and bytes of the tensors, so it is a property and no file's hash."""
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base/{manifest.base_hash}",
        "name": manifest.base_name,
        "properties": [
            {"name": "havoc:weight_hash", "value": manifest.base_hash},
            {"name": "havoc:random_weights", "value": str(manifest.has_random_weights).lower()},
        ],
    }


def _experts(manifest: ArtifactManifest) -> Iterator[dict[str, Any]]:
    for domain, expert_hash in manifest.expert_hashes.items():
        yield {
            "type": "machine-learning-model",
            "bom-ref": f"expert/{domain}/{expert_hash}",
            "name": f"{domain} expert",
            "properties": [
                {"name": "havoc:expert_hash", "value": expert_hash},
                {"name": "havoc:alpha", "value": repr(manifest.alpha[domain])},
                {"name": "havoc:rule", "value": manifest.rule},
            ],
        }


def _tools(manifest: ArtifactManifest) -> Iterator[dict[str, str]]:
    for name, version in sorted(manifest.versions.items()):
        kind = "application" if name == "havoc" else "library"
        yield {"type": kind, "bom-ref": f"tool/{name}", "name": name, "version": version}


def _licences(licence: Licence) -> dict[str, Any]:
    if licence.identifier is None and licence.file is None:
        return {}
    spdx = _SPDX.get((licence.identifier or "").lower())
    named = {"id": spdx} if spdx else {"name": licence.identifier or f"see {licence.file}"}
    return {"licenses": [{"license": named}]}


def _model_card(config: HavocConfig, manifest: ArtifactManifest) -> dict[str, Any]:
    has_vision = config.vision is not None
    inputs = [{"format": "text"}, *([{"format": "image"}] if has_vision else [])]
    return {
        "modelParameters": {
            "task": "image-text-to-text" if has_vision else "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": to_hf(config)["architectures"][0],
            "inputs": inputs,
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(manifest))},
        "considerations": {"technicalLimitations": list(_limits(config, manifest))},
    }


_COSTS = {
    "kl_mean": "mean KL divergence from the exact fold, nats",
    "top1_share": "share of equal top-1 tokens, artifact against the exact fold",
    "perplexity_ratio": "perplexity in units of the exact fold's",
}


def _metrics(manifest: ArtifactManifest) -> Iterator[dict[str, str]]:
    """The graph's error against float64 in each way of running it, and the cost of the format."""
    for case in manifest.parity["cases"]:
        yield {
            "type": f"error against float64 in units of that of {case['measure']}",
            "slice": str(case["name"]),
            "value": repr(case["ratio"]),
        }
    for name, kind in _COSTS.items():
        if manifest.format_cost is not None:
            yield {"type": kind, "value": repr(manifest.format_cost[name])}


def _limits(config: HavocConfig, manifest: ArtifactManifest) -> Iterator[str]:
    if manifest.has_random_weights:
        yield "The weights are random: fit for measuring cost, not for answers."
    yield f"At most {config.max_seq_len} tokens of prompt and answer together."


def _properties(manifest: ArtifactManifest) -> Iterator[dict[str, str]]:
    yield {"name": "havoc:num_parameters", "value": str(manifest.num_parameters)}
    for group, fields in (("structure", manifest.structure), ("graph", manifest.graph)):
        for name, value in sorted(fields.items()):
            yield {"name": f"havoc:{group}:{name}", "value": str(value)}
