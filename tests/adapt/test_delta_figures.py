"""The figures of a training are what their names say, held against the dense weights."""

from __future__ import annotations

import math

import pytest
import torch

from havoc_core.adapt.delta_figures import FIGURES, DeltaFigures
from havoc_core.adapt.svf import compute_basis, fold_matrix

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.1.self_attn.k_proj.weight": (6, 8),
}


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def test_figures_are_those_of_the_dense_change(weights: dict[str, torch.Tensor]) -> None:
    """Norms and effective rank by the singular values of W' - W, computed here by an SVD."""
    basis = compute_basis(weights, base_hash="a" * 64)
    deltas = {}
    for seed, (name, matrix) in enumerate(basis.matrices.items()):
        generator = torch.Generator().manual_seed(seed)
        deltas[name] = torch.nn.Parameter(0.1 * torch.randn(matrix.num_directions, generator=generator))
        deltas[name].grad = torch.randn(matrix.num_directions, generator=generator)
    found = DeltaFigures(basis, deltas).read(gradient_scale=3.0)
    assert len(found) == len(SHAPES) * len(FIGURES)
    for name, weight in weights.items():
        place = f"{name.split('.')[2]}/{name.split('.')[-2]}"
        matrix, delta = basis.matrices[name], deltas[name].detach()
        change = fold_matrix(weight, matrix.factor, matrix.side, delta) - weight
        shares = torch.linalg.svdvals(change.double())
        shares = shares / shares.sum()
        shares = shares[shares > 1e-9]
        expected = {
            "norm": delta.norm(),
            "mean": delta.mean(),
            "min": delta.min(),
            "max": delta.max(),
            "gradient_norm": 3 * deltas[name].grad.norm(),
            "effective_rank": torch.exp(-(shares * shares.log()).sum()),
            "weight_change": change.norm() / weight.norm(),
        }
        for figure, value in expected.items():
            assert found[f"{place}/{figure}"] == pytest.approx(float(value), rel=1e-4), (place, figure)


def test_the_base_has_no_effective_rank(weights: dict[str, torch.Tensor]) -> None:
    """Where nothing moved and nothing was descended, what cannot be said is None and not NaN."""
    basis = compute_basis(weights, base_hash="a" * 64)
    deltas = {name: torch.nn.Parameter(torch.zeros(matrix.num_directions)) for name, matrix in basis.matrices.items()}
    found = DeltaFigures(basis, deltas).read()
    assert found["0/q_proj/norm"] == 0
    assert found["0/q_proj/effective_rank"] is None
    assert found["0/q_proj/gradient_norm"] is None
    assert not any(value is not None and math.isnan(value) for value in found.values())
