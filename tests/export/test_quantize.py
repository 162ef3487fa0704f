"""Block quantization: values within a step, no quantizer worse than rtn by its own norm, nothing breaks at extremes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.capi import _pybind_state as native

from havoc_core.export.quantize import Blocks, dequantize_blocks, quantize_blocks, row_slices
from havoc_core.model.structure import BITS_PER_WEIGHT, BLOCK_SIZES, Structure

FORMATS = {
    "int4": ("int4", True, "rtn"),
    "int8": ("int8", True, "rtn"),
    "int4a": ("int4", False, "rtn"),
    "int8a": ("int8", False, "rtn"),
    "hqq": ("int4", False, "hqq"),
    "k_quant": ("int4", False, "k_quant"),
    "k_quant8": ("int8", False, "k_quant"),
}


def structure_of(name: str, block_size: int = 32) -> Structure:
    weight_format, is_symmetric, quantizer = FORMATS[name]
    return Structure(weight_format, "fp32", block_size, is_symmetric, quantizer)


def quantized(weight: torch.Tensor, name: str, block_size: int = 32) -> Blocks:
    structure = structure_of(name, block_size)
    return quantize_blocks(weight, structure.blocks, structure.quantizer)


def restored(weight: NDArray[np.float32], structure: Structure) -> NDArray[np.float32]:
    blocks = quantize_blocks(torch.from_numpy(weight), structure.blocks, structure.quantizer)
    return dequantize_blocks(blocks, num_bits=BITS_PER_WEIGHT[structure.weight_format], num_columns=weight.shape[1])


def norm(error: NDArray[np.float32]) -> float:
    """What hqq minimises: sum |error|^0.7."""
    return float((np.abs(error).astype(np.float64) ** 0.7).sum())


def weighted(weight: NDArray[np.float32], error: NDArray[np.float32], block_size: int) -> float:
    """What k_quant minimises: sum (|w| + rms of the block) error^2."""
    blocks = weight.astype(np.float64).reshape(-1, block_size)
    importance = np.abs(blocks) + np.sqrt((blocks**2).mean(1, keepdims=True))
    return float((importance * error.reshape(-1, block_size) ** 2).sum())


def matrices(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    shape = (64, 256)
    drawn = {
        "gaussian": rng.standard_normal(shape),
        "small": rng.standard_normal(shape) * 0.02,
        "skewed": rng.standard_normal(shape) + 1,
        "outliers": rng.standard_t(3, size=shape),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}


@given(
    num_rows=st.integers(1, 20),
    num_columns=st.sampled_from([1, 31, 32, 33, 128, 352]),
    name=st.sampled_from(["int4", "int8", "int4a", "int8a"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_every_value_is_within_a_step(num_rows: int, num_columns: int, name: str, block_size: int, seed: int) -> None:
    """Dequantized, each value differs by at most one step of its block (half, save at the clipped end of the range)."""
    weight = np.random.default_rng(seed).standard_normal((num_rows, num_columns)).astype(np.float32)
    structure = structure_of(name, block_size)
    num_bits, num_blocks = BITS_PER_WEIGHT[structure.weight_format], -(-num_columns // block_size)
    blocks = quantize_blocks(torch.from_numpy(weight), structure.blocks, structure.quantizer)
    assert blocks.packed.shape == (num_rows, num_blocks, block_size * num_bits // 8)
    assert blocks.scales.shape == (num_rows, num_blocks)
    if structure.is_symmetric:
        assert blocks.zero_points is None
    else:
        assert blocks.zero_points is not None
        assert blocks.zero_points.shape == (num_rows, -(-num_blocks * num_bits // 8))
    error = np.abs(dequantize_blocks(blocks, num_bits=num_bits, num_columns=num_columns) - weight)
    steps = np.repeat(np.abs(blocks.scales), block_size, axis=1)[:, :num_columns]
    assert (error <= steps * 1.001 + 1e-7).all()
    assert np.median(error / steps) <= 0.5


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_zero_points_pay_on_skewed_rows(weight_format: str, block_size: int) -> None:
    """Rows that lean to one side lose less with a zero point of their own."""
    weight = matrices(np.random.default_rng(0))["skewed"]
    symmetric, asymmetric = (structure_of(name, block_size) for name in (weight_format, f"{weight_format}a"))
    lost = [np.linalg.norm(restored(weight, structure) - weight) for structure in (symmetric, asymmetric)]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("kind", ["gaussian", "small", "skewed", "outliers"])
def test_no_quantizer_is_worse_than_rtn(kind: str, block_size: int) -> None:
    """By its own norm each beats rounding to nearest clearly, whatever the scale of the weights; int8 too."""
    weight = matrices(np.random.default_rng(1))[kind]
    errors = {name: restored(weight, structure_of(name, block_size)) - weight for name in FORMATS}
    assert norm(errors["hqq"]) < 0.99 * norm(errors["int4a"])
    for ours, rtn in (("k_quant", "int4a"), ("k_quant8", "int8a")):
        assert weighted(weight, errors[ours], block_size) < 0.99 * weighted(weight, errors[rtn], block_size)


@pytest.mark.parametrize("kind", ["gaussian", "small", "skewed", "outliers"])
def test_no_single_block_is_worse_than_rtn(kind: str) -> None:
    """What is better is kept block by block, so none pays for the others."""
    weight = matrices(np.random.default_rng(5))[kind]
    error = {name: (restored(weight, structure_of(name)) - weight).reshape(-1, 32) for name in FORMATS}
    norms = {name: (np.abs(blocks).astype(np.float64) ** 0.7).sum(1) for name, blocks in error.items()}
    assert (norms["hqq"] <= norms["int4a"] * (1 + 1e-4)).all()
    blocks = weight.astype(np.float64).reshape(-1, 32)
    importance = np.abs(blocks) + np.sqrt((blocks**2).mean(1, keepdims=True))
    losses = {name: (importance * error[name] ** 2).sum(1) for name in ("k_quant", "int4a")}
    assert (losses["k_quant"] <= losses["int4a"] * (1 + 1e-4)).all()


@pytest.mark.parametrize(("name", "num_bits"), [("k_quant", 4), ("k_quant8", 8)])
@pytest.mark.parametrize("kind", ["gaussian", "small", "skewed", "outliers"])
def test_k_quant_is_better_than_onnx_runtimes(kind: str, name: str, num_bits: int) -> None:
    """ONNX Runtime's own k-quant rounds its minimum to an integer after the search; inside the search it loses less."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    weight = matrices(np.random.default_rng(2))[kind]
    values, scales, zero_points = quant_tensor_k_quant_cpu(weight, num_bits, 32)
    theirs = ((values - zero_points) * scales).reshape(weight.shape) - weight
    ours = restored(weight, structure_of(name)) - weight
    assert weighted(weight, ours, 32) < weighted(weight, theirs, 32)


