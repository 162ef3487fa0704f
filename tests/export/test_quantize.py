"""Block quantization is ONNX Runtime's, within half a step, and small widths are handled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.export.quantize import dequantize_blocks, quantize_blocks


@given(
    num_rows=st.integers(1, 20),
    num_columns=st.sampled_from([1, 31, 32, 33, 128, 352]),
    num_bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_every_value_is_within_a_step(
    num_rows: int, num_columns: int, num_bits: int, block_size: int, seed: int
) -> None:
    """Dequantized, each value differs by at most one step of its block (half, save at the clipped end of the range)."""
    weight = np.random.default_rng(seed).standard_normal((num_rows, num_columns)).astype(np.float32)
    packed, scales = quantize_blocks(weight, num_bits=num_bits, block_size=block_size)
    num_blocks = -(-num_columns // block_size)
    assert packed.shape == (num_rows, num_blocks, block_size * num_bits // 8)
    assert scales.shape == (num_rows, num_blocks)
    restored = dequantize_blocks(packed, scales, num_bits=num_bits, num_columns=num_columns)
    steps = np.repeat(np.abs(scales), block_size, axis=1)[:, :num_columns]
    assert (np.abs(restored - weight) <= steps * 1.001 + 1e-7).all()
    assert np.median(np.abs(restored - weight) / steps) <= 0.5


@pytest.mark.parametrize("num_bits", [4, 8])
def test_zero_blocks_stay_zero(num_bits: int) -> None:
    """A block of zeros has no NaN scale."""
    packed, scales = quantize_blocks(np.zeros((3, 64), np.float32), num_bits=num_bits, block_size=32)
    assert np.isfinite(scales).all()
    assert not dequantize_blocks(packed, scales, num_bits=num_bits, num_columns=64).any()


def test_int8_moves_weights_little_at_the_width_of_the_bundled_model() -> None:
    """At 352 columns (11 blocks) and 128 the relative error of int8 is below 0.6 %, of int4 below 10 %."""
    rng = np.random.default_rng(0)
    for num_columns in (128, 352):
        weight = rng.standard_normal((256, num_columns)).astype(np.float32)
        for num_bits, limit in ((8, 0.006), (4, 0.1)):
            packed, scales = quantize_blocks(weight, num_bits=num_bits, block_size=32)
            restored = dequantize_blocks(packed, scales, num_bits=num_bits, num_columns=num_columns)
            assert np.linalg.norm(restored - weight) / np.linalg.norm(weight) < limit
