"""The one data file of an artifact: written front to back, hashed on the way; read back tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..progress import SILENT, Progress
from .encode import encode, encode_blocks, encode_factors, rope_arrays
from .layout import ROPE_COS, ROPE_SIN
from .quantize import Blocks, dequantize_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.structure import BlockFormat, Structure
    from .fold import FoldedTensors
    from .layout import Initializer, Layout, StoredWeight


class BlockSource(Protocol):
    """Gives the blocks of the matrices of a layout, in file order."""

    def __call__(self, weight: StoredWeight, blocks: BlockFormat) -> Blocks:
        """The blocks of one matrix in the format that the layout has for it."""


def encoded_initializers(
    tensors: FoldedTensors,
    config: HavocConfig,
    structure: Structure,
    layout: Layout,
    *,
    blocks_of: BlockSource | None = None,
) -> Iterator[tuple[Initializer, NDArray[Any]]]:
    """Every initializer with its values, in file order; each source tensor is read once and then dropped.

    `blocks_of` gives the blocks of matrices whose values are not rounded one matrix at a time.
    """
    tables = rope_arrays(config)
    for weight in layout.weights:
        if blocks_of is not None and weight.blocks is not None:
            arrays = encode_blocks(weight, blocks_of(weight, weight.blocks))
        else:
            arrays = _encoded(weight, tensors, tables, structure)
        yield from zip(weight.initializers, arrays, strict=True)


def _encoded(
    weight: StoredWeight, tensors: FoldedTensors, tables: Mapping[str, Tensor], structure: Structure
) -> list[NDArray[Any]]:
    if weight.factors:
        rank = weight.factors[0].source_shape[0]
        return encode_factors(weight, tensors.factors(weight.source, rank=rank), structure)
    table = tables.get(weight.source)
    return encode(weight, tensors[weight.source] if table is None else table, structure)


def write_data_file(
    path: Path,
    tensors: FoldedTensors,
    *,
    config: HavocConfig,
    structure: Structure,
    layout: Layout,
    blocks_of: BlockSource | None = None,
    progress: Progress = SILENT,
) -> str:
    """Write all weights of `layout` to `path`; return the file's SHA-256. Gaps between tensors are zero bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as file, progress.stage("write weights", layout.num_bytes, unit="bytes") as stage:
        end_bytes = 0
        for item, array in encoded_initializers(tensors, config, structure, layout, blocks_of=blocks_of):
            gap = bytes(item.offset_bytes - end_bytes)
            content = array.reshape(-1).view(np.uint8).data
            for part in (gap, content):
                file.write(part)
                digest.update(part)
            end_bytes = item.offset_bytes + item.num_bytes
            stage.advance(len(gap) + item.num_bytes, note=item.name)
    return digest.hexdigest()


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a data file as fp32 tensors: the weights that the graphs should compute with."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Map `path`; nothing is read before it is needed, and a tensor stored in the needed form is not copied."""
        self._layout = layout
        self._bytes = np.memmap(path, np.uint8, mode="c")
        self._sources = [weight.source for weight in layout.weights if weight.source not in {ROPE_COS, ROPE_SIN}]

    def __getitem__(self, source: str) -> Tensor:
        weight = self._layout[source]
        if weight.factors:
            first_RN, second_MR = (self._matrix(factor) for factor in weight.factors)
            return second_MR @ first_RN
        return self._matrix(weight)

    def _matrix(self, weight: StoredWeight) -> Tensor:
        arrays = [self._stored(item) for item in weight.initializers]
        if weight.blocks is not None:
            if weight.blocks.is_w8a8:
                return torch.from_numpy(arrays[0].T.astype(np.float32) * arrays[1][:, None])
            zeros = {"points": "zero_points", "minimums": "minimums"}
            beside = {zeros[weight.blocks.zeros]: arrays[2]} if weight.blocks.zeros in zeros else {}
            blocks, num_bits = Blocks(arrays[0], arrays[1], **beside), weight.blocks.num_bits
            return torch.from_numpy(dequantize_blocks(blocks, num_bits=num_bits, num_columns=weight.source_shape[1]))
        tensor = torch.from_numpy(arrays[0]).to(torch.float32)
        return tensor.t().contiguous() if weight.form == "transposed" else tensor

    def _stored(self, item: Initializer) -> NDArray[Any]:
        part = self._bytes[item.offset_bytes : item.offset_bytes + item.num_bytes]
        return part.view(item.dtype).reshape(item.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
