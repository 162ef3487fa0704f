"""Write the experts of a live artifact: each trained matrix of the base and of every expert alone, in the graph's form.

The weight file holds the artifact's own mixture, as in any other artifact. Equal matrices are stored once: with
alpha = 0 the mixture is the base, and where an expert did not train a matrix, its fold equals the base's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..adapt.svf import fold_matrix, matrix_basis
from ..errors import HavocError
from ..messages import plain
from ..model.structure import Structure
from ..progress import SILENT, Progress
from .encode import encode
from .layout import PAGE_BYTES
from .parity import compare, read_reference
from .reference import FP32, StreamedModel
from .runtime.decoder import DECODER
from .runtime.live import LiveWeights
from .runtime.live_table import BASE, EXPERTS_FILE, STORED, WEIGHTS_FILE, FoldPlace, LiveMatrix, LiveTable, expert_key
from .runtime.probe import fingerprint, text_probe
from .runtime.session import DecoderSession

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from ..adapt.expert import Expert
    from ..adapt.mixture import MixingRule
    from ..adapt.svf import Basis, MatrixBasis
    from ..model.config import HavocConfig
    from .layout import Layout, StoredWeight
    from .parity import ParityCase
    from .runtime.options import GraphOptions
    from .runtime.sample import Sample
    from .source import Source

Folds = dict[int, "NDArray[Any]"]
"""Folds of one matrix as the graph reads them, by their offset in `experts.data`."""

_PROOF_TOKENS = 32


def require_live(experts: Sequence[Expert], structure: Structure) -> None:
    """Refuse an artifact that cannot switch: no experts, or weights that each switch would have to round again."""
    if not experts:
        raise HavocError("--live switches between experts: give them with --experts DIR")
    if structure != Structure():
        raise HavocError(
            f"--live needs fp32 weights, but {structure.description} are asked for: other formats would have to be "
            "rounded again at every switch"
        )
    if all(expert.is_base for expert in experts):
        raise HavocError(f"--live has nothing to switch: all {len(experts)} experts are equal to the base")


def trained_names(experts: Sequence[Expert], rule: MixingRule) -> set[str]:
    """The matrices that alpha can change: under `delta` those that an expert changed, else all that an expert names."""
    return {name for expert in experts for name, delta in expert.deltas.items() if rule != "delta" or bool(delta.any())}


def live_layout(layout: Layout, experts: Sequence[Expert], rule: MixingRule) -> list[StoredWeight]:
    """The stored weights of the trained matrices, in file order."""
    names = trained_names(experts, rule)
    found = [weight for weight in layout.weights if weight.source in names]
    for weight in found:
        if weight.form != "transposed":
            raise HavocError(f"--live switches projections only, but an expert trained {weight.source}")
    return found


def write_experts(
    path: Path, folds: Iterable[tuple[LiveMatrix, Folds]], *, num_matrices: int, progress: Progress = SILENT
) -> tuple[LiveTable, str]:
    """Write what `expert_folds` gives to `path`; return the table without fingerprints, and the file's SHA-256."""
    digest, end_bytes, matrices = hashlib.sha256(), 0, []
    with path.open("wb") as file, progress.stage("write experts", num_matrices, unit="matrices") as stage:
        for matrix, arrays in folds:
            for offset_bytes, array in arrays.items():
                for part in (bytes(offset_bytes - end_bytes), array.reshape(-1).view(np.uint8).data):
                    file.write(part)
                    digest.update(part)
                end_bytes = offset_bytes + matrix.num_bytes
            matrices.append(matrix)
            stage.advance(note=matrix.name)
    return LiveTable(matrices=tuple(matrices), fingerprints={}), digest.hexdigest()


