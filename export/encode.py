"""From a tensor of the base (or a folded one) to the arrays that the data file holds for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HavocError
from ..model.rope import rope_tables
from .layout import NUM_BITS, ROPE_COS, ROPE_SIN
from .quantize import quantize_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .layout import StoredWeight

FP16_MAX = 65504.0


def encode(weight: StoredWeight, array: NDArray[Any], structure: Structure) -> list[NDArray[Any]]:
    """One array per initializer of `weight`, in its dtype and shape, C-contiguous; the values come in `source_shape`.

    A value that is not finite, or beyond fp16 where fp16 is stored, is a `HavocError` that names the tensor.
    """
    if array.shape != weight.source_shape:
        msg = f"{weight.source}: shape {list(array.shape)}, the configuration says {list(weight.source_shape)}"
        raise HavocError(msg)
    peak = float(np.maximum(array.max(), -array.min())) if array.size else 0.0
    if not np.isfinite(peak):
        msg = f"{weight.source}: holds NaN or Inf, so it is not exported"
        raise HavocError(msg)
    if weight.form == "blocks":
        values = np.ascontiguousarray(array, dtype=np.float32)
        num_bits = NUM_BITS[structure.weight_format]
        packed, scales = quantize_blocks(values, num_bits=num_bits, block_size=structure.block_size)
        return [packed, _as(weight, scales, weight.initializers[1].dtype, float(scales.max()))]
    stored = array.T if weight.form == "transposed" else array
    return [_as(weight, stored, weight.initializers[0].dtype, peak)]


def _as(weight: StoredWeight, array: NDArray[Any], dtype: str, peak: float) -> NDArray[Any]:
    if dtype == "float16" and peak > FP16_MAX:
        advice = "choose --weights fp32 or --activations fp32"
        msg = f"{weight.source}: largest value {peak:g} is beyond fp16 ({FP16_MAX:g}); {advice}"
        raise HavocError(msg)
    return np.ascontiguousarray(array, dtype=dtype)


def rope_arrays(config: HavocConfig) -> dict[str, NDArray[np.float32]]:
    """The two RoPE tables by the name the layout stores them under, fp32 [max_seq_len, head_dim / 2]."""
    cosine, sine = rope_tables(config.attention, config.max_seq_len)
    return {ROPE_COS: cosine, ROPE_SIN: sine}
