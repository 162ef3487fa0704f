"""Block quantization of weight matrices for MatMulNBits, by ONNX Runtime's own native quantizers.

N rows (outputs), K columns (inputs), G = ceil(K / block_size) blocks a row. Round to nearest, symmetric: each block
of a row has one scale, the zero point is the middle of the range (8 for int4, 128 for int8). The last block is padded
with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime.capi import _pybind_state as native

if TYPE_CHECKING:
    from numpy.typing import NDArray


def quantize_blocks(
    weight_NK: NDArray[np.float32], *, num_bits: int, block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize rows in blocks: packed uint8 [N, G, block_size * num_bits / 8] and scales fp32 [N, G]."""
    num_rows, num_columns = weight_NK.shape
    num_blocks = -(-num_columns // block_size)
    packed = np.zeros((num_rows, num_blocks, block_size * num_bits // 8), np.uint8)
    scales = np.zeros((num_rows, num_blocks), np.float32)
    zero_points = np.zeros((num_rows, -(-num_blocks * num_bits // 8)), np.uint8)
    padded_KN = np.zeros((num_blocks * block_size, num_rows), np.float32)
    padded_KN[:num_columns] = weight_NK.T
    quantize = native.quantize_matmul_8bits if num_bits == 8 else native.quantize_matmul_4bits  # noqa: PLR2004 - bits
    quantize(packed, padded_KN, scales, zero_points, block_size, num_rows, num_columns, True)
    return packed, scales


def dequantize_blocks(
    packed: NDArray[np.uint8], scales: NDArray[Any], *, num_bits: int, num_columns: int
) -> NDArray[np.float32]:
    """The fp32 matrix [N, K] that packed blocks and scales stand for: (value - zero point) * scale."""
    if num_bits == 8:  # noqa: PLR2004 - bits
        values = packed.astype(np.float32) - 128.0
    else:
        values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8.0
    rows = (values * scales.astype(np.float32)[:, :, None]).reshape(len(packed), -1)
    return np.ascontiguousarray(rows[:, :num_columns])
