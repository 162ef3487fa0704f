"""The one data file of an artifact: written front to back, hashed on the way; read back tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..model.tensors import HEAD
from ..progress import SILENT, Progress
from .encode import encode, rope_arrays
from .layout import NUM_BITS, ROPE_COS, ROPE_SIN
from .quantize import dequantize_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .layout import Initializer, Layout


def encoded_initializers(
    tensors: Mapping[str, Tensor], config: HavocConfig, structure: Structure, layout: Layout
) -> Iterator[tuple[Initializer, NDArray[Any]]]:
    """Every initializer with its values, in file order; each source tensor is asked for once and then dropped."""
    tables = rope_arrays(config)
    for weight in layout.weights:
        table = tables.get(weight.source)
        array = tensors[weight.source].to(torch.float32).numpy() if table is None else table
        yield from zip(weight.initializers, encode(weight, array, structure), strict=True)


def write_data_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: HavocConfig,
    structure: Structure,
    layout: Layout,
    progress: Progress = SILENT,
) -> str:
    """Write all weights of `layout` to `path`; return the file's SHA-256. Gaps between tensors are zero bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as file, progress.stage("write weights", layout.num_bytes, unit="bytes") as stage:
        end_bytes = 0
        for item, array in encoded_initializers(tensors, config, structure, layout):
            gap = bytes(item.offset_bytes - end_bytes)
            content = array.reshape(-1).view(np.uint8).data
            for part in (gap, content):
                file.write(part)
                digest.update(part)
            end_bytes = item.offset_bytes + item.num_bytes
            stage.advance(len(gap) + item.num_bytes, note=item.name)
    return digest.hexdigest()


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a data file as the fp32 tensors they stand for: what the graphs should compute with."""

    def __init__(self, path: Path, layout: Layout, structure: Structure) -> None:
        """Map `path`; nothing is read until asked for."""
        self._layout, self._structure = layout, structure
        self._bytes = np.memmap(path, np.uint8, mode="r")
        self._sources = [weight.source for weight in layout.weights if weight.source not in {ROPE_COS, ROPE_SIN}]

    def __getitem__(self, source: str) -> Tensor:
        weight = self._layout[source]
        arrays = [self._stored(item) for item in weight.initializers]
        if weight.form == "blocks":
            num_bits = NUM_BITS[self._structure.weight_format]
            packed, scales = arrays
            rows = dequantize_blocks(packed, scales, num_bits=num_bits, num_columns=weight.source_shape[1])
            return torch.from_numpy(rows)
        array = arrays[0].T if weight.form == "transposed" else arrays[0]
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))

    def _stored(self, item: Initializer) -> NDArray[Any]:
        part = self._bytes[item.offset_bytes : item.offset_bytes + item.num_bytes]
        return part.view(item.dtype).reshape(item.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def is_head_tied(self) -> bool:
        """Whether the embedding table is also the head."""
        return HEAD not in self._sources
