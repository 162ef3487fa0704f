"""A folder of small experts of nano: random scales, so that each answers differently and none needs training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from havoc_core.adapt.basis import Basis, base_basis
from havoc_core.adapt.expert import Expert, save_expert
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT

NAMES = ("math", "code", "reasoning")


@pytest.fixture(scope="session")
def small_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    base = load_base("nano")
    basis = base_basis(base, folder, SILENT)
    for seed, name in enumerate(NAMES):
        save_expert(random_expert(basis, name, seed), folder)
    return folder


def random_expert(basis: Basis, name: str, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        matrix: 0.1 * torch.randn(part.num_directions, generator=generator) for matrix, part in basis.matrices.items()
    }
    return Expert(domain=name, deltas=deltas, base_hash=basis.base_hash, basis_hash=basis.hash)
