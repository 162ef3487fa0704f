"""Error compensation: products of quantized matrices lose less, grids are found exactly, nothing breaks at extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from havoc_core.errors import HavocError
from havoc_core.export.gptq import compensate
from havoc_core.export.quantize import Blocks, dequantize_blocks, quantize_blocks
from havoc_core.model.structure import BLOCK_SIZES, BlockFormat

MIDDLE, MINIMUMS = BlockFormat(4, 32, "middle", 2), BlockFormat(4, 32, "minimums", 2)


def restored(blocks: Blocks, num_columns: int) -> torch.Tensor:
    return torch.from_numpy(dequantize_blocks(blocks, num_bits=4, num_columns=num_columns))


def loss(weight: torch.Tensor, stored: torch.Tensor, moment: torch.Tensor) -> float:
    """tr(E H E^T) as a share of tr(W H W^T): what is lost of the products."""
    error = (stored - weight).double()
    return float((error @ moment * error).sum() / (weight.double() @ moment * weight.double()).sum())


def drawn(num_rows: int, num_columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the second moment of correlated inputs with a few large ones, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator) * 0.05
    inputs = torch.randn(2000, 24, generator=generator) @ torch.randn(24, num_columns, generator=generator)
    inputs += 0.3 * torch.randn(2000, num_columns, generator=generator)
    inputs[:, :3] *= 10
    return weight, (inputs.t() @ inputs).double()


@pytest.mark.parametrize("blocks", [MIDDLE, MINIMUMS], ids=lambda blocks: blocks.zeros)
@pytest.mark.parametrize("num_columns", [128, 176])
def test_products_lose_far_less_than_rounded(blocks: BlockFormat, num_columns: int) -> None:
    """On correlated inputs at most a quarter of what rounding to nearest loses, at no more bits; without
    compensation (inputs that are independent) it is the fit alone that helps, and a little.
    """
    weight, moment = drawn(96, num_columns)
    rounded = restored(quantize_blocks(weight, BlockFormat(4, 32, "middle", 4)), num_columns)
    compensated = restored(compensate(weight, moment, blocks), num_columns)
    assert loss(weight, compensated, moment) < 0.25 * loss(weight, rounded, moment)
    alone = torch.eye(num_columns, dtype=torch.float64)
    fitted = restored(compensate(weight, alone, blocks), num_columns)
    assert 0.5 < loss(weight, fitted, alone) / loss(weight, rounded, alone) < 1.0


@pytest.mark.parametrize("blocks", [MIDDLE, MINIMUMS], ids=lambda blocks: blocks.zeros)
def test_a_matrix_that_lies_on_a_grid_is_found_exactly(blocks: BlockFormat) -> None:
    """Values that such blocks can hold come back bit for bit: the blocks of a Q4_0 or Q4_1 file are found again."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 16, (40, 4, 32)).astype(np.uint8)
    values[:, :, 0], values[:, :, 1] = 0, 15
    packed = values[:, :, ::2] | values[:, :, 1::2] << 4
    scales = rng.uniform(0.001, 0.01, (40, 4)).astype(np.float16)
    minimums = (-rng.uniform(4, 11, (40, 4)) * scales).astype(np.float16) if blocks.zeros == "minimums" else None
    weight = restored(Blocks(packed, scales, minimums=minimums), 128)
    found = compensate(weight, drawn(1, 128)[1], blocks)
    assert torch.equal(restored(found, 128), weight)


def test_blocks_are_what_the_file_can_hold() -> None:
    """Scales and minimums are values of fp16 where the format keeps two bytes, so that nothing moves when stored."""
    weight, moment = drawn(16, 100)
    for blocks in (MIDDLE, MINIMUMS, BlockFormat(4, 16, "minimums", 2)):
        found = compensate(weight, moment, blocks)
        for floats in (found.scales, found.minimums):
            if floats is not None:
                assert np.array_equal(floats.astype(np.float16).astype(np.float32), floats)
        num_blocks = -(-100 // blocks.block_size)
        assert found.packed.shape == (16, num_blocks, blocks.block_size // 2)
        assert (found.minimums is None) == (blocks.zeros == "middle")
        assert found.zero_points is None


def test_the_same_input_gives_the_same_bytes() -> None:
    """Twice; and in halves as in one piece, since rows do not depend on each other."""
    weight, moment = drawn(64, 128)
    first, second = (compensate(weight, moment, MINIMUMS) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs)
    halves = [compensate(half, moment, MINIMUMS) for half in (weight[:32], weight[32:])]
    assert np.array_equal(first.packed, np.concatenate([half.packed for half in halves]))
    assert np.array_equal(first.scales, np.concatenate([half.scales for half in halves]))


@given(
    num_rows=st.integers(1, 5),
    num_columns=st.integers(1, 70),
    size=st.sampled_from(BLOCK_SIZES),
    zeros=st.sampled_from(["middle", "minimums"]),
    power=st.integers(-30, 4),
    kind=st.sampled_from(["random", "zero", "constant", "one large"]),
    seed=st.integers(0, 1000),
)
@example(num_rows=1, num_columns=1, size=16, zeros="minimums", power=2, kind="one large", seed=0)
@settings(max_examples=60, deadline=None)
def test_extremes(num_rows: int, num_columns: int, size: int, zeros: str, power: int, kind: str, seed: int) -> None:
    """Zeros, constants, outliers, denormal scales, inputs that are always 0: finite, and within the block's range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    if kind == "zero":
        weight.zero_()
    elif kind == "constant":
        weight.fill_(0.37)
    elif kind == "one large":
        weight[:, 0] = 1000.0
    weight *= 10.0**power
    inputs = torch.randn(num_columns, 2, generator=generator).double()
    inputs[:: 1 + seed % 3] = 0
    stored = restored(compensate(weight, inputs @ inputs.t(), BlockFormat(4, size, zeros, 2)), num_columns)  # type: ignore[arg-type]
    assert torch.isfinite(stored).all()
    assert float(stored.abs().max()) <= 4 * float(weight.abs().max()) + 1e-4
    if kind == "zero":
        assert not stored.any()


def test_inputs_that_are_not_finite_are_refused() -> None:
    """One line, that says what to do."""
    moment = torch.full((32, 32), torch.inf, dtype=torch.float64)
    with pytest.raises(HavocError, match="use another quantizer"):
        compensate(torch.ones(2, 32), moment, MIDDLE)
