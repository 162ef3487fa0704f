"""The plan of the data file: every byte accounted for, in order, before a weight is read."""

from __future__ import annotations

import itertools
import math

import pytest

from havoc_core.errors import HavocError
from havoc_core.export.layout import plan_layout
from havoc_core.model import cost
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import EMBEDDING, tensor_shapes

UP = "model.layers.0.mlp.up_proj.weight"
STRUCTURES = [
    Structure(),
    Structure("int4"),
    Structure("int4", "fp32", 256, False),
    Structure("int8", "fp16", 16, False, "k_quant"),
    Structure("fp16", rank_fraction=0.3),
    Structure("int4", "fp32", 32, False, "hqq", 0.5),
    Structure("int8", compute="w8a8"),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_file_is_in_order_and_without_overlap(config: HavocConfig, structure: Structure) -> None:
    """Offsets rise, large tensors start on a page, names are unique, and the size is the cost's plus gaps and RoPE."""
    layout = plan_layout(config, structure)
    items = list(layout.initializers())
    for before, after in itertools.pairwise(items):
        assert before.offset_bytes + before.num_bytes <= after.offset_bytes
    for item in items:
        assert item.offset_bytes % (4096 if item.num_bytes >= 4096 else 64) == 0
    assert len({item.name for item in items}) == len(items)
    assert [weight.source for weight in layout.weights[:-2]] == list(tensor_shapes(config))
    stored = sum(item.num_bytes for item in items if not item.name.startswith("rope."))
    assert stored == cost.weight_bytes(config, structure)


def test_zero_points_stand_beside_the_scales() -> None:
    """Asymmetric blocks add one packed byte for two int4 blocks or one of int8; symmetric ones add nothing."""
    config = HavocConfig.pico().replace(d_model=80)
    for weight_format, width in (("int4", 2), ("int8", 3)):
        parts = plan_layout(config, Structure(weight_format, is_symmetric=False))[EMBEDDING].initializers
        assert [part.name.removeprefix(EMBEDDING) for part in parts] == [
            f"_Q{weight_format[-1]}",
            "_scales",
            "_zero_points",
        ]
        assert (parts[2].dtype, parts[2].shape) == ("uint8", (config.vocab_size, width))
        assert len(plan_layout(config, Structure(weight_format))[EMBEDDING].initializers) == 2


def test_factors_are_stored_where_they_are_smaller() -> None:
    """Below break-even a projection is two matrices under names of their own, elsewhere it is whole; both counted."""
    config = HavocConfig.pico()
    layout = plan_layout(config, Structure(rank_fraction=0.5))
    assert [item.name for item in layout[UP].initializers] == [f"{UP}_in", f"{UP}_out"]
    assert [factor.source_shape for factor in layout[UP].factors] == [(16, 32), (config.mlp.hidden_dim, 16)]
    projections = [weight for weight in layout.weights if weight.source.endswith("_proj.weight")]
    factored = [weight for weight in projections if weight.factors]
    ranks = {weight.source: min(weight.source_shape) // 2 for weight in projections}
    is_smaller = [ranks[w.source] * sum(w.source_shape) < math.prod(w.source_shape) for w in projections]
    assert [weight in factored for weight in projections] == is_smaller
    assert layout.num_factored == len(factored)
    assert 0 < len(factored) < len(projections)
    assert plan_layout(config, Structure()).num_factored == 0


def test_a_false_name_is_refused() -> None:
    """Weights that are called fp32 and would be rounded to fp16 are refused."""
    with pytest.raises(HavocError, match="fp32 weights under fp16 activations"):
        plan_layout(HavocConfig.pico(), Structure("fp32", "fp16"))
