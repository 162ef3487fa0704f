"""Derive an artifact again from base, experts and alpha, and compare it with the shipped one: weights and all files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapt.expert import expert_path, load_expert
from ..errors import HavocError, IdentityError
from ..model.cost import num_parameters
from ..model.structure import Structure
from ..progress import SILENT, Progress
from ..storage import scratch_directory, write_json
from .calibration import read_calibration
from .datafile import StoredWeights, encoded_initializers
from .fold import FoldedTensors
from .format_cost import block_error, block_limit
from .layout import DATA_FILE, Layout, plan_layout, promoted_layout
from .live import expert_folds
from .package import EXPERTS_FOLDER, MIXTURE_FILE, Mixture, graph_fields, mixture_document, write_companions
from .rebuilt import compare_graphs
from .runtime.artifact import MANIFEST, READ_BY_RUNTIMES
from .runtime.companions import LICENCE_FILES
from .runtime.live_table import EXPERTS_FILE
from .runtime.options import GraphOptions, options_of
from .runtime.verification import Checked
from .source import open_source
from .storing import Storage, bits_per_weight, plan_storage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from ..adapt.expert import Expert
    from .layout import StoredWeight
    from .live import Folds
    from .runtime.artifact import ArtifactManifest
    from .runtime.live_table import LiveMatrix, LiveTable
    from .source import Source

TOLERANCE = 1e-4
"""Largest difference of a weight relative to the tensor's largest: another machine may round differently."""


def rederive(
    directory: Path,
    manifest: ArtifactManifest,
    base: Path | str,
    *,
    experts_directory: Path | None = None,
    calibration: Path | None = None,
    progress: Progress = SILENT,
) -> list[Checked]:
    """Fold `base` and the artifact's experts again (or those of `experts_directory`) and compare every stored tensor.

    Blocks that a text decided are derived again from the bundled text or `calibration`, which must be the text that the
    manifest names; without it, and where another processor rounded a sum otherwise, they are held to the fold block by
    block instead, and the finding says how many.
    A base or an expert with another hash, a tensor that differs by more than rounding, a manifest that says something
    else than an export would, and another configuration or tokenizer are each an `IdentityError`.
    """
    source = open_source(base)
    _require_same("base", source.name, source.hash, manifest.base_hash)
    folder = experts_directory or directory / EXPERTS_FOLDER
    experts = [_expert(folder, domain, manifest) for domain in manifest.alpha]
    mixture = Mixture(experts=tuple(experts), alpha=tuple(manifest.alpha.values()), rule=manifest.rule)  # type: ignore[arg-type]
    structure = Structure.from_fields(manifest.structure)
    options = options_of(manifest).fitted(source.config.max_seq_len)
    config = source.config
    _require_claims(directory, manifest, source, structure, options)
    deltas = mixture.deltas(source, None)
    tensors = FoldedTensors(source.tensors, deltas)
    storage = _storage(source, manifest, structure, calibration)
    layout, blocks_of = storage.layout, storage.blocks_of(tensors, config)
    compare_graphs(directory, manifest, config, structure, options, layout)
    is_gptq = structure.quantizer == "gptq"
    compensated = {
        item.name: weight
        for weight in layout.weights
        if is_gptq and _is_compensated(weight)
        for item in weight.initializers
    }
    bits = {item.name: w.blocks.num_bits for w in layout.weights if w.blocks is not None for item in w.initializers}
    held = {weight.source for weight in compensated.values()} if blocks_of is None else set()
    derived = Layout(tuple(weight for weight in layout.weights if weight.source not in held))
    num_same, num_items, largest = 0, 0, 0.0
    stored = np.memmap(directory / DATA_FILE, np.uint8, mode="r")
    with progress.stage("fold again", layout.num_bytes, unit="bytes") as stage:
        for item, array in encoded_initializers(tensors, config, structure, derived, blocks_of=blocks_of):
            part = stored[item.offset_bytes : item.offset_bytes + item.num_bytes].view(item.dtype).reshape(item.shape)
            distance = _distance(part, array, bits.get(item.name))
            if item.name in compensated and not distance <= TOLERANCE:
                held.add(compensated[item.name].source)
                continue
            if not distance <= TOLERANCE:
                raise IdentityError(
                    f"{directory / DATA_FILE}: {item.name} is {distance:.3g} of its range off base + experts + alpha"
                )
            num_same, num_items, largest = num_same + (distance == 0), num_items + 1, max(largest, distance)
            stage.advance(item.num_bytes, note=item.name)
    _hold(directory, layout, tensors, held)
    num_beside = _require_companions(directory, manifest, source, mixture, options)
    finding = f"{num_items} tensors from base {source.name} and {len(experts)} experts, {num_same} bit for bit"
    finding = f"{finding}, largest difference {largest:.1e} of a tensor's range, and {num_beside} files beside them"
    if held:
        reason = "whose calibration text was not given" if blocks_of is None else "that this processor rounds otherwise"
        finding = f"{finding}; {len(held)} matrices {reason} held to the fold block by block"
    checks = [Checked(name="fold", finding=finding)]
    if manifest.live is None:
        return checks
    folds = expert_folds(source, experts, deltas, rule=mixture.rule, layout=layout)
    return [*checks, _live(directory, manifest.live, folds, progress)]


