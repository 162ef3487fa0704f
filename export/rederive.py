"""Folding an artifact's weights again from base, experts and alpha, to compare with the shipped bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapt.expert import expert_path, load_expert
from ..errors import IdentityError
from ..model.config import HavocConfig
from ..model.structure import Structure
from ..progress import SILENT, Progress
from .datafile import encoded_initializers
from .fold import FoldedTensors
from .graph import build_graphs, serialize
from .layout import DATA_FILE, NUM_BITS, plan_layout
from .options import GraphOptions, options_of
from .package import EXPERTS_FOLDER, Mixture
from .source import open_source
from .verify import Check

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ..adapt.expert import Expert
    from .artifact import ArtifactManifest

TOLERANCE = 1e-4
"""Largest difference of a weight relative to the tensor's largest: what another machine may round apart."""


def structure_of(manifest: ArtifactManifest) -> Structure:
    """The structure the manifest names; an unknown one is a `HavocError`."""
    return Structure.from_fields(manifest.structure)


def rederive(
    directory: Path,
    manifest: ArtifactManifest,
    base: Path | str,
    *,
    experts_directory: Path | None = None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Fold `base` and the artifact's experts again (or those of `experts_directory`) and compare every stored tensor.

    A base or an expert with another hash, or a tensor that differs by more than rounding, is an `IdentityError`.
    """
    source = open_source(base)
    _require_same("base", source.name, source.hash, manifest.base_hash)
    folder = experts_directory or directory / EXPERTS_FOLDER
    experts = [_expert(folder, domain, manifest) for domain in manifest.alpha]
    mixture = Mixture(experts=tuple(experts), alpha=tuple(manifest.alpha.values()), rule=manifest.rule)  # type: ignore[arg-type]
    structure = structure_of(manifest)
    config = HavocConfig.from_directory(directory)
    _require_graphs(directory, config, structure, options_of(manifest))
    tensors = FoldedTensors(source.tensors, mixture.deltas(source, None))
    num_same, num_items, largest = 0, 0, 0.0
    layout = plan_layout(config, structure)
    stored = np.memmap(directory / DATA_FILE, np.uint8, mode="r")
    with progress.stage("fold again", layout.num_bytes, unit="bytes") as stage:
        for item, array in encoded_initializers(tensors, config, structure, layout):
            part = stored[item.offset_bytes : item.offset_bytes + item.num_bytes].view(item.dtype).reshape(item.shape)
            distance = _distance(part, array, structure)
            if not distance <= TOLERANCE:
                msg = f"{directory / DATA_FILE}: {item.name} is {distance:.3g} of its range off base + experts + alpha"
                raise IdentityError(msg)
            num_same, num_items, largest = num_same + (distance == 0), num_items + 1, max(largest, distance)
            stage.advance(item.num_bytes, note=item.name)
    finding = f"{num_items} tensors from base {source.name} and {len(experts)} experts, {num_same} bit for bit"
    return [Check(name="fold", finding=f"{finding}, largest difference {largest:.1e} of a tensor's range")]


def _expert(folder: Path, domain: str, manifest: ArtifactManifest) -> Expert:
    path = expert_path(folder, domain)
    expert = load_expert(path, base_hash=manifest.base_hash)
    _require_same(f"{domain} expert", str(path), expert.hash, manifest.expert_hashes.get(domain, ""))
    return expert


def _require_same(what: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        msg = f"{name}: its hash is {found[:16]}..., the artifact was made from {what} {expected[:16]}..."
        raise IdentityError(msg)


def _require_graphs(directory: Path, config: HavocConfig, structure: Structure, options: GraphOptions) -> None:
    for name, model in build_graphs(config, structure, options).items():
        if (directory / name).read_bytes() != serialize(model):
            msg = f"{directory / name}: not the graph that this version of HAVOC builds for this configuration"
            raise IdentityError(msg)


def _distance(stored: NDArray[Any], derived: NDArray[Any], structure: Structure) -> float:
    """Largest difference relative to the largest value; for packed blocks a hundredth of the share off by one."""
    if np.array_equal(stored, derived):
        return 0.0
    if stored.dtype == np.uint8:
        return _packed_distance(stored, derived, NUM_BITS[structure.weight_format])
    peak = float(np.abs(derived.astype(np.float64)).max()) or 1.0
    return float(np.abs(stored.astype(np.float64) - derived).max()) / peak


def _packed_distance(stored: NDArray[np.uint8], derived: NDArray[np.uint8], num_bits: int) -> float:
    """A value between two steps may round either way; more than one step, or often, is another tensor."""
    pairs = [(stored, derived)] if num_bits == 8 else [(stored & 15, derived & 15), (stored >> 4, derived >> 4)]  # noqa: PLR2004
    steps = [np.abs(a.astype(np.int16) - b.astype(np.int16)) for a, b in pairs]
    if max(int(step.max()) for step in steps) > 1:
        return float("inf")
    share = float(np.mean([(step != 0).mean() for step in steps]))
    return 0.0 if share == 0 else min(share, 1.0) * 1e-2
