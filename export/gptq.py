"""Quantization with error compensation: later columns compensate for the error of each column.

The relevant error of a matrix W [N, K] is that of its products, tr(E H E^T) with H = sum x x^T over the inputs x of a
calibration text. Columns are rounded in order. With U the upper Cholesky factor of H^-1, the error e of column k,
divided by U_kk, times row k of U is subtracted from the later columns, which minimises the error under H (GPTQ:
Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023, arXiv:2210.17323). A block's scale is fitted before its first column is
rounded, to the values at that moment: by least squares over a grid of scales, with each column weighted by 1 / U_kk^2,
the cost of an error there after compensation.

Everything runs on one thread: the same weights, inputs and processor give the same bytes.

N rows (outputs), K columns (inputs), S block size; matrices are held column by column, [K, N], so that a column is
contiguous
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import HavocError
from .quantize import Blocks, pack_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..model.structure import BlockFormat

DAMPING = 0.01
"""The share of its mean that is added to the diagonal of H: the published setting."""

_MAX_DAMPING = 1.0
_GRID = (1.0, 1.08, 1.04, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7)
"""Shares of a block's range that its steps may span; the first is the whole range."""

_SLICE_ROWS = 4096
_FP16_MAX = torch.finfo(torch.float16).max


class Fit(NamedTuple):
    """Scale and lowest value [N] of one block of every row; a value is scale q + offset, q in 0 ... 2^bits - 1."""

    scale: Tensor
    offset: Tensor


@torch.inference_mode()
def compensate(weight_NK: Tensor, hessian_KK: Tensor, blocks: BlockFormat) -> Blocks:
    """Quantize a finite matrix so that its products with inputs of second moment `hessian_KK` change little.

    `hessian_KK` fp64 [K, K] may have any scale and rank. A column whose input is always 0 is rounded without
    compensation.
    """
    upper_KK = _upper_factor(hessian_KK)
    num_rows, num_columns = weight_NK.shape
    num_blocks, size = blocks.num_blocks(num_columns), blocks.block_size
    values = np.zeros((num_rows, num_blocks * size), np.uint8)
    scales, offsets = (np.zeros((num_rows, num_blocks), np.float32) for _ in range(2))
    for rows in _slices(num_rows):
        left_KN = weight_NK[rows].to(torch.float32).t().contiguous()
        for index, start in enumerate(range(0, num_columns, size)):
            stop = min(start + size, num_columns)
            block_SN = left_KN[start:stop]
            factor_SS = upper_KK[start:stop, start:stop]
            fit = fit_block(block_SN, 1 / factor_SS.diagonal().square(), blocks)
            values_SN, errors_SN = _rounded(block_SN, factor_SS, fit, blocks)
            left_KN[stop:] -= upper_KK[start:stop, stop:].t() @ errors_SN
            values[rows, start:stop] = values_SN.t().to(torch.uint8).numpy()
            scales[rows, index], offsets[rows, index] = fit.scale.numpy(), fit.offset.numpy()
    packed = pack_values(values, blocks.num_bits).reshape(num_rows, num_blocks, -1)
    return Blocks(packed, scales, minimums=offsets if blocks.zeros == "minimums" else None)


def _slices(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _SLICE_ROWS, num_rows)) for start in range(0, num_rows, _SLICE_ROWS))


def _upper_factor(hessian_KK: Tensor) -> Tensor:
    """U fp32 [K, K], upper triangular, with U^T U = (H + damping)^-1."""
    matrix_KK = hessian_KK.to(torch.float64).clone()
    diagonal_K = matrix_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1.0
    damping, mean = DAMPING, float(diagonal_K.mean())
    while damping <= _MAX_DAMPING:
        damped_KK = matrix_KK + damping * mean * torch.eye(len(matrix_KK), dtype=torch.float64)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed:
            upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
        if not failed and bool(upper_KK.isfinite().all()):
            factor_KK: Tensor = upper_KK.to(torch.float32)
            return factor_KK
        damping *= 10
    raise HavocError(
        "gptq: the inputs of a matrix on the calibration text are not finite or far out of range; use another quantizer"
    )


def _rounded(block_SN: Tensor, factor_SS: Tensor, fit: Fit, blocks: BlockFormat) -> tuple[Tensor, Tensor]:
    """Stored values [S, N] of one block, and each column's error over its U_kk; `block_SN` is used up."""
    top = (1 << blocks.num_bits) - 1
    inverse_N = torch.where(fit.scale != 0, 1 / fit.scale, 0.0)
    values_SN, errors_SN = torch.empty_like(block_SN), torch.empty_like(block_SN)
    for column in range(len(block_SN)):
        x_N = block_SN[column]
        values_N = ((x_N - fit.offset) * inverse_N).round_().clamp_(0, top)
        errors_N = (x_N - torch.addcmul(fit.offset, values_N, fit.scale)) / factor_SS[column, column]
        block_SN[column + 1 :] -= factor_SS[column, column + 1 :, None] * errors_N
        values_SN[column], errors_SN[column] = values_N, errors_N
    return values_SN, errors_SN


