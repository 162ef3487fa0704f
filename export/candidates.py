"""Sessions for the search: any mixture of one base in milliseconds, without writing or re-exporting anything.

One graph per structure is built once. For each alpha the adapted matrices are folded by one weighted sum, encoded as
the structure stores them and passed to a new session in memory; everything else is encoded once and shared. Each alpha
needs a new session, because ONNX Runtime packs weights when it opens a graph and silently ignores later changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..adapt.mixture import DenseMixture
from ..errors import HavocError
from ..model.checkpoint import Base
from .datafile import encoded_initializers
from .encode import encode, encode_factors
from .fold import FoldedTensors
from .graph import build_graphs, serialize
from .runtime.devices import CPU_PROVIDER
from .runtime.options import DEFAULT_OPTIONS, GraphOptions
from .runtime.session import DecoderSession
from .source import Source, open_source
from .storing import plan_storage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ..adapt.expert import Expert
    from ..adapt.mixture import MixingRule
    from ..adapt.svf import Basis
    from ..model.structure import Structure
    from ..model.tokenizer import Tokenizer
    from .layout import Layout


@dataclass(frozen=True)
class _Shared:
    """What all candidates of one structure share: graphs, layout, the base's encoded weights by file offset."""

    graphs: Mapping[str, bytes]
    layout: Layout
    places: Mapping[str, Mapping[str, tuple[int, tuple[int, ...]]]]
    arrays: Mapping[int, NDArray[Any]]


class CandidateSessions:
    """Opens a `DecoderSession` for any (alpha, structure) of one base and its experts."""

    def __init__(
        self,
        base: Source | Base | Path | str,
        basis: Basis,
        experts: Sequence[Expert],
        *,
        rule: MixingRule = "delta",
        options: GraphOptions = DEFAULT_OPTIONS,
        provider: str = CPU_PROVIDER,
        num_threads: int | None = None,
    ) -> None:
        """Compute every expert's dense delta once; holds K + 2 copies of the adapted weights."""
        self._source = open_source(base)
        self._mixture, self._basis = DenseMixture(self._source.tensors, basis, experts, rule=rule), basis
        self._options = options.fitted(self._source.config.max_seq_len)
        self._provider, self._num_threads = provider, num_threads
        self._shared: dict[Structure, _Shared] = {}
        self._tokenizer = _tokenizer_of(base, self._source)

    def open(self, alpha: Sequence[float], structure: Structure) -> DecoderSession:
        """A session over the mixture `alpha`; it stays valid when the next one is opened."""
        if structure.is_calibrated:
            shared, changed = self._made(structure, self._mixed(alpha)), {}
        else:
            shared, changed = self._shared_of(structure), self.encoded(alpha, structure)
        return DecoderSession(
            self._source.config,
            shared.graphs,
            options=self._options,
            tokenizer=self._tokenizer,
            provider=self._provider,
            num_threads=self._num_threads,
            weights=_by_name(shared, changed),
        )

    def encoded(self, alpha: Sequence[float], structure: Structure) -> dict[int, NDArray[Any]]:
        """The adapted weights of `alpha` as the structure stores them, by offset in the data file.

        Of a structure without calibration: with one, every matrix depends on all that are read before it.
        """
        layout = self._shared_of(structure).layout
        mixed = self._mixed(alpha) if layout.num_factored else FoldedTensors(self._source.tensors, {}, self._basis)
        encoded: dict[int, NDArray[Any]] = {}
        for name, folded in self._mixture.fold(alpha).items():
            weight = layout[name]
            if weight.factors:
                factors = mixed.factors(name, rank=weight.factors[0].source_shape[0])
                arrays = encode_factors(weight, factors, structure)
            else:
                arrays = encode(weight, folded, structure)
            encoded |= {item.offset_bytes: array for item, array in zip(weight.initializers, arrays, strict=True)}
        return encoded

    def folded(self, alpha: Sequence[float]) -> dict[str, Tensor]:
        """Every tensor of the mixture by name, as `open` uses them: adapted ones copied, the others the base's."""
        folded = {name: tensor.clone() for name, tensor in self._mixture.fold(alpha).items()}
        return {name: folded[name] if name in folded else self._source.tensors[name] for name in self._source.tensors}

    def _mixed(self, alpha: Sequence[float]) -> FoldedTensors:
        return FoldedTensors(self._source.tensors, self._mixture.deltas(alpha), self._basis)

    def _shared_of(self, structure: Structure) -> _Shared:
        if structure not in self._shared:
            base = FoldedTensors(self._source.tensors, {}, self._basis)
            self._shared[structure] = self._made(structure, base)
        return self._shared[structure]

    def _made(self, structure: Structure, tensors: FoldedTensors) -> _Shared:
        """All parts of one structure from `tensors`, with a calibration on the bundled text if it needs one."""
        config = self._source.config
        if structure.weight_format == "keep":
            raise HavocError("keep stores the blocks of a GGUF file, but a mixture has none: search int4 or int8")
        storage = plan_storage(self._source, structure, tensors)
        models = build_graphs(config, structure, self._options, layout=storage.layout)
        items = encoded_initializers(
            tensors, config, structure, storage.layout, blocks_of=storage.blocks_of(tensors, config)
        )
        return _Shared(
            graphs={name: serialize(model) for name, model in models.items()},
            layout=storage.layout,
            places={name: _places(model) for name, model in models.items()},
            arrays={item.offset_bytes: array for item, array in items},
        )


def _tokenizer_of(base: Source | Base | Path | str, source: Source) -> Tokenizer | None:
    """The tokenizer of a loaded base, with or without its chat template; else the directory's."""
    if isinstance(base, Base):
        return base.loaded_tokenizer
    return source.tokenizer


def _places(model: ir.Model) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Offset and shape of every initializer of one graph that refers to the data file, by name."""
    places = {}
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            places[name] = (tensor.offset or 0, tuple(int(size) for size in tensor.shape.numpy()))
    return places


def _by_name(shared: _Shared, changed: Mapping[int, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    return {
        graph: {
            name: changed.get(offset_bytes, shared.arrays[offset_bytes]).reshape(shape)
            for name, (offset_bytes, shape) in places.items()
        }
        for graph, places in shared.places.items()
    }
