"""The decoder: configuration, blocks, generation, checkpoints. Torch is loaded when a name that needs it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .config import AttentionConfig, HavocConfig, MLPConfig, RopeScaling, VisionConfig
from .structure import Structure

if TYPE_CHECKING:
    from .blocks import GQAttention, GroupedQueryAttention, RMSNorm, RotaryEmbedding, SwiGLU, TransformerBlock
    from .checkpoint import Base, load_base
    from .generation import generate_text, sample_tokens
    from .tokenizer import Tokenizer, train_tokenizer
    from .transformer import HavocModel, SigmaModel

_MODULE_OF = {
    "GQAttention": "blocks",
    "GroupedQueryAttention": "blocks",
    "RMSNorm": "blocks",
    "RotaryEmbedding": "blocks",
    "SwiGLU": "blocks",
    "TransformerBlock": "blocks",
    "Base": "checkpoint",
    "load_base": "checkpoint",
    "generate_text": "generation",
    "sample_tokens": "generation",
    "Tokenizer": "tokenizer",
    "train_tokenizer": "tokenizer",
    "HavocModel": "transformer",
    "SigmaModel": "transformer",
}

__all__ = [
    "AttentionConfig",
    "Base",
    "GQAttention",
    "GroupedQueryAttention",
    "HavocConfig",
    "HavocModel",
    "MLPConfig",
    "RMSNorm",
    "RopeScaling",
    "RotaryEmbedding",
    "SigmaModel",
    "Structure",
    "SwiGLU",
    "Tokenizer",
    "TransformerBlock",
    "VisionConfig",
    "generate_text",
    "load_base",
    "sample_tokens",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
