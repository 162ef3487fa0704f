"""The model families that HAVOC reads and writes: what a checkpoint's `model_type` or architecture decides, one entry each.

A family computes what the decoder computes: grouped-query attention with RoPE, RMSNorm, SwiGLU, each with or without a
bias on q, k, v and norms on q, k. What it calls things, leaves unsaid and may not ask for stands here; a new one is an
entry: see docs/extending.md. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's `config.json`, and the architecture of the same models in GGUF files.

    `architecture` is the class that transformers loads them with. `qkv_bias` and `qk_norm` are the differences of
    attention. `head_dim` and `silent` are what a config means that does not say it: the head's width (None: d_model /
    num_heads), and other fields by their Hugging Face name. `renamed` gives the Hugging Face name for a name that only
    this family uses, `only_value` the one value a field may have (its name in a GGUF file begins with "gguf."), and
    `written` the fields that its configs carry beside those of every family. `own_fields` are read from this family's
    configs and refused in all others.
    """

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    silent: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    only_value: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    own_fields: frozenset[str] = frozenset()
    gguf_architecture: str | None = None
    are_gguf_pairs_adjacent: bool = False
    """Whether GGUF files store the rows of q and k so that the two that RoPE rotates stand side by side."""
    genai_type: str | None = None
    """What onnxruntime-genai calls the family; None: its `model_type`."""
