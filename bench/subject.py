"""Which artifact was measured: every file's hash, checked again, and the manifest's description."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ..errors import HavocError, IdentityError
from ..export.rebuilt import require_own_graphs, why_not_rebuilt
from ..export.runtime.artifact import asked_alpha
from ..export.runtime.held import hold
from ..export.runtime.live_table import EXPERTS_FILE
from ..mistakes import mistakes
from ..model.config_file import read_config
from ..model.hf_config import to_hf
from .judge.schema import EngineVersion, FormatCost, Subject

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..export.runtime.artifact import ArtifactManifest
    from ..export.runtime.held import HeldArtifact
    from .contender import Contender


def identify_subject(artifact: Path) -> Subject:
    """Hash every file of an artifact and describe it.

    Raises `HavocError` if the folder is not an artifact, `IdentityError` if its bytes differ from its manifest.
    """
    with hold(artifact) as held:
        return describe(held)


def describe(held: HeldArtifact, *, alpha: Mapping[str, float] | None = None) -> Subject:
    """Describe an artifact that was hashed and is held open; an artifact that does not fit a record is a `HavocError`.

    `alpha` is the mixture of a live artifact, None for the manifest's. Its bytes of weights are those of one mixture,
    because the folds of its experts are read only at a switch.
    """
    artifact, manifest = held.place, held.manifest
    weight_bytes = sum(
        file.num_bytes for name, file in manifest.files.items() if name.endswith(".data") and name != EXPERTS_FILE
    )
    if weight_bytes == 0:
        raise HavocError(f"{artifact}: the artifact has no weights")
    weights = asked_alpha(manifest, alpha, where=str(held.directory))
    try:
        return _described(artifact, manifest, weight_bytes, weights)
    except ValidationError as error:
        said = mistakes(error, Subject, is_handwritten=False)
        raise HavocError(f"{artifact}: this artifact does not fit into a record ({said})") from error


def describe_model(model: Contender) -> Subject:
    """Describe the model of another engine by its known properties: its files, its weights, its engine."""
    if model.weight_bytes == 0:
        raise HavocError(f"{model.shown}: has no file with weights")
    return Subject(
        name=PurePath(model.shown).name[:200] or "unnamed",
        files=model.files,
        weight_bytes=model.weight_bytes,
        weight_format="as the file has them",
        activation_dtype="the engine's",
        engine=EngineVersion(name=model.identity["engine"], version=model.identity["version"][:100]),
    )


def is_graph_rebuilt(held: HeldArtifact) -> bool | None:
    """Whether its graphs are those that HAVOC builds for it; None if that cannot be checked here."""
    if why_not_rebuilt() is not None:
        return None
    try:
        require_own_graphs(held.place, held.manifest)
    except IdentityError:
        return False
    return True


def _described(artifact: Path, manifest: ArtifactManifest, weight_bytes: int, alpha: dict[str, float]) -> Subject:
    opset = manifest.graph.get("opset")
    return Subject(
        name=PurePath(manifest.base_name).name[:200] or "unnamed",
        files={name: file.sha256 for name, file in manifest.files.items()},
        manifest_sha256=manifest.sha256,
        graph_sha256=manifest.files["model.onnx"].sha256,
        num_parameters=manifest.num_parameters,
        weight_bytes=weight_bytes,
        weight_format=manifest.structure.get("weight_format", "unknown"),
        activation_dtype=manifest.structure.get("activation_dtype", "unknown"),
        opset=opset if type(opset) is int else None,
        base_hash=manifest.base_hash,
        alpha=alpha or None,
        rule=manifest.rule,
        has_random_weights=manifest.has_random_weights,
        structure=manifest.structure,
        graph=manifest.graph,
        config=to_hf(read_config(artifact)),
        format_cost=_format_cost(manifest),
    )


def _format_cost(manifest: ArtifactManifest) -> FormatCost | None:
    """The cost of the formats from the manifest; None in an older manifest."""
    if manifest.format_cost is None:
        return None
    return FormatCost.model_validate_json(json.dumps(manifest.format_cost))  # strict, but a list may be a tuple