def _live(directory: Path, table: LiveTable, folds: Iterable[tuple[LiveMatrix, Folds]], progress: Progress) -> Checked:
    """Compare every fold of `experts.data`, and its place in the manifest, with those of a new export."""
    stored, num_folds, largest = np.memmap(directory / EXPERTS_FILE, np.uint8, mode="r"), 0, 0.0
    said = {matrix.name: matrix for matrix in table.matrices}
    with progress.stage("fold the experts again", len(said), unit="matrices") as stage:
        for matrix, arrays in folds:
            found = said.pop(matrix.name, None)
            if found is None or not _is_same(found, matrix):
                raise IdentityError(f"{directory / MANIFEST}: says of {matrix.name} something else than an export does")
            for offset_bytes, array in arrays.items():
                part = stored[offset_bytes : offset_bytes + matrix.num_bytes].view(array.dtype).reshape(array.shape)
                distance = _distance(part, array, None)
                if not distance <= TOLERANCE:
                    off = f"is {distance:.3g} of its range off base + experts"
                    raise IdentityError(f"{directory / EXPERTS_FILE}: a fold of {matrix.name} {off}")
                num_folds, largest = num_folds + 1, max(largest, distance)
            stage.advance(note=matrix.name)
    if said:
        raise IdentityError(f"{directory / MANIFEST}: no expert trained {next(iter(said))}, which it calls live")
    within = f"largest difference {largest:.1e} of a matrix's range"
    return Checked(name="live folds", finding=f"{num_folds} folds of {len(table.matrices)} matrices, {within}")


def _is_same(said: LiveMatrix, derived: LiveMatrix) -> bool:
    """The same except for the last digits of norms, which another machine rounds differently."""
    if said.norm_shares.keys() != derived.norm_shares.keys():
        return False
    apart = [abs(share - derived.norm_shares[domain]) for domain, share in said.norm_shares.items()]
    return max(apart, default=0.0) <= TOLERANCE and replace(said, norm_shares={}) == replace(derived, norm_shares={})


def _storage(source: Source, manifest: ArtifactManifest, structure: Structure, calibration: Path | None) -> Storage:
    """How it is stored, with its calibration text if that is at hand and its hash is right."""
    if not structure.is_calibrated:
        if calibration is not None:
            raise HavocError(f"--calibration {calibration}: {structure} was made without a text; leave the option out")
        return plan_storage(source, structure, source.tensors)
    said = manifest.calibration or {}
    promoted = [str(name) for name in said.get("int8", [])]
    in_blocks = {weight.source for weight in plan_layout(source.config, structure).weights if weight.blocks is not None}
    if unknown := sorted(set(promoted) - in_blocks):
        raise IdentityError(f"{MANIFEST}: promotes {unknown[0]}, which this model does not store in blocks")
    layout = promoted_layout(source.config, structure, promoted)
    bits = bits_per_weight(layout) or 0.0
    if structure.average_bits is not None and bits > structure.average_bits:
        raise IdentityError(
            f"{MANIFEST}: its int8 matrices make it {bits:.4g} bits a weight, more than {structure} allows"
        )
    if calibration is None and said.get("text") not in {"bundled text", "random ids"}:
        return Storage(structure=structure, layout=layout)
    text = read_calibration(source.config, source.tokenizer, file=calibration)
    if text.text_sha256 != said.get("text_sha256"):
        found, expected = (str(sha256)[:16] for sha256 in (text.text_sha256, said.get("text_sha256")))
        raise IdentityError(
            f"{calibration or text.text}: its hash is {found}..., the artifact was calibrated on {expected}..."
        )
    return Storage(structure=structure, layout=layout, calibration=text)