@pytest.mark.parametrize(("name", "num_bits"), [("int4a", 4), ("int8a", 8)])
@pytest.mark.parametrize("kind", ["gaussian", "small", "skewed", "outliers"])
def test_asymmetric_rounding_is_the_native_quantizers(kind: str, name: str, num_bits: int) -> None:
    """ONNX Runtime's native quantizer gives the same scales and zero points, and values that differ at ties alone."""
    weight, size = matrices(np.random.default_rng(4))[kind], 32
    num_rows, num_columns = weight.shape
    packed, scales, zero_points, _ = quantized(torch.from_numpy(weight), name, size)
    theirs = np.zeros_like(packed), np.zeros_like(scales), np.zeros_like(zero_points)
    quantize = native.quantize_matmul_8bits if num_bits == 8 else native.quantize_matmul_4bits
    quantize(theirs[0], weight.T.copy(), theirs[1], theirs[2], size, num_rows, num_columns, False)
    assert np.allclose(scales, theirs[1], rtol=1e-6)
    assert (zero_points == theirs[2]).mean() > 0.999
    assert (packed == theirs[0]).mean() > 0.999


@pytest.mark.parametrize("kind", ["gaussian", "small", "skewed", "outliers"])
def test_hqq_is_better_than_onnx_runtimes_with_integer_zero_points(kind: str) -> None:
    """ONNX Runtime's own HQQ fits float zero points; rounded to what the fast kernels read they are rtn's again."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    weight = matrices(np.random.default_rng(3))[kind]
    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=32))
    _, scales, zero_points = quantizer.quantize_internal(torch.from_numpy(weight), bits=4, group_size=32)
    scale, zero = scales.numpy().reshape(-1, 1), zero_points.numpy().reshape(-1, 1).round()
    values = (weight.reshape(-1, 32) / scale + zero).round().clip(0, 15)
    theirs = ((values - zero) * scale).reshape(weight.shape) - weight
    assert norm(restored(weight, structure_of("hqq")) - weight) < norm(theirs)


EXTREMES = {
    "zeros": np.zeros((3, 70)),
    "one huge value": np.where(np.arange(70) == 7, 3e38, 1.0) * np.ones((3, 1)),
    "widest range": np.where(np.arange(70) % 2 == 0, 3e38, -3e38) * np.ones((3, 1)),
    "constant rows": np.array([[0.3], [-7.0], [1e-20]]) * np.ones((1, 70)),
    "subnormal": np.linspace(-1, 1, 70) * 1e-40 * np.ones((3, 1)),
    "one column": np.array([[1.5], [-2.0], [0.0]]),
    "tiny beside normal": np.where(np.arange(70) < 32, 1e-30, 1.0) * np.ones((3, 1)),
}


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("kind", list(EXTREMES))
def test_extreme_blocks(kind: str, name: str, block_size: int) -> None:
    """No NaN, no Inf, no warning; no block is off by more than a step of its range (or 1e-36), zeros stay zeros."""
    weight, structure = EXTREMES[kind].astype(np.float32), structure_of(name, block_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = quantize_blocks(torch.from_numpy(weight), structure.blocks, structure.quantizer)
    assert np.isfinite(blocks.scales).all()
    num_bits = BITS_PER_WEIGHT[structure.weight_format]
    back = dequantize_blocks(blocks, num_bits=num_bits, num_columns=weight.shape[1]).astype(np.float64)
    assert np.isfinite(back).all()
    assert (back[weight == 0] == 0).all()
    for start in range(0, weight.shape[1], block_size):
        part = slice(start, start + block_size)
        reach = 2 * np.abs(weight[:, part]).astype(np.float64).max(1, keepdims=True)
        assert (np.abs(back[:, part] - weight[:, part]) <= 1.01 * reach / ((1 << num_bits) - 1) + 1e-36).all()


@given(seed=st.integers(0, 50), name=st.sampled_from(list(FORMATS)), num_columns=st.sampled_from([5, 64, 100]))
@settings(max_examples=40, deadline=None)
def test_rows_do_not_know_each_other(seed: int, name: str, num_columns: int) -> None:
    """A row quantized alone gives the bytes it has in the matrix, from any float type: slices change nothing."""
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((5, num_columns)).astype(np.float32))
    weight = weight.to(torch.bfloat16)
    whole = quantized(weight.float(), name)
    for row in range(len(weight)):
        alone = quantized(weight[row : row + 1], name)
        for part, single in zip(whole, alone, strict=True):
            assert (part is None) == (single is None)
            assert part is None or np.array_equal(part[row : row + 1], single)


def test_long_matrices_are_worked_through_in_slices() -> None:
    """More values than one slice holds give the bytes of their halves."""
    weight = torch.randn(700, 192, generator=torch.Generator().manual_seed(0))
    for name in FORMATS:
        whole = quantized(weight, name)
        halves = [quantized(part, name) for part in (weight[:301], weight[301:])]
        assert np.array_equal(whole.packed, np.concatenate([half.packed for half in halves]))
        assert np.array_equal(whole.scales, np.concatenate([half.scales for half in halves]))


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_can_be_stored_comes_back(name: str) -> None:
    """A matrix that blocks stand for exactly is quantized without loss, odd numbers of blocks a row included."""
    structure = structure_of(name, 16)
    num_bits = BITS_PER_WEIGHT[structure.weight_format]
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << num_bits, (4, 5, 16)).astype(np.uint8)
    values[:, :, 0], values[:, :, 1] = 0, (1 << num_bits) - 1
    middle = 1 << (num_bits - 1)
    packed = values if num_bits == 8 else values[:, :, ::2] | values[:, :, 1::2] << 4
    blocks = Blocks(packed, rng.uniform(0.5, 2, (4, 5)).astype(np.float32), None)
    weight = dequantize_blocks(blocks, num_bits=num_bits, num_columns=80)
    assert np.array_equal(weight[0, :16], (values[0, 0] - np.float32(middle)) * blocks.scales[0, 0])
    assert np.abs(restored(weight, structure) - weight).max() < 1e-4 * np.abs(weight).max()


def test_int8_moves_weights_little_at_the_width_of_the_bundled_model() -> None:
    """At 352 columns (11 blocks) and 128 the relative error of int8 is below 0.6 %, of int4 below 10 %."""
    rng = np.random.default_rng(0)
    for num_columns in (128, 352):
        weight = rng.standard_normal((256, num_columns)).astype(np.float32)
        for weight_format, limit in (("int8", 0.006), ("int4", 0.1)):
            back = restored(weight, Structure(weight_format))
            assert np.linalg.norm(back - weight) / np.linalg.norm(weight) < limit


def native_rtn(weight: NDArray[np.float32], num_bits: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """What ONNX Runtime's own quantizer writes."""
    num_rows, num_columns = weight.shape
    num_blocks = -(-num_columns // size)
    packed = np.zeros((num_rows, num_blocks, size * num_bits // 8), np.uint8)
    scales, zeros = np.zeros((num_rows, num_blocks), np.float32), np.zeros((num_rows, num_blocks), np.uint8)
    padded = np.zeros((num_blocks * size, num_rows), np.float32)
    padded[:num_columns] = weight.T
    quantize = native.quantize_matmul_8bits if num_bits == 8 else native.quantize_matmul_4bits
    quantize(packed, padded, scales, zeros, size, num_rows, num_columns, True)
    return packed, scales


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    size=st.sampled_from(BLOCK_SIZES),
    power=st.integers(-44, 4),
    grid=st.sampled_from([None, 2.0, 8.0]),
)
@settings(max_examples=60, deadline=None)
def test_rtn_writes_the_native_quantizers_bytes(
    seed: int, rows: int, columns: int, size: int, power: int, grid: float | None
) -> None:
    """Ties, denormal scales, blocks of zeros and rows that end within a block or a byte included."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns))
    weight = (weight if grid is None else np.round(weight * grid) / grid) * 10.0**power
    weight = weight.astype(np.float32)
    for weight_format, num_bits in (("int4", 4), ("int8", 8)):
        blocks = quantize_blocks(torch.from_numpy(weight), Structure(weight_format, block_size=size).blocks)
        packed, scales = native_rtn(weight, num_bits, size)
        assert np.array_equal(blocks.packed, packed)
        assert np.array_equal(blocks.scales, scales)


def test_no_point_of_the_grid_beats_k_quant() -> None:
    """Twenty ranges from one step less than rtn's to 0.9 more, each with its best scale: the least loss is found."""
    weight, top = matrices(np.random.default_rng(6))["skewed"], 15
    blocks = weight.astype(np.float64).reshape(-1, 32)
    importance = np.abs(blocks) + np.sqrt((blocks**2).mean(1, keepdims=True))
    low, high = np.minimum(blocks.min(1, keepdims=True), 0), np.maximum(blocks.max(1, keepdims=True), 0)
    losses = []
    for shift in np.arange(-10, 10) * 0.1:
        step = (high - low) / (top + shift)
        zero = np.clip(np.rint(-low / step), 0, top)
        steps = np.clip(np.rint(blocks / step), -zero, top - zero)
        scale = (importance * steps * blocks).sum(1, keepdims=True) / (importance * steps**2).sum(1, keepdims=True)
        losses.append((importance * (scale * steps - blocks) ** 2).sum(1))
    error = (restored(weight, structure_of("k_quant")) - weight).reshape(-1, 32)
    ours = (importance * error**2).sum(1)
    assert (ours <= np.min(losses, axis=0) * 1.001).mean() > 0.99  # halves may be rounded either way


@pytest.mark.parametrize("shape", [(1, 1), (5000, 300), (40, 100_000), (7, 0)])
def test_slices_are_small_and_whole(shape: tuple[int, int]) -> None:
    """Together all rows in order; each of at most 65,536 values, or 16 rows where these are longer."""
    slices = list(row_slices(*shape))
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(shape[0]))
    assert max((rows.stop - rows.start) * shape[1] for rows in slices) <= max(1 << 16, 16 * shape[1])
    assert min(rows.stop - rows.start for rows in slices[:-1] or slices) >= min(16, shape[0])
