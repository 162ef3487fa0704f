"""Block quantization of weight matrices for MatMulNBits and GatherBlockQuantized.

Each block of `block_size` neighbours in a row shares one scale and, unless symmetric, one zero point: a stored value v
means scale (v - zero point). Zero points are integers for every quantizer: with float zero points MatMulNBits unpacks
the matrix (24 times slower for one token on a CPU, int8 not at all), and GatherBlockQuantized cannot read them. The
last block of a row is padded with zeros.

    rtn      round to nearest, as ONNX Runtime's own native quantizers; the same bytes if symmetric
    hqq      half-quadratic quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): minimises sum |error|^0.7,
             so that outliers do not dominate. The original fits a float zero point and keeps the scale; here the zero
             point is an integer, and the same alternation fits the scale
    k_quant  llama.cpp's make_qkx2_quants: weighted least squares, in which errors of large weights count more, over a
             grid of scales; its float minimum becomes an integer zero point inside the search instead of after it

hqq and k_quant start from rtn's scale and keep the better result by their own norm, block by block, so neither is worse
than rtn in that norm.

N rows (outputs), K columns (inputs), S block size, G = ceil(K / S) blocks a row, B blocks of some rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from onnxruntime.capi import _pybind_state as native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from ..model.structure import BlockFormat, Quantizer

    Floats = NDArray[np.floating[Any]]
    Arrays = tuple[NDArray[np.uint8], Floats, NDArray[np.uint8]]
    Fit = Callable[[Floats, Floats, int], tuple[Floats, Floats]]

_SLICE_VALUES = 1 << 16
"""Rows are independent, so matrices are processed in slices of about this many values, which stay in the cache."""

_GRID = np.arange(-10, 10, dtype=np.float32) * np.float32(0.1)
"""By how much k_quant varies the number of steps in a block's range (llama.cpp: rmin -1, rdelta 0.1, nstep 20)."""

_HQQ_NORM, _HQQ_BETA, _HQQ_KAPPA, _HQQ_STEPS = 0.7, 10.0, 1.01, 20
"""hqq's published settings: the norm p, the penalty beta and its growth kappa, the number of alternations."""


