"""What the tests on a real card share: the card itself, and nano exported in every format that runs there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from havoc_core.bench.device import identify_device
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA
from havoc_core.export.runtime.dialects import choose_dialect
from havoc_core.export.runtime.options import CACHES, GraphOptions
from havoc_core.export.source import open_source
from havoc_core.model.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from havoc_core.bench.judge.schema import Device

CASES = [
    (weights, activations, cache)
    for weights in ("fp32", "fp16", "int8", "int4")
    for activations in ("fp32", "fp16")
    for cache in CACHES
    if (weights, activations) != ("fp32", "fp16")  # would be rounded to fp16, and is refused
]


@dataclass(frozen=True)
class Shipped:
    """One artifact, and how it was made."""

    folder: Path
    structure: Structure
    options: GraphOptions


@pytest.fixture(scope="session")
def device() -> Device:
    """The card, as NVML and the CUDA driver tell it; the tests here fail where there is none."""
    return identify_device(CUDA)


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """Nano in each weight format, activations' dtype and cache, in the dialect that CUDA runs best."""
    weights, activations, cache = request.param
    return export_nano(weights, activations, tmp_path_factory.mktemp("shipped"), cache=cache)


@pytest.fixture(scope="session")
def export() -> Callable[..., Shipped]:
    """`export(weights, activations, folder, cache="dynamic")`: nano as `havoc export --for cuda` writes it."""
    return export_nano


def export_nano(weights: str, activations: str, folder: Path, *, cache: str = "dynamic") -> Shipped:
    """Nano as `havoc export --for cuda --dialect auto` writes it."""
    source = open_source("nano")
    structure = Structure(weight_format=weights, activation_dtype=activations)  # type: ignore[arg-type]
    head_dim = source.config.attention.head_dim
    dtype = structure.activation_dtype
    dialect = choose_dialect("auto", device="cuda", activation_dtype=dtype, head_dim=head_dim, cache=cache)  # type: ignore[arg-type]
    options = GraphOptions(dialect=dialect, cache=cache)  # type: ignore[arg-type]
    name = f"{weights}-{activations}-{dialect}-{cache}"
    return Shipped(export_artifact(source, folder / name, structure=structure, options=options), structure, options)
