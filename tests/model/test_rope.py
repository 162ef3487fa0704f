"""Rotary angles: exact to the last bit of float32, scaled as Llama 3.1 says."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from havoc_core.model.config import AttentionConfig, RopeScaling
from havoc_core.model.rope import rope_frequencies, rope_tables

PLAIN = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=64)
SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
SCALED = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=64, rope_theta=5e5, rope_scaling=SCALING)


def test_frequencies_are_powers_of_theta() -> None:
    """Pair i turns theta^(-2i/H) radians a position."""
    assert rope_frequencies(PLAIN) == pytest.approx([1e4 ** (-2 * pair / 64) for pair in range(32)], rel=1e-14)


def test_tables_are_the_nearest_float32() -> None:
    """Far out, where float32 angles are wrong in the fourth digit, every entry is rounded from an exact angle."""
    cos, sin = rope_tables(PLAIN, 8192)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (8192, 32)
    for position in (0, 1, 4095, 8191):
        for pair in (0, 1, 17, 31):
            angle = math.remainder(position * 1e4 ** (-2 * pair / 64), 2 * math.pi)
            assert abs(Fraction(float(cos[position, pair])) - Fraction(math.cos(angle))) < Fraction(1, 2**24)
            assert abs(Fraction(float(sin[position, pair])) - Fraction(math.sin(angle))) < Fraction(1, 2**24)


def test_scaling_is_transformers_scaling() -> None:
    """Llama 3 frequencies agree with transformers' to float32 precision."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert rope_frequencies(SCALED) == pytest.approx(theirs.double().numpy(), rel=1e-6)


def test_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    """The fastest pair is untouched, the slowest is 32 times slower, and order is kept."""
    plain = rope_frequencies(AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=64, rope_theta=5e5))
    scaled = rope_frequencies(SCALED)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 32, rel=1e-12)
    assert (np.diff(scaled) < 0).all()