class Blocks(NamedTuple):
    """A quantized matrix: packed uint8 [N, G, S bits / 8], scales [N, G], zero points uint8 [N, G bits / 8].

    Two int4 values share a byte, the first in its low half; the zero points are packed in the same way. If value q
    means scale q + minimum, there are `minimums` [N, G] instead; both are None if zero is in the middle.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[np.uint8] | None = None
    minimums: NDArray[Any] | None = None


def quantize_blocks(weight_NK: Tensor, blocks: BlockFormat, quantizer: Quantizer = "rtn") -> Blocks:
    """Quantize the rows of a finite matrix of any float dtype into `blocks` with zeros in the middle or zero points."""
    num_rows, num_columns = weight_NK.shape
    num_bits, size = blocks.num_bits, blocks.block_size
    num_blocks, is_symmetric = blocks.num_blocks(num_columns), blocks.zeros == "middle"
    packed = np.zeros((num_rows, num_blocks, size * num_bits // 8), np.uint8)
    scales = np.zeros((num_rows, num_blocks), np.float32)
    zero_points = np.zeros((num_rows, -(-num_blocks * num_bits // 8)), np.uint8)
    fit = {"rtn": _nearest, "hqq": _half_quadratic, "k_quant": _weighted_grid}[quantizer]
    for rows in row_slices(num_rows, num_columns):
        out = packed[rows], scales[rows], zero_points[rows]
        if is_symmetric:
            _round_to_nearest(weight_NK[rows], out, blocks)
        else:
            _fit_blocks(weight_NK[rows], out, fit, num_bits)
    return Blocks(packed, scales, None if is_symmetric else zero_points)


def row_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows that together are a whole matrix, each small enough that a copy of it does not matter."""
    step = max(_SLICE_VALUES // max(num_columns, 1), 16)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _round_to_nearest(weight_NK: Tensor, out: Arrays, blocks: BlockFormat) -> None:
    if _round_symmetric(weight_NK, out, blocks.num_bits):
        return
    (num_rows, num_columns), (packed, scales, zero_points) = weight_NK.shape, out
    padded_KN = torch.zeros(scales.shape[1] * blocks.block_size, num_rows)
    padded_KN[:num_columns] = weight_NK.t()
    quantize = native.quantize_matmul_8bits if blocks.num_bits == 8 else native.quantize_matmul_4bits  # noqa: PLR2004
    sizes = blocks.block_size, num_rows, num_columns
    quantize(packed, padded_KN.numpy(), scales, zero_points, *sizes, True)


def _round_symmetric(weight_NK: Tensor, out: Arrays, num_bits: int) -> bool:
    """Write the same bytes as the native quantizer, three times faster; False if that is not possible.

    The value furthest from zero becomes the lowest step, with either sign; halves are rounded up. It is not possible
    for scales too small for a reciprocal, and for the unused half byte after an odd row of int4.
    """
    packed, scales, _ = out
    (num_rows, num_columns), size = weight_NK.shape, packed.shape[2] * 8 // num_bits
    if num_columns * num_bits % 8:
        return False
    padded_NK = np.zeros((num_rows, scales.shape[1] * size), np.float32)
    padded_NK[:, :num_columns] = weight_NK.to(torch.float32).numpy()
    middle, (low, high) = np.float32(1 << (num_bits - 1)), _extremes(padded_NK, size)
    furthest = np.where(high > -low, high, low).reshape(scales.shape)
    np.divide(furthest, -middle, out=scales)
    with np.errstate(over="ignore"):
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    if not np.isfinite(inverse).all():
        return False
    x_NGS = padded_NK.reshape(*scales.shape, size)
    x_NGS *= inverse[:, :, None]
    x_NGS += middle
    x_NGS += np.float32(0.5)
    values = np.minimum(x_NGS, 2 * middle - np.float32(0.5), out=x_NGS).astype(np.uint8)
    values.reshape(num_rows, -1)[:, num_columns:] = 0
    packed[:] = values if num_bits == 8 else _pairs(values)  # noqa: PLR2004 - bits
    return True


def _pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two neighbours in a byte, the first in its low half."""
    both = values.view("<u2")
    pairs: NDArray[np.uint8] = (both | both >> 4).astype(np.uint8)
    return pairs


def _fit_blocks(weight_NK: Tensor, out: Arrays, fit: Fit, num_bits: int) -> None:
    """Quantize blocks with the scale and zero point that `fit` finds, in units of each block's rtn step."""
    packed, scales, zero_points = out
    (num_rows, num_blocks), num_columns = scales.shape, weight_NK.shape[1]
    size = packed.shape[2] * 8 // num_bits
    padded_NK = np.zeros((num_rows, num_blocks * size), np.float32)
    padded_NK[:, :num_columns] = weight_NK.to(torch.float32).numpy()
    x_BS, top = padded_NK.reshape(-1, size), (1 << num_bits) - 1
    low_B, high_B = _extremes(padded_NK, size)
    low_B1, high_B1 = np.minimum(low_B, 0)[:, None] / np.float32(top), np.maximum(high_B, 0)[:, None] / np.float32(top)
    step_B1 = high_B1 - low_B1
    step_B1[step_B1 == 0] = 1
    np.divide(x_BS, step_B1, out=x_BS)
    scale_B1, zero_B1 = fit(x_BS, low_B1 / step_B1 * np.float32(top), top)
    values = (_offsets(x_BS, 1 / scale_B1, zero_B1, top) + zero_B1).astype(np.uint8)
    scales[:] = (scale_B1 * step_B1).reshape(scales.shape)
    packed[:] = pack_values(values, num_bits).reshape(packed.shape)
    zero_points[:] = pack_values(zero_B1.astype(np.uint8).reshape(num_rows, num_blocks), num_bits)


def _extremes(padded_NK: Floats, size: int) -> tuple[Floats, Floats]:
    """Smallest and largest value of each block [B]."""
    starts, values = np.arange(0, padded_NK.size, size), padded_NK.reshape(-1)
    return np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)


def _offsets(x_BS: Floats, inverse_B1: Floats, zero_B1: Floats, top: int) -> Floats:
    """Whole steps [B, S] from the zero point to the nearest value that can be stored."""
    offsets_BS: Floats = np.rint(x_BS * inverse_B1)
    np.maximum(offsets_BS, -zero_B1, out=offsets_BS)
    return np.minimum(offsets_BS, top - zero_B1, out=offsets_BS)


def _nearest(_x_BS: Floats, low_B1: Floats, top: int) -> tuple[Floats, Floats]:
    """Round to nearest: the unchanged step, and the zero point [B, 1] for the smallest value."""
    return np.ones_like(low_B1), np.clip(np.rint(-low_B1), 0, top)


