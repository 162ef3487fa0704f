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
    from collections.abc import Iterator

    from numpy.typing import NDArray

_SLICE_VALUES = 1 << 22
"""Rows are independent, so matrices are worked through in slices of about so many values: 16 MiB of fp32."""


def quantize_blocks(
    weight_NK: NDArray[np.float32], *, num_bits: int, block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize rows in blocks: packed uint8 [N, G, block_size * num_bits / 8] and scales fp32 [N, G]."""
    num_rows, num_columns = weight_NK.shape
    num_blocks = -(-num_columns // block_size)
    packed = np.zeros((num_rows, num_blocks, block_size * num_bits // 8), np.uint8)
    scales = np.zeros((num_rows, num_blocks), np.float32)
    zero_points = np.zeros((num_rows, -(-num_blocks * num_bits // 8)), np.uint8)
    quantize = native.quantize_matmul_8bits if num_bits == 8 else native.quantize_matmul_4bits  # noqa: PLR2004 - bits
    for rows in row_slices(num_rows, num_columns):
        part_NK = weight_NK[rows]
        padded_KN = np.zeros((num_blocks * block_size, len(part_NK)), np.float32)
        padded_KN[:num_columns] = part_NK.T
        quantize(packed[rows], padded_KN, scales[rows], zero_points[rows], block_size, len(part_NK), num_columns, True)
    return packed, scales


def row_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows that together are a whole matrix, each small enough that a copy of it does not matter."""
    step = max(_SLICE_VALUES // max(num_columns, 1), 1)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def dequantize_blocks(
    packed: NDArray[np.uint8], scales: NDArray[Any], *, num_bits: int, num_columns: int
) -> NDArray[np.float32]:
    """The fp32 matrix [N, K] that packed blocks and scales stand for: (value - zero point) * scale."""
    weight_NK = np.empty((len(packed), num_columns), np.float32)
    for rows in row_slices(*weight_NK.shape):
        values = _values(packed[rows], num_bits) * scales[rows].astype(np.float32)[:, :, None]
        weight_NK[rows] = values.reshape(len(values), -1)[:, :num_columns]
    return weight_NK


def _values(packed: NDArray[np.uint8], num_bits: int) -> NDArray[np.float32]:
    """Unpacked values minus their zero point, [N, G, block_size]."""
    if num_bits == 8:  # noqa: PLR2004 - bits
        return packed.astype(np.float32) - np.float32(128)
    values = np.empty((*packed.shape[:2], 2 * packed.shape[2]), np.float32)
    np.subtract(packed & 15, 8, out=values[..., ::2], dtype=np.float32)
    np.subtract(packed >> 4, 8, out=values[..., 1::2], dtype=np.float32)
    return values
