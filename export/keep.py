"""Store a GGUF file's own blocks unchanged: nothing is rounded a second time.

    Q4_0  d (q - 8)        fp16 d, 4 bits       middle
    Q4_1  d q + m          fp16 d and m, 4 bits minimums
    Q8_0  d q              fp16 d, signed bytes middle, bytes moved up by 128
    Q6_K  d s (q - 32)     fp16 d, int8 s for 16 values: their exact product in fp32, 8 bits in blocks of 16

(ggml's `ggml-common.h`.) A matrix in fp16 stays in fp16; one of any other type is stored as its fp32 values. Blocks are
along a row, and rows of q and k have the order of Hugging Face.

N rows, G blocks in a row, S values in a block
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import HavocError
from ..model.gguf import GgufTensors
from ..model.structure import BlockFormat
from .quantize import Blocks, pack_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..adapt.expert import Expert
    from .layout import MatrixFormat, StoredWeight
    from .source import Source

KEPT: dict[str, MatrixFormat] = {
    "Q4_0": BlockFormat(4, 32, "middle", 2),
    "Q4_1": BlockFormat(4, 32, "minimums", 2),
    "Q8_0": BlockFormat(8, 32, "middle", 2),
    "Q6_K": BlockFormat(8, 16, "middle", 4),
    "F16": "float16",
}
"""How a matrix of each type is stored."""

_Q6_K_LOW_BYTES, _Q6_K_SCALES = 192, 16


def kept_tensors(source: Source) -> GgufTensors:
    """The file of a base; a base that is not a GGUF file, or has no blocks that can be kept, is a `HavocError`."""
    tensors = source.tensors
    if not isinstance(tensors, GgufTensors):
        raise HavocError(
            f"--weights keep stores the blocks of a GGUF file, and {source.name} is not one; take int4 or int8"
        )
    types = {tensors.block_type(name).name for name in tensors if len(tensors.shape(name)) > 1}
    if not types & {name for name, stored in KEPT.items() if isinstance(stored, BlockFormat)}:
        msg = f"{source.name}: holds {', '.join(sorted(types))}, and --weights keep stores Q4_0, Q4_1, Q8_0 and Q6_K"
        raise HavocError(f"{msg}; take int4 or int8")
    return tensors


def require_unfolded(source: Source, experts: Sequence[Expert]) -> None:
    """Refuse experts: a fold changes the values, so only the base itself can keep its blocks."""
    kept_tensors(source)
    if experts:
        raise HavocError(
            "--weights keep stores the base's own blocks, but experts change the weights: leave one of them out"
        )


def kept_formats(tensors: GgufTensors) -> dict[str, MatrixFormat]:
    """How each matrix of the file is stored, by name."""
    matrices = [name for name in tensors if len(tensors.shape(name)) > 1]
    return {name: KEPT.get(tensors.block_type(name).name, "float32") for name in matrices}


class KeptBlocks:
    """The blocks of a file; each matrix is read when it is needed."""

    def __init__(self, tensors: GgufTensors) -> None:
        self._tensors = tensors

    def __call__(self, weight: StoredWeight, blocks: BlockFormat) -> Blocks:
        """One matrix as the file has it."""
        stored = self._tensors.blocks(weight.source)
        rows, block = np.ascontiguousarray(stored.rows), stored.type
        blocks_NGX = rows.reshape(len(rows), -1, block.num_bytes)
        match block.name:
            case "Q4_0":
                return Blocks(_pairs(blocks_NGX[:, :, 2:]), _half(blocks_NGX[:, :, :2]))
            case "Q4_1":
                scales, minimums = _half(blocks_NGX[:, :, :2]), _half(blocks_NGX[:, :, 2:4])
                return Blocks(_pairs(blocks_NGX[:, :, 4:]), scales, minimums=minimums)
            case "Q8_0":
                return Blocks(blocks_NGX[:, :, 2:] ^ np.uint8(0x80), _half(blocks_NGX[:, :, :2]))
        return self._bytes_of_six_bits(weight.source, blocks_NGX, blocks.block_size)

    def _bytes_of_six_bits(self, name: str, blocks_NGX: NDArray[np.uint8], size: int) -> Blocks:
        """Scales are d s, exact in fp32; a value over its scale is its step, an integer but for rounding."""
        small = blocks_NGX[:, :, _Q6_K_LOW_BYTES : _Q6_K_LOW_BYTES + _Q6_K_SCALES].view(np.int8)
        d_NG1 = _half(blocks_NGX[:, :, _Q6_K_LOW_BYTES + _Q6_K_SCALES :])[:, :, None]
        scales = (d_NG1.astype(np.float32) * small.astype(np.float32)).reshape(len(small), -1)
        values = self._tensors[name].numpy().reshape(*scales.shape, size)
        steps = np.divide(values, scales[:, :, None], out=np.zeros_like(values), where=scales[:, :, None] != 0)
        return Blocks((np.rint(steps) + 128).astype(np.uint8), scales)


def _half(bytes_NG2: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Little-endian fp16 [N, G] of its two bytes."""
    half: NDArray[np.float16] = np.ascontiguousarray(bytes_NG2).view("<f2")[:, :, 0]
    return half


def _pairs(bytes_NGX: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Neighbours in a byte, of bytes that hold value i low and value i + S / 2 high."""
    values = np.concatenate((bytes_NGX & 15, bytes_NGX >> 4), axis=2)
    return pack_values(values.reshape(-1, values.shape[2]), 4).reshape(bytes_NGX.shape)
