"""Every format, quantizer, dialect and cache exports, on weights as they are in models that people have.

Real activations have outliers, and real weights long tails. Here both are made; `make real` takes them from a real
model, whole, and cut down to the shapes of Qwen2 and Qwen3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from havoc_core.export.package import export_artifact
from havoc_core.export.parity import MAX_RATIO
from havoc_core.export.runtime.artifact import ArtifactManifest, read_manifest
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.source import Source, open_source
from havoc_core.model.config import AttentionConfig, HavocConfig, MLPConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import tensor_shapes
from tests.export import parity_table as table

STRUCTURES = [
    Structure(),
    Structure("fp16"),
    *(Structure(weights, compute=compute) for weights in ("int8", "int4") for compute in ("int8", "fp32")),
    Structure("int8", is_symmetric=False),
    Structure("int8", "fp32", 64, False, "k_quant"),
    Structure("int4", is_symmetric=False, compute="fp32"),
    Structure("int4", "fp32", 64, False, "hqq"),
    Structure("int4", "fp32", 32, False, "k_quant", compute="fp32"),
    Structure("int4", "fp32", 128, compute="int8"),
    Structure("fp16", "fp16"),
    Structure("int8", "fp16"),
    Structure("int4", "fp16", 32, False, "hqq"),
]
OPTIONS = [
    GraphOptions(dialect=dialect, cache=cache) for dialect in ("standard", "contrib") for cache in ("dynamic", "static")
]
PAIRS = list(zip(STRUCTURES, itertools.cycle(OPTIONS), strict=False))


def require_proof(out: Path) -> ArtifactManifest:
    """What every export must have: each case within the limit, and a cost that can be judged."""
    manifest = read_manifest(out)
    assert manifest.parity["cases"]
    assert all(0 < case["ratio"] <= MAX_RATIO for case in manifest.parity["cases"])
    cost = manifest.format_cost
    assert cost is not None
    assert 0 <= cost["kl_mean"] < math.inf  # the mean may lie above the 99th percentile: a few positions can cost most
    assert 0 <= cost["kl_p99"] < math.inf
    assert 0 <= cost["top1_share"] <= 1
    return manifest


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("structure", "options"), PAIRS, ids=str)
def test_every_structure_exports_with_outliers(
    kind: str, structure: Structure, options: GraphOptions, tmp_path: Path
) -> None:
    """Activations of which a few are thirty times as large as the others, in three architectures."""
    config = table.shape(64, kind=kind, num_layers=2)
    source = Source("outliers", config, table.weights(config, seed=1, has_outliers=True), None)
    require_proof(export_artifact(source, tmp_path / "a", structure=structure, options=options))


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_the_limit_knows_no_width(width: int, tmp_path: Path) -> None:
    """One multiple for all: wide models round more, and so does torch."""
    config = table.shape(width, kind="llama", num_layers=2)
    source = Source("wide", config, table.weights(config, seed=0, has_outliers=True), None)
    manifest = require_proof(export_artifact(source, tmp_path / "a"))
    assert max(case["ratio"] for case in manifest.parity["cases"]) < 3


@pytest.mark.real
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_real_model_exports_in_every_structure(real_model: Path, structure: Structure, tmp_path: Path) -> None:
    """Whole, over the bundled text; and what int8 costs is within the bundled limits, what int4 rtn costs is not."""
    cost = require_proof(export_artifact(real_model, tmp_path / "a", structure=structure)).format_cost
    assert cost is not None
    assert cost["text"] == "bundled text"
    assert cost["kl_mean"] < {"fp32": 1e-8, "fp16": 1e-3, "int8": 0.02, "int4": 1.0}[structure.weight_format]


@pytest.mark.real
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_a_real_model_exports_in_every_graph(
    real_model: Path, options: GraphOptions, weight_format: str, tmp_path: Path
) -> None:
    """Dialects and caches, whole."""
    options = replace(options, cache_len=512) if options.cache == "static" else options
    require_proof(export_artifact(real_model, tmp_path / "a", structure=Structure(weight_format), options=options))


@pytest.mark.real
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_real_values_export_in_every_way(
    real_model: Path, kind: str, structure: Structure, options: GraphOptions, tmp_path: Path
) -> None:
    """Every structure in every graph, over the real model's values cut down to three architectures."""
    source = cut_down(open_source(real_model), kind)
    require_proof(export_artifact(source, tmp_path / "a", structure=structure, options=options))


def cut_down(source: Source, kind: str, *, num_layers: int = 3, num_rows: int = 2048) -> Source:
    """The first layers and half of the heads of a real model, with biases and head norms where `kind` has them."""
    shape = source.config.attention
    num_kv_heads = max(shape.num_kv_heads // 2, 1)
    config = HavocConfig(
        vocab_size=num_rows,
        d_model=source.config.d_model,
        num_layers=num_layers,
        attention=AttentionConfig(
            num_heads=num_kv_heads * (shape.num_heads // shape.num_kv_heads),
            num_kv_heads=num_kv_heads,
            head_dim=shape.head_dim,
            rope_theta=shape.rope_theta,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        ),
        mlp=MLPConfig(hidden_dim=source.config.mlp.hidden_dim // 2),
        max_seq_len=512,
        norm_eps=source.config.norm_eps,
        tie_word_embeddings=True,
    )
    return Source(kind, config, _cut(source.tensors, config), None)


def _cut(tensors: Mapping[str, Tensor], config: HavocConfig) -> dict[str, Tensor]:
    """The first rows and columns of every tensor; a bias and a head norm are made of values that the model has."""
    found: dict[str, Tensor] = {}
    for name, size in tensor_shapes(config).items():
        if name in tensors:
            found[name] = tensors[name].float()[tuple(slice(0, length) for length in size)].contiguous()
        elif name.endswith(".bias"):
            found[name] = tensors[name.replace(".bias", ".weight")].float()[: size[0], 0].contiguous() * 10
        else:
            norms = tensors[name.partition("self_attn")[0] + "input_layernorm.weight"].float()
            found[name] = norms[: size[0]] / norms[: size[0]].mean()
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    return found
