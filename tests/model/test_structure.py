"""Structures: four weight formats, two activation types, nothing else."""

from __future__ import annotations

import pytest

from havoc_core.errors import HavocError
from havoc_core.model.structure import ACTIVATION_DTYPES, WEIGHT_FORMATS, Structure


def test_every_combination_has_a_name() -> None:
    """Eight structures, eight names."""
    structures = [Structure(weights, activations) for weights in WEIGHT_FORMATS for activations in ACTIVATION_DTYPES]
    assert len({str(structure) for structure in structures}) == 8
    assert str(Structure("int4", "fp16")) == "int4-fp16"
    assert [structure.is_quantized for structure in structures] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3",), "no weight format is called 'int3'; there are fp32, fp16, int8, int4"),
        (("int4", "bf16"), "no activation dtype is called 'bf16'; there are fp32, fp16"),
        (("int4", "fp32", 33), "block_size must be 16, 32, 64, 128 or 256, not 33"),
    ],
)
def test_others_are_refused(arguments: tuple[object, ...], message: str) -> None:
    """An unknown format is refused with the list of the known ones."""
    with pytest.raises(HavocError, match=message):
        Structure(*arguments)
