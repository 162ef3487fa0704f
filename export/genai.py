"""`genai_config.json`: what onnxruntime-genai needs to run a text artifact unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..model.families import family_of
from .runtime.dialects import DIALECTS
from .runtime.options import DEFAULT_OPTIONS, GraphOptions

if TYPE_CHECKING:
    from ..model.config import HavocConfig


def genai_config(config: HavocConfig, options: GraphOptions = DEFAULT_OPTIONS) -> dict[str, Any]:
    """The document for a text decoder; greedy by default.

    `max_length` is the context, or the length of a static cache: the runtime sizes its cache by it, and in a static one
    passes the same buffers as past and present. Some dialects count positions themselves.
    """
    attention = config.attention
    max_length = options.fitted(config.max_seq_len).cache_len or config.max_seq_len
    positions = {"position_ids": "position_ids"} if DIALECTS[options.dialect].has_positions else {}
    eos = list(config.eos_token_ids)
    family = family_of(config)
    first_eos = eos[0] if eos else 0
    return {
        "model": {
            "bos_token_id": first_eos if config.bos_token_id is None else config.bos_token_id,
            "context_length": config.max_seq_len,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    "session.set_denormal_as_zero": "1",  # as `denormals` explains
                },
                "filename": "model.onnx",
                "head_size": attention.head_dim,
                "hidden_size": config.d_model,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **positions,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": attention.num_heads,
                "num_hidden_layers": config.num_layers,
                "num_key_value_heads": attention.num_kv_heads,
            },
            "eos_token_id": eos if len(eos) > 1 else first_eos,
            "pad_token_id": first_eos if config.pad_token_id is None else config.pad_token_id,
            "type": family.genai_type or family.model_type,
            "vocab_size": config.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": max_length,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": options.cache == "static",
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
