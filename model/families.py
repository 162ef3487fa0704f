"""The model families that HAVOC reads and writes: one entry for each `model_type` or architecture.

Every family computes what the decoder computes: grouped-query attention with RoPE, RMSNorm and SwiGLU, with or without
a bias on q, k, v and norms on q, k. An entry holds a family's names and the values that its files leave out. To add a
family, add an entry: see docs/extending.md. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .config import HavocConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's `config.json`, and the architecture of the same models in GGUF files.

    `architecture` is the class with which transformers loads it, `genai_type` what onnxruntime-genai calls it (None:
    its `model_type`). `qkv_bias` and `qk_norm` are the differences of attention.

    Reading its `config.json`: `head_dim` is the head's width if the file does not state it (None: hidden_size divided
    by the number of heads), and `silent` has the defaults of other missing fields. `renamed` maps a name that only this
    family uses to Hugging Face's usual one. `only_value` has the only value of a field that the decoder can compute.
    `written` are fields of its own files, besides those of every family.

    Reading its GGUF files: `gguf_architecture` is their `general.architecture` (None: there are none), and
    `gguf_only_value` is `only_value` for their keys, without the architecture's prefix. `is_gguf_permuted` says whether
    the rows of q and k are stored so that the two rows that RoPE rotates are next to each other.
    """

    model_type: str
    architecture: str
    genai_type: str | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    silent: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    only_value: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    gguf_architecture: str | None = None
    gguf_only_value: Mapping[str, Any] = field(default_factory=dict)
    is_gguf_permuted: bool = False


_QWEN_SILENT = {"num_key_value_heads": 32, "use_sliding_window": False}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            written={"attention_bias": False, "mlp_bias": False},
            gguf_architecture="llama",
            is_gguf_permuted=True,
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            silent=_QWEN_SILENT,
            gguf_architecture="qwen2",
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            qk_norm=True,
            head_dim=128,
            silent=_QWEN_SILENT,
            written={"attention_bias": False},
            gguf_architecture="qwen3",
        ),
        Family(model_type="havoc", architecture="HavocForCausalLM", genai_type="decoder"),
    )
}
"""By `model_type`; `havoc` is HAVOC's own, for a model with vision, or with both bias and norms."""


def family_of(config: HavocConfig) -> Family:
    """The family as which a config is written: the first with its attention, so that others can load it."""
    found = (config.attention.qkv_bias, config.attention.qk_norm)
    families = (family for family in FAMILIES.values() if (family.qkv_bias, family.qk_norm) == found)
    return FAMILIES["havoc"] if config.vision is not None else next(families, FAMILIES["havoc"])


def family_of_gguf(architecture: object) -> Family:
    """The family of a GGUF file's `general.architecture`; an unknown one is a `HavocError`."""
    known = {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture is not None}
    if not isinstance(architecture, str) or architecture not in known:
        raise HavocError(f"architecture {architecture!r:.60} is not supported: HAVOC reads {', '.join(known)}")
    return known[architecture]