def fit_block(x_SN: Tensor, weights_S: Tensor, blocks: BlockFormat) -> Fit:
    """The scale and offset of each row's block with the least weighted squared error over the grid, as stored."""
    fit = _fit_minimums if blocks.zeros == "minimums" else _fit_middle
    weights_S1 = (weights_S / weights_S.mean())[:, None]
    return fit(x_SN, weights_S1, blocks)


def _fit_middle(x_SN: Tensor, weights_S1: Tensor, blocks: BlockFormat) -> Fit:
    """Steps from -2^(bits-1): the value furthest from 0, or its negative, is on the lowest step."""
    middle = 1 << (blocks.num_bits - 1)
    furthest_N = x_SN.gather(0, x_SN.abs().argmax(0, keepdim=True))[0]
    best_N, scale_N = torch.full_like(furthest_N, torch.inf), torch.zeros_like(furthest_N)
    weighted_SN = weights_S1 * x_SN
    for share in _GRID:
        for sign in (-1, 1):
            first_N = _stored(furthest_N * (sign * share / middle), blocks)
            inverse_N = torch.where(first_N != 0, 1 / first_N, 0.0)
            steps_SN = (x_SN * inverse_N).round_().clamp_(-middle, middle - 1)
            squares_N = (weights_S1 * steps_SN.square()).sum(0)
            fitted_N = _stored(torch.where(squares_N > 0, (weighted_SN * steps_SN).sum(0) / squares_N, 0.0), blocks)
            cost_N = (weights_S1 * (x_SN - steps_SN * fitted_N).square()).sum(0)
            is_better = cost_N < best_N
            best_N, scale_N = torch.where(is_better, cost_N, best_N), torch.where(is_better, fitted_N, scale_N)
    return Fit(scale_N, scale_N * -middle)


def _fit_minimums(x_SN: Tensor, weights_S1: Tensor, blocks: BlockFormat) -> Fit:
    """Steps from the block's smallest value to its largest, or over a part of that range, each fitted to its line."""
    top = (1 << blocks.num_bits) - 1
    low_N, high_N = x_SN.amin(0), x_SN.amax(0)
    middle_N, range_N = (low_N + high_N) / 2, high_N - low_N
    best_N = torch.full_like(low_N, torch.inf)
    scale_N, offset_N = torch.zeros_like(low_N), _stored(middle_N, blocks)
    for share in _GRID:
        first = _stored(range_N * share / top, blocks), _stored(middle_N - range_N * share / 2, blocks)
        steps_SN = _steps(x_SN, *first, top)
        for scale, offset in (first, _line(x_SN, steps_SN, weights_S1, blocks)):
            nearest_SN = _steps(x_SN, scale, offset, top)
            cost_N = (weights_S1 * (x_SN - nearest_SN * scale - offset).square()).sum(0)
            is_better = cost_N < best_N
            best_N = torch.where(is_better, cost_N, best_N)
            scale_N, offset_N = torch.where(is_better, scale, scale_N), torch.where(is_better, offset, offset_N)
    return Fit(scale_N, offset_N)


def _steps(x_SN: Tensor, scale_N: Tensor, offset_N: Tensor, top: int) -> Tensor:
    inverse_N = torch.where(scale_N != 0, 1 / scale_N, 0.0)
    return ((x_SN - offset_N) * inverse_N).round_().clamp_(0, top)


def _line(x_SN: Tensor, steps_SN: Tensor, weights_S1: Tensor, blocks: BlockFormat) -> tuple[Tensor, Tensor]:
    """Scale and offset of the line through (steps, x) with the least weighted squares."""
    total = weights_S1.sum()
    mean_x_N, mean_steps_N = (weights_S1 * x_SN).sum(0) / total, (weights_S1 * steps_SN).sum(0) / total
    from_mean_SN = steps_SN - mean_steps_N
    variance_N = (weights_S1 * from_mean_SN.square()).sum(0)
    slope_N = torch.where(variance_N > 0, (weights_S1 * from_mean_SN * (x_SN - mean_x_N)).sum(0) / variance_N, 0.0)
    slope_N = _stored(slope_N, blocks)
    return slope_N, _stored(mean_x_N - slope_N * mean_steps_N, blocks)


def _stored(x_N: Tensor, blocks: BlockFormat) -> Tensor:
    """A scale or an offset in the form of the file; values beyond fp16 become the largest fp16 value."""
    if blocks.scale_bytes != 2:  # noqa: PLR2004 - fp16
        return x_N
    return x_N.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16).to(torch.float32)
