"""From a tensor of the base (or a folded one) to the arrays that the data file holds for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import HavocError
from ..model.rope import rope_tables
from .layout import ROPE_COS, ROPE_SIN
from .quantize import Blocks, quantize_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .layout import StoredWeight

FP16_MAX = 65504.0


def encode(weight: StoredWeight, tensor: Tensor, structure: Structure) -> list[NDArray[Any]]:
    """One array per initializer of `weight`, in its dtype and shape, C-contiguous; the values come in `source_shape`.

    A value that is not finite, or beyond fp16 where fp16 is stored, is a `HavocError` that names the tensor.
    """
    peak = require_usable(weight, tensor)
    if weight.blocks is None:
        stored = tensor.t() if weight.form == "transposed" else tensor
        return [_as(weight, stored, weight.initializers[0].dtype, peak)]
    quantizer = structure.quantizer if weight.blocks == structure.blocks else "rtn"
    return encode_blocks(weight, quantize_blocks(tensor, weight.blocks, quantizer))


def encode_blocks(weight: StoredWeight, blocks: Blocks) -> list[NDArray[Any]]:
    """Blocks as the file holds them: floats in the dtype of their initializers; scales beyond it are a `HavocError`."""
    if weight.blocks is not None and weight.blocks.is_w8a8:
        return [_signed(blocks.packed[:, 0]), blocks.scales[:, 0]]
    floats = [blocks.scales] if blocks.minimums is None else [blocks.scales, blocks.minimums]
    dtype = weight.initializers[1].dtype
    stored = [_as(weight, values, dtype, _peak(values)) for values in map(torch.from_numpy, floats)]
    return [blocks.packed, *stored, *([] if blocks.zero_points is None else [blocks.zero_points])]


def _signed(values_NK: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Values around 128 as int8 [K, N] around 0, C-contiguous."""
    return np.ascontiguousarray((values_NK ^ np.uint8(128)).view(np.int8).T)


def require_usable(weight: StoredWeight, tensor: Tensor) -> float:
    """The largest absolute value; another shape, NaN or Inf is a `HavocError` that names the tensor."""
    if tuple(tensor.shape) != weight.source_shape:
        raise HavocError(
            f"{weight.source}: shape {list(tensor.shape)}, the configuration says {list(weight.source_shape)}"
        )
    peak = _peak(tensor)
    if not math.isfinite(peak):
        raise HavocError(f"{weight.source}: holds NaN or Inf, so it is not exported")
    return peak


def encode_factors(weight: StoredWeight, factors: tuple[Tensor, Tensor], structure: Structure) -> list[NDArray[Any]]:
    """The arrays of a weight stored as two factors, `_in` [r, N] and `_out` [M, r]."""
    pairs = zip(weight.factors, factors, strict=True)
    return [array for factor, tensor in pairs for array in encode(factor, tensor, structure)]


def _peak(tensor: Tensor) -> float:
    """The largest absolute value, or NaN if the tensor has one; no copy of the tensor is made."""
    if not tensor.numel():
        return 0.0
    least, most = torch.aminmax(tensor)
    return max(float(most), -float(least)) if math.isfinite(float(most)) else math.nan


def _as(weight: StoredWeight, tensor: Tensor, dtype: str, peak: float) -> NDArray[Any]:
    if dtype == "float16" and peak > FP16_MAX:
        advice = "choose --weights fp32 or --activations fp32"
        raise HavocError(f"{weight.source}: largest value {peak:g} is beyond fp16 ({FP16_MAX:g}); {advice}")
    array: NDArray[Any] = tensor.to(getattr(torch, dtype)).contiguous().numpy()
    return array


def rope_arrays(config: HavocConfig) -> dict[str, Tensor]:
    """The two RoPE tables by the name the layout stores them under, fp32 [max_seq_len, head_dim / 2]."""
    cosine, sine = rope_tables(config.attention, config.max_seq_len)
    return {ROPE_COS: torch.from_numpy(cosine), ROPE_SIN: torch.from_numpy(sine)}
