"""Translation between `HavocConfig` and the fields of Hugging Face's `config.json`.

Reading is strict: a field is either translated, or known to change nothing, or must have the one value this decoder
computes; everything else is refused by name, because a model whose fields are ignored may give wrong answers. Both
spellings are read and written: `rope_theta` + `rope_scaling` (old) and `rope_parameters` (new), `torch_dtype` and
`dtype`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import HavocError
from .config import AttentionConfig, HavocConfig, MLPConfig, RopeScaling, VisionConfig
from .families import FAMILIES, family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .families import Family

_TRANSLATED = frozenset(
    {
        "bos_token_id",
        "dropout",
        "eos_token_id",
        "head_dim",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "qk_norm",
        "qkv_bias",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vision",
        "vocab_size",
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "is_llama_config",
        "label2id",
        "layer_types",
        "max_sequence_length",
        "max_window_layers",
        "model_max_length",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "sliding_window",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)
_SAMPLING = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
"""How a text is sampled, which files from before `generation_config.json` say here; the logits are the same."""

_ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}


def from_hf(fields: dict[str, Any]) -> HavocConfig:
    """Read the fields of a `config.json`; one that changes the numbers and is not supported is refused by name."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise HavocError(f"model_type {model_type!r} is not supported; HAVOC reads {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    fields = {**family.silent, **_renamed(fields, family)}
    _refuse_unsupported(fields, family)
    num_heads = _count(fields, "num_attention_heads")
    d_model = _count(fields, "hidden_size")
    num_kv_heads, head_dim, theta = (
        fields.get("num_key_value_heads"),
        fields.get("head_dim"),
        _rope(fields).get("rope_theta"),
    )
    if head_dim is None:
        head_dim = family.head_dim or d_model // num_heads
    return HavocConfig(
        vocab_size=_count(fields, "vocab_size"),
        d_model=d_model,
        num_layers=_count(fields, "num_hidden_layers"),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            rope_theta=1e4 if theta is None else theta,
            rope_scaling=_read_scaling(_rope(fields), fields),
            qkv_bias=_flag(fields, "qkv_bias", default=family.qkv_bias),
            qk_norm=_flag(fields, "qk_norm", default=family.qk_norm),
        ),
        mlp=MLPConfig(hidden_dim=_count(fields, "intermediate_size")),
        vision=_read_vision(fields.get("vision")),
        max_seq_len=_count(fields, "max_position_embeddings"),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        dropout=fields.get("dropout", 0.0),
        initializer_range=fields.get("initializer_range", 0.02),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings", default=False),
        pad_token_id=_read_pad(fields),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=_read_eos(fields.get("eos_token_id")),
    )


def with_generation(config: HavocConfig, fields: dict[str, Any]) -> HavocConfig:
    """The config with the ends of text that `generation_config.json` names too: chat models name theirs only there."""
    named = _read_eos(fields.get("eos_token_id"))
    return with_ends(config, named if isinstance(named, tuple) else () if named is None else (named,))


def with_ends(config: HavocConfig, eos_ids: Sequence[int]) -> HavocConfig:
    """The config with more ids that end a text; the same config if it has all of them."""
    if set(eos_ids) <= set(config.eos_token_ids):
        return config
    return config.replace(eos_token_id=tuple(dict.fromkeys([*config.eos_token_ids, *eos_ids])))


def to_hf(config: HavocConfig) -> dict[str, Any]:
    """Return the fields of `config.json`, in old and new spelling; `from_hf` reads them back to an equal config."""
    attention, family = config.attention, family_of(config)
    scaling = _write_scaling(attention.rope_scaling)
    eos = config.eos_token_id
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": attention.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": attention.rope_theta, **(scaling or {"rope_type": "default"})},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    fields |= family.written
    if family.model_type == "havoc":
        fields |= {"qkv_bias": attention.qkv_bias, "qk_norm": attention.qk_norm}
    if config.dropout:
        fields |= {"dropout": config.dropout}
    if config.vision is not None:
        names = ("patch_size", "num_channels", "image_token_id")
        fields |= {"vision": {name: getattr(config.vision, name) for name in names}}
    return fields


