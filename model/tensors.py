"""The name and shape of every tensor of a HAVOC base, as Hugging Face writes them; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import HavocConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
VISION_PROJECTION = "vision.projection.weight"


def layer_name(index: int, part: str) -> str:
    """Name one tensor of one layer: `layer_name(0, "mlp.up_proj")` is "model.layers.0.mlp.up_proj.weight"."""
    return f"model.layers.{index}.{part}.weight"


def tensor_shapes(config: HavocConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in file order; linear weights are [out, in], a tied head is not listed."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.d_model)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in _layer_shapes(config)}
    shapes[FINAL_NORM] = (config.d_model,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.d_model)
    if config.vision is not None:
        shapes[VISION_PROJECTION] = (config.d_model, config.vision.patch_dim)
    return shapes


def _layer_shapes(config: HavocConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention, d_model, hidden_dim = config.attention, config.d_model, config.mlp.hidden_dim
    q_dim, kv_dim = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    yield "input_layernorm.weight", (d_model,)
    for part, out_dim in (("q_proj", q_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)):
        yield f"self_attn.{part}.weight", (out_dim, d_model)
        if attention.qkv_bias:
            yield f"self_attn.{part}.bias", (out_dim,)
    if attention.qk_norm:
        yield "self_attn.q_norm.weight", (attention.head_dim,)
        yield "self_attn.k_norm.weight", (attention.head_dim,)
    yield "self_attn.o_proj.weight", (d_model, q_dim)
    yield "post_attention_layernorm.weight", (d_model,)
    yield "mlp.gate_proj.weight", (hidden_dim, d_model)
    yield "mlp.up_proj.weight", (hidden_dim, d_model)
    yield "mlp.down_proj.weight", (d_model, hidden_dim)


_MODULE_PARTS = (("mlp.gate_proj.", "mlp.w1."), ("mlp.up_proj.", "mlp.w2."), ("mlp.down_proj.", "mlp.w3."))


def module_name(tensor_name: str) -> str:
    """The parameter's path inside `HavocModel` for a Hugging Face tensor name: the inverse of `tensor_name`."""
    name = tensor_name.removeprefix("model.").replace("vision.projection.", "vision_projection.")
    for theirs, ours in _MODULE_PARTS:
        name = name.replace(theirs, ours)
    return name


def tensor_name(module_path: str) -> str:
    """The Hugging Face tensor name for a parameter's path inside `HavocModel`."""
    if module_path.startswith("vision_projection."):
        return module_path.replace("vision_projection.", "vision.projection.")
    for theirs, ours in _MODULE_PARTS:
        module_path = module_path.replace(ours, theirs)
    return module_path if module_path.startswith("lm_head.") else f"model.{module_path}"
