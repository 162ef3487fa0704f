"""Sessions for the search: any mixture of one base in milliseconds, without writing or re-exporting anything.

One graph per structure is built once. For each alpha the adapted matrices are folded by one weighted sum, encoded as
the structure stores them and handed to a new session in memory; everything else is encoded once and shared. A session
is created anew because ONNX Runtime packs weights when it opens a graph: updating them in place is silently ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..adapt.mixture import DenseMixture
from ..model.checkpoint import Base
from .datafile import encoded_initializers
from .encode import encode, encode_factors
from .fold import FoldedTensors
from .graph import build_graphs, serialize
from .layout import Layout, plan_layout
from .options import DEFAULT_OPTIONS, GraphOptions
from .runtime import CPU
from .session import DecoderSession
from .source import Source, open_source

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
        provider: str = CPU,
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
        shared = self._shared_of(structure)
        return DecoderSession(
            self._source.config,
            shared.graphs,
            options=self._options,
            tokenizer=self._tokenizer,
            provider=self._provider,
            num_threads=self._num_threads,
            weights=_by_name(shared, self.encoded(alpha, structure)),
        )

    def encoded(self, alpha: Sequence[float], structure: Structure) -> dict[int, NDArray[Any]]:
        """The adapted weights of `alpha` as the structure stores them, by offset in the data file."""
        layout = self._shared_of(structure).layout
        deltas = self._mixture.deltas(alpha) if layout.num_factored else {}
        mixed = FoldedTensors(self._source.tensors, deltas, self._basis)
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

    def _shared_of(self, structure: Structure) -> _Shared:
        if structure not in self._shared:
            config = self._source.config
            layout = plan_layout(config, structure)
            models = build_graphs(config, structure, self._options)
            base = FoldedTensors(self._source.tensors, {}, self._basis)
            items = encoded_initializers(base, config, structure, layout)
            self._shared[structure] = _Shared(
                graphs={name: serialize(model) for name, model in models.items()},
                layout=layout,
                places={name: _places(model) for name, model in models.items()},
                arrays={item.offset_bytes: array for item, array in items},
            )
        return self._shared[structure]


def _tokenizer_of(base: Source | Base | Path | str, source: Source) -> Tokenizer | None:
    """The tokenizer of a loaded base as it is, with or without its chat template; else the directory's."""
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
