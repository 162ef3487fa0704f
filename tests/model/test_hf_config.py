"""Foreign `config.json` files: what is the same decoder is read, what is another one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from havoc_core.errors import HavocError
from havoc_core.model.config import HavocConfig, RopeScaling, VisionConfig
from havoc_core.model.config_file import read_config
from havoc_core.model.hf_config import from_hf, to_hf

SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3: dict[str, Any] = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_smollm2_is_the_edge_preset() -> None:
    """SmolLM2-135M's own file has the shape of `edge-135m`."""
    theirs, ours = from_hf(SMOLLM2_135M), HavocConfig.edge_135m()
    assert theirs.attention == ours.attention
    assert (theirs.mlp, theirs.d_model, theirs.num_layers) == (ours.mlp, ours.d_model, ours.num_layers)
    assert (theirs.vocab_size, theirs.max_seq_len, theirs.norm_eps) == (
        ours.vocab_size,
        ours.max_seq_len,
        ours.norm_eps,
    )


def test_qwen_has_bias_or_norms() -> None:
    """Qwen2 brings bias on q, k and v; Qwen3 norms on q and k, and heads of 128 where the file is silent."""
    qwen2 = from_hf(QWEN25_05B)
    assert (qwen2.attention.qkv_bias, qwen2.attention.qk_norm, qwen2.attention.head_dim) == (True, False, 64)
    qwen3 = from_hf(QWEN25_05B | {"model_type": "qwen3"})
    assert (qwen3.attention.qkv_bias, qwen3.attention.qk_norm, qwen3.attention.head_dim) == (False, True, 128)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {
            "rope_theta": 500_000.0,
            "rope_scaling": {"type" if key == "rope_type" else key: LLAMA3[key] for key in LLAMA3},
        },
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500_000.0, **LLAMA3}},
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 500_000.0, **LLAMA3}},
    ],
    ids=["old", "older", "new", "both"],
)
def test_every_spelling_of_rope(spelling: dict[str, Any]) -> None:
    """Old, older and new spelling of llama3 scaling mean the same."""
    attention = from_hf(SMOLLM2_135M | spelling).attention
    assert attention.rope_theta == 500_000.0
    expected = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    assert attention.rope_scaling == expected


def test_both_spellings_are_written() -> None:
    """Old and new readers find RoPE and the type of the weights."""
    fields = to_hf(from_hf(SMOLLM2_135M | {"rope_scaling": LLAMA3}))
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 100_000
    assert fields["rope_scaling"]["rope_type"] == fields["rope_parameters"]["rope_type"] == "llama3"
    assert fields["torch_dtype"] == fields["dtype"] == "float32"


def test_vision_makes_it_havoc() -> None:
    """A text model goes out as Llama; one with vision, or with both of Qwen's extras, as HAVOC."""
    text = HavocConfig.pico()
    assert (to_hf(text)["model_type"], to_hf(text)["architectures"]) == ("llama", ["LlamaForCausalLM"])
    fields = to_hf(HavocConfig.pico(vision=VisionConfig(image_token_id=3)))
    assert (fields["model_type"], fields["architectures"]) == ("havoc", ["HavocForCausalLM"])
    assert fields["vision"] == {"patch_size": 8, "num_channels": 3, "image_token_id": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported; HAVOC reads llama, qwen2, qwen3, havoc"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; HAVOC computes hidden_act = 'silu' only"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"logit_scale": 0.5}, "unknown field 'logit_scale'"),
        ({"attention_multiplier": 0.1}, "unknown field 'attention_multiplier'"),
        ({"embedding_multiplier": 12.0}, "unknown field 'embedding_multiplier'"),
        ({"residual_multiplier": 0.2}, "unknown field 'residual_multiplier'"),
        ({"logits_scaling": 8.0}, "unknown field 'logits_scaling'"),
        ({"final_logit_softcapping": 30.0}, "unknown field 'final_logit_softcapping'"),
        ({"query_pre_attn_scalar": 256}, "unknown field 'query_pre_attn_scalar'"),
        ({"clip_qkv": 8.0}, "unknown field 'clip_qkv'"),
        ({"no_rope_layers": [1, 0]}, "unknown field 'no_rope_layers'"),
        ({"num_experts": 8}, "unknown field 'num_experts'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not supported"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh'"),
        ({"quantization_config": {"bits": 4}}, "unknown field 'quantization_config'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "unknown RoPE field 'full_attention'"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types sliding_attention"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}, "unknown RoPE field 'attention_factor'"),
        ({"rope_scaling": [8]}, "rope_scaling must be a JSON object"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor must be a number"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "disagree about rope_theta: 100000 and 1000000.0"),
        ({"rope_theta": "big"}, "attention.rope_theta must be a number"),
        ({"vision": {"patch_size": 8, "num_channels": 3, "image_token_id": 3}}, "vision in a llama config"),
        ({"model_type": "havoc", "vision": {"patch_size": 8}}, "vision must hold exactly"),
        ({"hidden_size": "576"}, "hidden_size must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_key_value_heads": 2}, "multiple of num_kv_heads"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"eos_token_id": 49152}, "eos_token_id 49152 is not in the vocabulary"),
        ({"eos_token_id": []}, "eos_token_id must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": "small"}, "norm_eps must be a number"),
    ],
)
def test_another_model_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """A field that would change the numbers stops the import, and the message names it."""
    with pytest.raises(HavocError, match=message):
        from_hf(SMOLLM2_135M | changes)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_what_is_missing_is_named(name: str) -> None:
    """Sizes have no defaults."""
    with pytest.raises(HavocError, match=f"{name} is missing"):
        from_hf({key: value for key, value in SMOLLM2_135M.items() if key != name})


