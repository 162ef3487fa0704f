"""Nano, its basis, and a folder of small experts: random scales, so that each answers differently, untrained."""

from __future__ import annotations

from pathlib import Path

import pytest

from havoc_core.adapt.basis import Basis, base_basis
from havoc_core.model.checkpoint import Base, load_base
from havoc_core.progress import SILENT
from tests.random_experts import write_experts


@pytest.fixture(scope="module")
def base() -> Base:
    """Nano; who changes it gives it back as it was."""
    return load_base("nano")


@pytest.fixture(scope="module")
def basis(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return base_basis(base, tmp_path_factory.mktemp("basis"), SILENT)


@pytest.fixture(scope="session")
def small_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("experts"), ("math", "code", "reasoning"))