def _weighted_grid(x_BS: Floats, low_B1: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and zero point [B, 1] with the least sum w (scale q - x)^2, w = |x| + rms(x), over the grid.

    For given steps q the best scale is sum w q x / sum w q^2, and leaves sum w x^2 - (sum w q x)^2 / sum w q^2.
    """
    weights_BS = np.abs(x_BS) + np.sqrt(np.square(x_BS).mean(1, keepdims=True))
    best_B1, scale_B1, zero_B1 = np.full_like(low_B1, -1), np.ones_like(low_B1), np.zeros_like(low_B1)
    for shift in _GRID:
        inverse = np.float32((top + shift) / top)
        candidate_B1 = np.clip(np.rint(-low_B1 * inverse), 0, top)
        steps_BS = _offsets(x_BS, np.asarray(inverse), candidate_B1, top)
        weighted_BS = weights_BS * steps_BS
        squares_B1 = np.einsum("bs,bs->b", weighted_BS, steps_BS)[:, None]
        product_B1 = np.einsum("bs,bs->b", weighted_BS, x_BS)[:, None]
        fitted_B1 = np.divide(product_B1, squares_B1, out=np.ones_like(squares_B1), where=squares_B1 > 0)
        is_better = (fitted_B1 * product_B1 > best_B1) & (fitted_B1 > 0)
        for best, found in ((best_B1, fitted_B1 * product_B1), (scale_B1, fitted_B1), (zero_B1, candidate_B1)):
            np.copyto(best, found, where=is_better)
    return scale_B1, zero_B1


def _half_quadratic(x_BS: Floats, low_B1: Floats, top: int) -> tuple[Floats, Floats]:
    """Scale and zero point [B, 1] with a small sum |scale q - x|^p, rtn's or better.

    Alternates between the part of each error that |e|^p leaves after shrinking (the generalised soft threshold of
    hqq) and the scale that fits the rest by least squares.
    """
    scale_B1, zero_B1 = _nearest(x_BS, low_B1, top)
    candidate_B1 = scale_B1.copy()
    least_B1, beta = np.full_like(low_B1, np.inf), _HQQ_BETA
    for _ in range(_HQQ_STEPS):
        steps_BS = _offsets(x_BS, 1 / candidate_B1, zero_B1, top)
        error_BS = x_BS - candidate_B1 * steps_BS
        size_BS = np.abs(error_BS) + np.float32(1e-8)
        slope_BS = np.exp(np.log(size_BS) * np.float32(_HQQ_NORM - 1))
        norm_B1 = np.einsum("bs,bs->b", size_BS, slope_BS)[:, None]
        is_better = norm_B1 < least_B1
        np.copyto(least_B1, norm_B1, where=is_better)
        np.copyto(scale_B1, candidate_B1, where=is_better)
        left_BS = np.maximum(1 - slope_BS / size_BS / np.float32(beta), 0)
        squares_B1 = np.einsum("bs,bs->b", steps_BS, steps_BS)[:, None]
        product_B1 = np.einsum("bs,bs->b", x_BS - left_BS * error_BS, steps_BS)[:, None]
        is_usable = (squares_B1 > 0) & (product_B1 > 0)
        candidate_B1 = np.divide(product_B1, squares_B1, out=scale_B1.copy(), where=is_usable)
        beta *= _HQQ_KAPPA
    return scale_B1, zero_B1


def pack_values(values: NDArray[np.uint8], num_bits: int) -> NDArray[np.uint8]:
    """Rows of values as MatMulNBits stores them; an odd row of int4 ends with an empty half byte."""
    if num_bits == 8:  # noqa: PLR2004 - bits
        return values
    packed = np.zeros((len(values), -(-values.shape[1] // 2)), np.uint8)
    packed |= values[:, ::2]
    packed[:, : values.shape[1] // 2] |= values[:, 1::2] << 4
    return packed


def dequantize_blocks(blocks: Blocks, *, num_bits: int, num_columns: int) -> NDArray[np.float32]:
    """The fp32 matrix [N, K] of packed blocks: (value - zero point) * scale, or value * scale + minimum."""
    packed, scales, zero_points, minimums = blocks
    weight_NK = np.empty((len(packed), num_columns), np.float32)
    for rows in row_slices(*weight_NK.shape):
        values = _unpacked(packed[rows], num_bits)
        zeros = _unpacked(zero_points[rows], num_bits)[:, : scales.shape[1], None] if zero_points is not None else None
        if minimums is None:
            values -= np.float32(1 << (num_bits - 1)) if zeros is None else zeros
        values *= scales[rows].astype(np.float32)[:, :, None]
        if minimums is not None:
            values += minimums[rows].astype(np.float32)[:, :, None]
        weight_NK[rows] = values.reshape(len(values), -1)[:, :num_columns]
    return weight_NK


def _unpacked(packed: NDArray[np.uint8], num_bits: int) -> Floats:
    """Stored values [..., n] of packed bytes."""
    if num_bits == 8:  # noqa: PLR2004 - bits
        return packed.astype(np.float32)
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    values[..., ::2] = packed & 15
    values[..., 1::2] = packed >> 4
    return values