def expert_folds(
    source: Source,
    experts: Sequence[Expert],
    deltas: Mapping[str, Tensor],
    *,
    rule: MixingRule,
    layout: Layout,
    basis: Basis | None = None,
) -> Iterator[tuple[LiveMatrix, Folds]]:
    """Each trained matrix in file order, and its folds in `experts.data`, by their offset there.

    `deltas` [R] by name belong to the mixture in the weight file. One matrix is folded at a time.
    """
    end_bytes = 0
    for weight in live_layout(layout, experts, rule):
        (item,) = weight.initializers
        folded = _MatrixFolds(source, weight, experts, deltas, rule, basis)
        places, arrays = {STORED: FoldPlace(file=WEIGHTS_FILE, offset_bytes=item.offset_bytes)}, {}
        for key, same_as, array in folded.folds():
            if same_as is not None:
                places[key] = places[same_as]
                continue
            offset_bytes = -(-end_bytes // PAGE_BYTES) * PAGE_BYTES
            places[key] = FoldPlace(file=EXPERTS_FILE, offset_bytes=offset_bytes)
            arrays[offset_bytes], end_bytes = array, offset_bytes + item.num_bytes
        yield (
            LiveMatrix(name=item.name, shape=item.shape, places=places, norm_shares=folded.norm_shares()),
            arrays,
        )


class _MatrixFolds:
    """One trained matrix, folded for the base and for each expert alone, all with the same basis."""

    def __init__(
        self,
        source: Source,
        weight: StoredWeight,
        experts: Sequence[Expert],
        deltas: Mapping[str, Tensor],
        rule: MixingRule,
        basis: Basis | None,
    ) -> None:
        self._weight, self._rule = weight, rule
        self._base_MN = source.tensors[weight.source].detach().to(torch.float32)
        self._basis: MatrixBasis = (
            matrix_basis(self._base_MN, name=weight.source) if basis is None else basis.matrices[weight.source]
        )
        zeros = torch.zeros(self._basis.num_directions)
        self._stored = deltas.get(weight.source, zeros)
        self._deltas = {expert.domain: expert.deltas.get(weight.source, zeros) for expert in experts}

    def folds(self) -> Iterator[tuple[str, str | None, NDArray[Any]]]:
        """Each fold's key, the key of an equal earlier fold, and the graph's values (empty if a fold is equal)."""
        seen = {STORED: self._stored}
        zeros = torch.zeros_like(self._stored)
        for key, delta in [(BASE, zeros), *((expert_key(domain), delta) for domain, delta in self._deltas.items())]:
            same_as = next((other for other, known in seen.items() if torch.equal(known, delta)), None)
            seen[key] = delta
            yield key, same_as, np.empty(0, np.float32) if same_as is not None else self._fold(delta)

    def _fold(self, delta: Tensor) -> NDArray[Any]:
        folded = fold_matrix(self._base_MN, self._basis.factor, self._basis.side, delta)
        (array,) = encode(self._weight, folded, Structure())
        return array

    def norm_shares(self) -> dict[str, float]:
        """The shares that renorm needs: each expert's sum of singular values over the base's."""
        if self._rule != "renorm":
            return {}
        exact = self._basis.singular_values.double()
        total = float(exact.sum())
        return {domain: float((exact * (1 + delta.double())).sum()) / total for domain, delta in self._deltas.items()}


class _Switched(Mapping[str, Tensor]):
    """The stored weights with the trained matrices as they are after a switch."""

    def __init__(self, stored: Mapping[str, Tensor], live: LiveWeights) -> None:
        self._stored, self._live = stored, live

    def __getitem__(self, name: str) -> Tensor:
        array = self._live.arrays.get(name)
        return self._stored[name] if array is None else torch.from_numpy(np.array(array.T))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def prove_switches(
    folder: Path,
    table: LiveTable,
    *,
    config: HavocConfig,
    options: GraphOptions,
    stored: Mapping[str, Tensor],
    alpha: Mapping[str, float],
    rule: MixingRule,
    sample: Sample,
    progress: Progress = SILENT,
) -> tuple[LiveTable, list[ParityCase]]:
    """Switch to every expert alone and to an even mixture; compare each with float64 over the switched weights.

    Returns the table with the fingerprint of each expert. A graph that answers with other weights is a
    `MeasurementError`.
    """
    live = LiveWeights(folder, table, alpha=alpha, rule=rule, num_threads=torch.get_num_threads())
    graphs = {path.name: path for path in sorted(folder.glob("*.onnx"))}
    assert DECODER in graphs  # noqa: S101
    session = DecoderSession(config, graphs, options=options, packs_weights=False, live=live)
    probe = text_probe(config, sample, num_tokens=min(options.cache_len or config.max_seq_len, _PROOF_TOKENS))
    mixtures = {domain: {domain: 1.0} for domain in alpha}
    if len(alpha) > 1:
        mixtures["even mixture"] = dict.fromkeys(alpha, 1 / len(alpha))
    cases, fingerprints = [], {}
    for label, weights in mixtures.items():
        session.set_alpha(weights)
        reference = read_reference(StreamedModel(config, _Switched(stored, live)), probe, [FP32])
        cases += compare(reference, session, FP32, label=f"live {label}", progress=progress)
        if label in alpha:
            fingerprints[label] = plain(fingerprint(session))
    return replace(table, fingerprints=fingerprints), cases