def _is_compensated(weight: StoredWeight) -> bool:
    return weight.blocks is not None and weight.blocks.num_bits == 4  # noqa: PLR2004 - bits


def _hold(directory: Path, layout: Layout, tensors: FoldedTensors, names: Collection[str]) -> None:
    """Every block of these matrices must be near the fold's."""
    stored = StoredWeights(directory / DATA_FILE, layout)
    for name in sorted(names):
        limit = block_limit(layout[name], "gptq")  # only for blocks that a text decided
        error = block_error(stored[name], tensors[name], size=limit.size)
        if not error <= limit.error:
            raise IdentityError(
                f"{directory / DATA_FILE}: a block of {name} is {error:.3g} of its size off base + experts + alpha"
            )


def _expert(folder: Path, domain: str, manifest: ArtifactManifest) -> Expert:
    path = expert_path(folder, domain)
    expert = load_expert(path, base_hash=manifest.base_hash)
    _require_same(f"{domain} expert", str(path), expert.hash, manifest.expert_hashes.get(domain, ""))
    return expert


def _require_same(what: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise IdentityError(
            f"{name}: its hash is {found[:16]}..., the artifact was made from {what} {expected[:16]}..."
        )


def _require_companions(
    directory: Path, manifest: ArtifactManifest, source: Source, mixture: Mixture, options: GraphOptions
) -> int:
    """Compare the files for reading text and for its end with those of a new export; return their number.

    The base may have another name now, and its licence may have been added; experts are identified by their hashes.
    """
    found = {name for name in manifest.files if name in READ_BY_RUNTIMES or name == MIXTURE_FILE}
    with scratch_directory("havoc-verify-") as folder:
        write_companions(folder, source, replace(mixture, experts=(), alpha=()), options)
        document = mixture_document(source, mixture)
        document["base"]["name"] = manifest.base_name
        write_json(folder / MIXTURE_FILE, document)
        written = {path.name for path in folder.iterdir() if path.name not in LICENCE_FILES}
        for name in sorted(found | written):
            if name not in written:
                raise IdentityError(f"{directory / name}: an export of base {source.name} holds no such file")
            if name not in found or (directory / name).read_bytes() != (folder / name).read_bytes():
                raise IdentityError(
                    f"{directory / name}: not what an export of base {source.name} holds under this name"
                )
    return len(written)


def _require_claims(
    directory: Path, manifest: ArtifactManifest, source: Source, structure: Structure, options: GraphOptions
) -> None:
    """The manifest's facts about the model must be those of a new export; about the graph it may have fewer."""
    expected = {
        "random_weights": source.is_random,
        "num_parameters": num_parameters(source.config),
        **graph_fields(source.config, structure, options),
    }
    said = {
        "random_weights": manifest.has_random_weights,
        "num_parameters": manifest.num_parameters,
        **manifest.graph,
    }
    for name, value in said.items():
        if value != expected.get(name):
            raise IdentityError(
                f"{directory / MANIFEST}: says {name} {value!r:.60}, an export says {expected.get(name)!r:.60}"
            )


def _distance(stored: NDArray[Any], derived: NDArray[Any], num_bits: int | None) -> float:
    """Largest difference relative to the largest value; for packed blocks a hundredth of the share off by one."""
    if np.array_equal(stored, derived):
        return 0.0
    if num_bits is not None and stored.dtype == np.uint8:
        return _packed_distance(stored, derived, num_bits)
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
