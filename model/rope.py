"""The angles of rotary position embedding, float64 until the last rounding, for the decoder and the exported graph.

Legend: S positions, H head dim, F = H/2 frequencies. RoPE: Su et al., arXiv 2104.09864; frequency scaling: Llama 3.1,
arXiv 2407.21783. float32 angles are off by up to position * 2^-24 radians and differ between machines; these do not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .config import AttentionConfig, RopeScaling


def rope_frequencies(attention: AttentionConfig) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, [F] float64: theta^(-2i/H), scaled if the config says so."""
    exponents_F = np.arange(0, attention.head_dim, 2, dtype=np.float64) / attention.head_dim
    frequencies_F = float(attention.rope_theta) ** -exponents_F
    scaling = attention.rope_scaling
    return frequencies_F if scaling is None else _llama3_scaled(frequencies_F, scaling)


def _llama3_scaled(frequencies_F: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Stretch wavelengths beyond the original context by `factor`, keep the short ones, blend linearly between."""
    turns_F = scaling.original_max_seq_len * frequencies_F / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_kept_F = np.clip((turns_F - low) / (high - low), 0.0, 1.0)
    scaled_F: NDArray[np.float64] = frequencies_F * (share_kept_F + (1 - share_kept_F) / scaling.factor)
    return scaled_F


def rope_tables(attention: AttentionConfig, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every angle, each [S, F] float32, rounded once from float64."""
    angles_SF = np.outer(np.arange(num_positions, dtype=np.float64), rope_frequencies(attention))
    return np.cos(angles_SF).astype(np.float32), np.sin(angles_SF).astype(np.float32)
