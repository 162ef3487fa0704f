"""How the tensors of one fold are stored: the layout, which matrices of mixed bits became int8, and by which text.

A calibration text decides both what mixed bits promote and how gptq rounds; nothing else of a format depends on a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.tensors import tensor_shapes
from ..progress import SILENT, Progress
from .calibration import Calibration, read_calibration
from .keep import KeptBlocks, kept_formats, kept_tensors
from .layerwise import CalibratedBlocks
from .layout import Layout, plan_layout, promoted_layout
from .precision import choose_promoted, measure_losses

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from ..model.config import HavocConfig
    from ..model.gguf import GgufTensors
    from ..model.structure import Structure
    from .datafile import BlockSource
    from .source import Source


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One fold's structure and layout; `calibration` if it depends on a text, `promoted` are the int8 matrices."""

    structure: Structure
    layout: Layout
    calibration: Calibration | None = None
    promoted: tuple[str, ...] = ()
    kept: GgufTensors | None = None

    def blocks_of(self, tensors: Mapping[str, Tensor], config: HavocConfig) -> BlockSource | None:
        """The source of the blocks of the fold `tensors`; None: each matrix is rounded by itself."""
        if self.kept is not None:
            return KeptBlocks(self.kept)
        if self.structure.quantizer == "gptq" and self.calibration is not None:
            return CalibratedBlocks(tensors, config, self.layout, self.calibration.windows)
        return None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of all matrices in blocks, scales and zeros included, over their weights; a tied table once."""
        return bits_per_weight(self.layout)

    def to_json(self) -> dict[str, Any] | None:
        """The manifest's description of the calibration."""
        if self.calibration is None:
            return None
        document = {**self.calibration.to_json(), "bits_per_weight": self.bits_per_weight}
        return document if self.structure.average_bits is None else {**document, "int8": list(self.promoted)}


def plan_storage(
    source: Source,
    structure: Structure,
    tensors: Mapping[str, Tensor],
    calibration: Path | None = None,
    progress: Progress = SILENT,
) -> Storage:
    """Decide how the fold `tensors` of `source` is stored; `calibration` is a text in place of the bundled one."""
    config = source.config
    if structure.weight_format == "keep":
        kept = kept_tensors(source)
        return Storage(structure=structure, layout=plan_layout(config, structure, kept_formats(kept)), kept=kept)
    layout = plan_layout(config, structure)
    if not structure.is_calibrated:
        return Storage(structure=structure, layout=layout)
    text = read_calibration(config, source.tokenizer, file=calibration)
    if structure.average_bits is None:
        return Storage(structure=structure, layout=layout, calibration=text)
    losses = measure_losses(tensors, config, layout, structure, text.windows, progress=progress)
    promoted = choose_promoted(losses, block_shapes(layout, config), structure)
    layout = promoted_layout(config, structure, promoted)
    return Storage(structure=structure, layout=layout, calibration=text, promoted=promoted)


def block_shapes(layout: Layout, config: HavocConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices in blocks, by name in file order."""
    shapes = tensor_shapes(config)
    in_blocks = [weight.source for weight in layout.weights if weight.blocks is not None]
    return {name: (shapes[name][0], shapes[name][1]) for name in in_blocks}


def bits_per_weight(layout: Layout) -> float | None:
    """Stored bits of all matrices in blocks, divided by their weights; None if there are none."""
    weights = [weight for weight in layout.weights if weight.blocks is not None]
    num_weights = sum(weight.source_shape[0] * weight.source_shape[1] for weight in weights)
    num_bytes = sum(item.num_bytes for weight in weights for item in weight.initializers)
    return 8 * num_bytes / num_weights if num_weights else None