def test_defaults_are_transformers_defaults() -> None:
    """Where a file is silent, transformers' default holds: untied, theta 10000, one kv head for each query head."""
    silent = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "rms_norm_eps", "rope_scaling")
    config = from_hf({key: value for key, value in SMOLLM2_135M.items() if key not in silent})
    assert config.attention.num_kv_heads == 9
    assert (config.attention.rope_theta, config.tie_word_embeddings, config.norm_eps) == (1e4, False, 1e-6)


def test_several_ends() -> None:
    """A list of end tokens is kept."""
    config = from_hf(SMOLLM2_135M | {"eos_token_id": [2, 7]})
    assert config.eos_token_ids == (2, 7)
    assert to_hf(config)["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    "fields",
    [{"layer_types": 5}, {"rope_parameters": {"rope_type": ["default"]}}, {"rope_parameters": {"rope_type": {}}}],
    ids=["layer_types", "rope_type list", "rope_type object"],
)
def test_values_of_a_foreign_type_are_named(fields: dict[str, Any]) -> None:
    """JSON may hold a list or a number where a name belongs: one line, not a TypeError."""
    (name,) = fields
    with pytest.raises(HavocError, match="layer_types|rope_type"):
        from_hf({key: value for key, value in SMOLLM2_135M.items() if key != name} | fields)


HARMLESS: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_name_or_path": "somewhere/else",
    "attention_dropout": 0.1,
    "bad_words_ids": [[1]],
    "do_sample": True,
    "max_length": 20,
    "max_sequence_length": 2048,
    "num_beams": 4,
    "pruned_heads": {},
    "repetition_penalty": 1.2,
    "temperature": 0.7,
    "tokenizer_class": "LlamaTokenizer",
    "torchscript": False,
    "unsloth_version": "2025.1",
    "use_bfloat16": False,
    "use_cache": False,
    "something_null": None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_number_is_accepted(name: str) -> None:
    """Training, sampling and bookkeeping fields of older and of other tools' files."""
    assert from_hf(SMOLLM2_135M | {name: HARMLESS[name]}) == from_hf(SMOLLM2_135M)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwens_window_is_off_where_the_file_is_silent(model_type: str) -> None:
    """As in transformers: a window that is named but not switched on is none. Llama has no switch: there it counts."""
    fields = {key: value for key, value in QWEN25_05B.items() if key != "use_sliding_window"}
    silent = from_hf(fields | {"model_type": model_type})
    assert silent == from_hf(fields | {"model_type": model_type, "sliding_window": None})


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.Qwen2Config, transformers.Qwen3Config])
def test_every_field_that_transformers_writes_is_known(kind: type[transformers.PreTrainedConfig]) -> None:
    """Its defaults, all of them, are read; its own small config reads back with the same shape."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = kind(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ours = from_hf(config.to_dict())
    assert from_hf(to_hf(ours)) == ours
    again = kind(**to_hf(ours))
    assert (again.head_dim if hasattr(again, "head_dim") else 8) == ours.attention.head_dim


@pytest.mark.parametrize(
    ("named", "expected"),
    [(7, (2, 7)), ([2, 7, 9], (2, 7, 9)), (2, 2), ([2], 2), (None, 2)],
    ids=["another", "several", "the same", "the same in a list", "none"],
)
def test_ends_of_text_of_chat_models(tmp_path: Path, named: object, expected: object) -> None:
    """Chat models name the end of a turn in generation_config.json alone: both files count."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(HavocConfig.pico())))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named, "temperature": 0.6}))
    assert read_config(tmp_path).eos_token_id == expected


def test_an_end_of_text_beyond_the_table_is_refused(tmp_path: Path) -> None:
    """With the name of the file that says it."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(HavocConfig.pico())))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 64}')
    with pytest.raises(HavocError, match=r"generation_config\.json: eos_token_id 64"):
        read_config(tmp_path)
