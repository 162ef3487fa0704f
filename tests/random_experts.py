"""Small experts of nano: random scales, so that each answers differently and none needs training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.expert import Expert, save_expert
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT


def write_experts(folder: Path, names: Sequence[str]) -> Path:
    """An expert for each name, beside the basis."""
    basis = base_basis(load_base("nano"), folder, SILENT)
    for seed, name in enumerate(names):
        draw = torch.Generator().manual_seed(seed)
        deltas = {matrix: 0.1 * torch.randn(size, generator=draw) for matrix, size in basis.num_directions().items()}
        save_expert(Expert(domain=name, deltas=deltas, base_hash=basis.base_hash, basis_hash=basis.hash), folder)
    return folder
