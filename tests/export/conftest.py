from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from havoc_core.adapt.expert import Expert, save_expert
from havoc_core.adapt.svf import Basis, compute_basis
from havoc_core.export.package import export_artifact
from havoc_core.export.source import Source, open_source
from havoc_core.model.config import AttentionConfig, HavocConfig, RopeScaling, VisionConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import tensor_shapes
from havoc_core.model.tokenizer import train_tokenizer
from havoc_core.model.transformer import HavocModel

PICO = HavocConfig.pico()
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)

CONFIGS = {
    "text": PICO,
    "vision": HavocConfig.pico(vision=VisionConfig(image_token_id=3)),
    "untied": PICO.replace(tie_word_embeddings=False),
    "wide-heads": PICO.replace(attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=16)),
    "multi-query": PICO.replace(attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=8)),
    "qwen2": PICO.replace(attention=replace(PICO.attention, qkv_bias=True), norm_eps=1e-6),
    "qwen3": PICO.replace(attention=replace(PICO.attention, qk_norm=True, rope_theta=1e6)),
    "llama3-rope": PICO.replace(attention=replace(PICO.attention, rope_scaling=LLAMA3)),
    "odd-sizes": PICO.replace(d_model=40, vocab_size=67, mlp=replace(PICO.mlp, hidden_dim=44)),
}
"""Every kind of decoder the exporter writes; sizes that are not multiples of a quantization block included."""


def trained_scale_tensors(config: HavocConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights as large as trained ones: logits spread over several units, norm scales and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = noise * (1.0 if "embed_tokens" in name else 1.2 * shape[1] ** -0.5)
        else:
            tensors[name] = noise * 0.3 if name.endswith("bias") else 1 + noise * 0.2
    return tensors


def source_of(config: HavocConfig, seed: int = 0) -> Source:
    return Source("test", config, trained_scale_tensors(config, seed), None)


def write_base(directory: Path, config: HavocConfig, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A Hugging Face directory with a small trained tokenizer; `config.vocab_size` must hold it."""
    model = HavocModel.from_tensors(config, tensors or trained_scale_tensors(config), source="test")
    model.save_pretrained(directory)
    texts = ["What is 12 + 30? 42", "the quick brown fox jumps over the lazy dog", "def f(x): return x"] * 3
    train_tokenizer(texts, config.vocab_size).save(directory)
    return directory


def random_experts(source: Source, basis: Basis, domains: tuple[str, ...] = ("math", "code")) -> list[Expert]:
    experts = []
    for index, domain in enumerate(domains):
        generator = torch.Generator().manual_seed(index)
        deltas = {name: torch.randn(size, generator=generator) * 0.1 for name, size in basis.num_directions().items()}
        experts.append(Expert(domain=domain, deltas=deltas, base_hash=source.hash, basis_hash=basis.hash))
    return experts


TALKING = HavocConfig.pico(vision=VisionConfig(image_token_id=3)).replace(
    vocab_size=300, max_seq_len=256, attention=replace(PICO.attention, head_dim=16)
)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> HavocConfig:
    """Every kind of decoder in turn."""
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def configs() -> dict[str, HavocConfig]:
    return CONFIGS


@pytest.fixture(scope="session")
def with_wide_heads() -> Callable[[HavocConfig], HavocConfig]:
    """`with_wide_heads(config)`: the same decoder with heads that GroupQueryAttention can rotate."""
    return lambda config: config.replace(
        attention=replace(config.attention, head_dim=-(-config.attention.head_dim // 16) * 16)
    )


@pytest.fixture(scope="session")
def source_with() -> Callable[..., Source]:
    """`source_with(config, seed=0)`: a source of trained-scale random weights."""
    return source_of


@pytest.fixture(scope="session")
def write_base_at() -> Callable[..., Path]:
    """`write_base_at(directory, config)`: a Hugging Face directory with a tokenizer."""
    return write_base


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of text and vision with a tokenizer."""
    return write_base(tmp_path_factory.mktemp("bases") / "talker", TALKING)


@pytest.fixture(scope="session")
def text_base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of text alone with a tokenizer."""
    return write_base(tmp_path_factory.mktemp("bases") / "reader", TALKING.replace(vision=None))


@pytest.fixture(scope="session")
def source(base_directory: Path) -> Source:
    return open_source(base_directory)


@pytest.fixture(scope="session")
def basis(source: Source) -> Basis:
    return compute_basis(source.tensors, base_hash=source.hash)


@pytest.fixture(scope="session")
def experts(source: Source, basis: Basis) -> list[Expert]:
    return random_experts(source, basis)


@pytest.fixture(scope="session")
def experts_for() -> Callable[[Source], list[Expert]]:
    """`experts_for(source)`: two experts, math and code, with random scales on every projection of a base."""
    return lambda source: random_experts(source, compute_basis(source.tensors, base_hash=source.hash))


@pytest.fixture
def experts_directory(experts: list[Expert], tmp_path: Path) -> Path:
    for expert in experts:
        save_expert(expert, tmp_path / "experts")
    return tmp_path / "experts"


@pytest.fixture(scope="session")
def whole(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of text and vision; read it, do not change it."""
    return export_artifact(base_directory, tmp_path_factory.mktemp("artifacts") / "whole")


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def plain(text_base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of text alone, without experts; read it, do not change it."""
    return export_artifact(text_base_directory, tmp_path_factory.mktemp("artifacts") / "plain")


@pytest.fixture(scope="session")
def mixed(source: Source, experts: list[Expert], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a mixture in int8; read it, do not change it."""
    out = tmp_path_factory.mktemp("artifacts") / "mixed"
    return export_artifact(source, out, experts=experts, alpha=(1.2, 0.5), structure=Structure("int8"))
