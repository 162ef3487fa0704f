"""What the data file holds for a tensor: dtype, shape and order as planned, and nothing that cannot be stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from havoc_core.errors import HavocError
from havoc_core.export.encode import encode, encode_factors
from havoc_core.export.layout import plan_layout
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import EMBEDDING, tensor_shapes

UP = "model.layers.0.mlp.up_proj.weight"
STRUCTURES = [
    Structure(),
    Structure("fp16"),
    Structure("fp16", "fp16"),
    Structure("int8", "fp16", 64),
    Structure("int4", "fp32", 128, False),
    Structure("int4", "fp16", 16, False, "hqq"),
    Structure("int8", "fp32", 32, False, "k_quant"),
    Structure("int8", compute="w8a8"),
    Structure("fp32", rank_fraction=0.25),
    Structure("int4", "fp32", 16, False, "k_quant", 0.25),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_arrays_are_as_the_layout_says(config: HavocConfig, structure: Structure) -> None:
    """Every initializer of every tensor has the planned dtype, shape and bytes, row after row."""
    shapes = tensor_shapes(config)
    for weight in plan_layout(config, structure).weights:
        if weight.source not in shapes:
            continue
        if weight.factors:
            first, second = (torch.randn(factor.source_shape) for factor in weight.factors)
            arrays = encode_factors(weight, (first, second), structure)
        else:
            arrays = encode(weight, torch.randn(weight.source_shape), structure)
        for item, array in zip(weight.initializers, arrays, strict=True):
            assert (array.dtype.name, array.shape, array.nbytes) == (item.dtype, item.shape, item.num_bytes)
            assert array.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("structure", STRUCTURES[:8], ids=str)
def test_narrow_tensors_are_stored_as_their_fp32_values(structure: Structure) -> None:
    """A bf16 tensor gives the bytes of the same values in fp32."""
    layout = plan_layout(HavocConfig.pico(), structure)
    for name in (UP, EMBEDDING, "model.norm.weight"):
        tensor = torch.randn(layout[name].source_shape).to(torch.bfloat16)
        pairs = zip(
            encode(layout[name], tensor, structure), encode(layout[name], tensor.float(), structure), strict=True
        )
        assert all(np.array_equal(narrow, wide) for narrow, wide in pairs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "structure", [Structure(), Structure("int4"), Structure("int4", "fp32", 32, False, "hqq")], ids=str
)
def test_values_that_are_not_finite_are_refused(structure: Structure, value: float) -> None:
    """One NaN or Inf anywhere is an error that names the tensor."""
    weight = plan_layout(HavocConfig.pico(), structure)[UP]
    tensor = torch.zeros(weight.source_shape)
    tensor[-1, 3] = value
    with pytest.raises(HavocError, match=f"{UP}: holds NaN or Inf"):
        encode(weight, tensor, structure)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "structure", [Structure("fp16"), Structure("int8", "fp16"), Structure("int4", "fp16", 32, False)], ids=str
)
def test_fp16_overflow_is_refused(structure: Structure, sign: int) -> None:
    """A value, or a block's scale, beyond fp16 is an error with the number and what to choose instead."""
    weight = plan_layout(HavocConfig.pico(), structure)[UP]
    tensor = torch.full(weight.source_shape, sign * 1e7)
    with pytest.raises(HavocError, match=r"fp16 \(65504\); .*--weights fp32"):
        encode(weight, tensor, structure)


def test_another_shape_is_refused() -> None:
    """The error names both shapes."""
    weight = plan_layout(HavocConfig.pico(), Structure())[UP]
    with pytest.raises(HavocError, match=r"shape \[2, 3\], the configuration says"):
        encode(weight, torch.zeros(2, 3), Structure())