def _renamed(fields: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields by Hugging Face's usual names; one that is given by both of its names is a `HavocError`."""
    for name, usual in family.renamed.items():
        if name in fields and usual in fields:
            raise HavocError(f"{name} and {usual} are one field of a {family.model_type} config; remove one of them")
    return {family.renamed.get(name, name): value for name, value in fields.items()}


def _refuse_unsupported(fields: dict[str, Any], family: Family) -> None:
    only_value = {**_ONLY_VALUE, **family.only_value}
    for name, value in fields.items():
        if name in only_value:
            if value is not None and value != only_value[name]:
                raise HavocError(
                    f"{name} = {value!r} is not supported; HAVOC computes {name} = {only_value[name]!r} only"
                )
        elif name not in _TRANSLATED | _WITHOUT_EFFECT | _SAMPLING and value is not None:
            raise HavocError(
                f"unknown field {name!r} (= {str(value)[:60]}) may change the numbers; remove it if it does not"
            )
    is_off = fields.get("use_sliding_window", True) in {None, False}
    if fields.get("sliding_window") is not None and not is_off:
        raise HavocError(
            f"sliding_window = {fields['sliding_window']!r} is not supported; HAVOC attends to the full context"
        )
    layers = fields.get("layer_types") or []
    if not isinstance(layers, list):
        raise HavocError(f"layer_types must be a list of names, not {layers!r}")
    other_layers = sorted({str(layer) for layer in layers} - {"full_attention"})
    if other_layers:
        raise HavocError(f"layer_types {', '.join(other_layers)} are not supported; HAVOC computes full_attention only")
    own = sorted({"vision", "qkv_bias", "qk_norm"} & {name for name, value in fields.items() if value is not None})
    if own and family.model_type != "havoc":
        raise HavocError(f"{', '.join(own)} in a {family.model_type} config; only model_type 'havoc' has it")


def _count(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise HavocError(
            f"{name} must be a whole number of at least 1, not {value!r}" if name in fields else f"{name} is missing"
        )
    return value


def _flag(fields: dict[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise HavocError(f"{name} must be true or false, not {value!r}")
    return value


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Merge both spellings into the new one; refuse them if they disagree, because the right one is unknown."""
    old = fields.get("rope_scaling") or {}
    new = fields.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise HavocError(f"{name} must be a JSON object, not {value!r}")
    merged: dict[str, Any] = {}
    if fields.get("rope_theta") is not None:
        merged["rope_theta"] = fields["rope_theta"]
    for source in (old, new):
        for name, value in source.items():
            key = "rope_type" if name == "type" else name
            if merged.setdefault(key, value) != value:
                raise HavocError(
                    f"rope_parameters and rope_theta/rope_scaling disagree about {key}: {merged[key]!r} and {value!r}"
                )
    return merged


_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _read_scaling(rope: dict[str, Any], fields: dict[str, Any]) -> RopeScaling | None:
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):  # a tuple: what JSON gives may be unhashable
        raise HavocError(f"rope_type {rope_type!r} is not supported; HAVOC computes 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise HavocError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported; HAVOC rotates whole heads"
        )
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *(_SCALING_FIELDS if rope_type == "llama3" else ())}
    unknown = sorted(set(rope) - known)
    if unknown:
        raise HavocError(f"unknown RoPE field {unknown[0]!r} with rope_type {rope_type!r} may change the numbers")
    if rope_type == "default":
        return None
    missing = [name for name in _SCALING_FIELDS[:3] if rope.get(name) is None]
    if missing:
        raise HavocError(f"rope_type 'llama3' needs {', '.join(missing)}")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_seq_len=rope.get(_SCALING_FIELDS[3]) or _count(fields, "max_position_embeddings"),
    )


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len)
    return {"rope_type": "llama3", **dict(zip(_SCALING_FIELDS, values, strict=True))}


def _read_vision(fields: object) -> VisionConfig | None:
    if fields is None:
        return None
    names = {"patch_size", "num_channels", "image_token_id"}
    if not isinstance(fields, dict) or set(fields) != names:
        raise HavocError(f"vision must hold exactly {', '.join(sorted(names))}, not {fields!r}")
    return VisionConfig(**fields)


def _read_pad(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - HavocConfig checks the type
    """The padding id; an id outside the table is ignored, because padding is masked and any id works."""
    value, num_rows = fields.get("pad_token_id"), fields.get("vocab_size")
    is_outside = type(value) is int and type(num_rows) is int and not 0 <= value < num_rows
    return None if is_outside else value


def _read_eos(value: object) -> int | tuple[int, ...] | None:
    if value is None or type(value) is int:
        return value
    if isinstance(value, list) and value and all(type(token_id) is int for token_id in value):
        return tuple(value)
    raise HavocError(f"eos_token_id must be a token id or a list of them, not {value!r}")
