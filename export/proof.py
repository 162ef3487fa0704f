"""Both proofs of a new folder: its graphs compute the function of its weights, and its format has a measured cost.

The proofs run the bytes that ship. If products round activations to int8, the graph is compared with a reference that
rounds too. This rounding hides smaller errors, so the same graph runs once more with exact products, which hide none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..messages import plain
from ..model.cost import num_parameters
from ..progress import SILENT, Progress
from .format_cost import BlockLimit, CheckedFold, FormatCost, block_limit, measure_cost, read_fold, windows_of
from .parity import ParityReport, compare, read_reference
from .reference import FP32, StreamedModel, fp16_activations, int8_products
from .runtime.decoder import DECODER
from .runtime.devices import CPU_PROVIDER
from .runtime.probe import fingerprint, text_probe
from .runtime.session import DecoderSession
from .variant import with_all_logits, with_exact_products

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .datafile import StoredWeights
    from .layout import Layout
    from .reference import Arithmetic
    from .runtime.options import GraphOptions
    from .runtime.sample import Sample

NUM_TOKENS = 64
NOWHERE_ELSE: Mapping[str, str] = MappingProxyType({})
_MAX_LOGITS_BYTES = 1 << 27
_ROWS_OF_A_PROBE = 2.5  # its three rows, in lengths of the longest


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The part for the manifest."""

    parity: ParityReport
    cost: FormatCost
    fingerprint: dict[str, Any]


def prove(
    folder: Path,
    *,
    config: HavocConfig,
    structure: Structure,
    options: GraphOptions,
    stored: StoredWeights,
    folded: Mapping[str, Tensor],
    layout: Layout,
    sample: Sample,
    packs_weights: bool,
    also_on: Mapping[str, str] = NOWHERE_ELSE,
    progress: Progress = SILENT,
) -> Proof:
    """Prove the graphs of `folder` on the CPU and on each provider of `also_on`; a failure is a `MeasurementError`.

    `also_on` gives the name of each provider's device, which begins the names of its cases. No card rounds activations
    to int8, so there the comparison is with torch in the activations' dtype. A provider that cannot run is an
    `IdentityError`. The references are computed first and only their logits and activations are kept, so that no weight
    is in memory twice.
    """
    graphs = {path.name: path.read_bytes() for path in sorted(folder.glob("*.onnx"))}
    measures = _measures(structure)
    max_tokens = options.cache_len or config.max_seq_len
    num_tokens = min(max_tokens, _num_tokens(config))
    with progress.stage("float64 over the stored weights", config.num_layers, unit="layers") as stage:
        model = StreamedModel(config, stored, on_layer=stage.advance)
        reference = read_reference(model, text_probe(config, sample, num_tokens=num_tokens), measures)
    windows = windows_of(sample, config, max_tokens=max_tokens, num_parameters=num_parameters(config))

    def limit_of(name: str) -> BlockLimit:
        return BlockLimit(0.0) if structure.weight_format == "keep" else block_limit(layout[name], structure.quantizer)

    with progress.stage("torch over the exact fold", config.num_layers, unit="layers") as stage:
        exact = CheckedFold(folded, stored, layout, limit_of)
        fold = StreamedModel(config, exact, on_layer=stage.advance)
        hidden = read_fold(fold, windows)

    def opened(decoder: bytes, *, logits: str = options.logits, provider: str = CPU_PROVIDER) -> DecoderSession:
        return DecoderSession(
            config,
            {**graphs, DECODER: decoder},
            options=replace(options, logits=logits),  # type: ignore[arg-type]
            provider=provider,
            packs_weights=packs_weights,
            data_folder=folder,
        )

    shipped = opened(graphs[DECODER])
    cases = compare(reference, shipped, measures[0], progress=progress)
    logits = plain(fingerprint(shipped))
    del shipped
    if len(measures) > 1:
        exactly = opened(with_exact_products(graphs[DECODER]))
        cases += compare(reference, exactly, FP32, label="exact products", progress=progress)
        del exactly
    for provider, device in also_on.items():
        there = opened(graphs[DECODER], provider=provider)
        cases += compare(reference, there, measures[-1], label=device, progress=progress)
        del there
    every = opened(with_all_logits(graphs[DECODER]), logits="all")
    cost = measure_cost(hidden, fold.head(), every, windows, sample, progress=progress)
    return Proof(parity=ParityReport(cases=tuple(cases)), cost=cost, fingerprint=logits)


def _measures(structure: Structure) -> list[Arithmetic]:
    """The references for the graph as it ships, and with exact products if its own are rounded."""
    if structure.activation_dtype == "fp16":
        return [fp16_activations()]
    if structure.compute != "fp32":
        return [int8_products(None if structure.is_w8a8 else structure.block_size), FP32]
    return [FP32]


def _num_tokens(config: HavocConfig) -> int:
    """Tokens of the longest row: fewer if the vocabulary is so large that float64 logits would fill the memory."""
    affordable = int(_MAX_LOGITS_BYTES / (8 * config.vocab_size * _ROWS_OF_A_PROBE))
    return max(min(NUM_TOKENS, affordable), 32)
