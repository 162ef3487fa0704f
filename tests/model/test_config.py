"""The configuration refuses what cannot be built, and survives the disk."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.errors import HavocError
from havoc_core.model.config import PRESETS, AttentionConfig, HavocConfig, MLPConfig, RopeScaling, VisionConfig
from havoc_core.model.config_file import read_config
from havoc_core.model.hf_config import from_hf, to_hf


@st.composite
def configs(draw: st.DrawFn) -> HavocConfig:
    vocab_size = draw(st.integers(4, 1000))
    ids = st.integers(0, vocab_size - 1)
    positive = st.integers(1, 1000)
    num_kv_heads = draw(st.integers(1, 8))
    scaling = st.builds(
        RopeScaling,
        factor=st.floats(1, 100),
        low_freq_factor=st.floats(0.1, 2),
        high_freq_factor=st.floats(2.5, 8),
        original_max_seq_len=positive,
    )
    return HavocConfig(
        vocab_size=vocab_size,
        d_model=draw(positive),
        num_layers=draw(positive),
        attention=AttentionConfig(
            num_heads=num_kv_heads * draw(st.integers(1, 4)),
            num_kv_heads=num_kv_heads,
            head_dim=2 * draw(st.integers(1, 64)),
            rope_theta=draw(st.floats(10, 1e6)),
            rope_scaling=draw(st.none() | scaling),
            qkv_bias=draw(st.booleans()),
            qk_norm=draw(st.booleans()),
        ),
        mlp=MLPConfig(hidden_dim=draw(positive)),
        vision=draw(st.none() | st.builds(VisionConfig, patch_size=st.integers(1, 32), image_token_id=ids)),
        max_seq_len=draw(positive),
        norm_eps=draw(st.floats(0, 1e-2)),
        dropout=draw(st.floats(0, 0.9)),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.none() | ids),
        bos_token_id=draw(st.none() | ids),
        eos_token_id=draw(st.none() | ids | st.lists(ids, min_size=1).map(tuple)),
    )


@given(configs())
def test_hugging_face_fields_keep_everything(config: HavocConfig) -> None:
    """What `to_hf` writes, as JSON text, `from_hf` reads back to an equal config."""
    assert from_hf(json.loads(json.dumps(to_hf(config), allow_nan=False))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    """Every preset has the shape it names, on disk too."""
    config = HavocConfig.preset(name)
    assert from_hf(to_hf(config)) == config


def test_preset_spellings() -> None:
    """`havoc_7b`, `HAVOC-7B` and `7b` are one; what is no preset is refused with the list of them."""
    assert HavocConfig.preset("havoc_7b") == HavocConfig.preset("HAVOC-7B") == HavocConfig.havoc_7b()
    assert HavocConfig.preset("edge_135m") == HavocConfig.edge_135m()
    with pytest.raises(HavocError, match=r"'giant'; .*7b, pico, nano, edge-135m, edge-360m"):
        HavocConfig.preset("giant")


def test_the_seed_shape() -> None:
    """HAVOC-7B is 32 layers of 4096, 32 query and 8 kv heads of 128, SwiGLU 11008, 70000 tokens, context 4096."""
    config = HavocConfig.havoc_7b()
    assert (config.num_layers, config.d_model, config.vocab_size, config.max_seq_len) == (32, 4096, 70_000, 4096)
    attention = config.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (32, 8, 128)
    assert config.mlp.hidden_dim == 11_008
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "config.vocab_size must be a whole number from 1 to 2147483647, not 0"),
        ({"d_model": 3.5}, "config.d_model must be a whole number"),
        ({"num_layers": True}, "config.num_layers must be a whole number"),
        ({"num_layers": 2_000_000_000}, "config.num_layers must be a whole number from 1 to 1024"),
        ({"max_seq_len": 2**31}, "config.max_seq_len must be a whole number from 1 to 1048576"),
        ({"norm_eps": -1.0}, r"config.norm_eps must be a number in \[0, 1\]"),
        ({"norm_eps": float("nan")}, "config.norm_eps"),
        ({"dropout": 1.0}, "config.dropout"),
        ({"initializer_range": "0.02"}, "config.initializer_range"),
        ({"pad_token_id": 64}, "pad_token_id 64 is not in the vocabulary of 64 tokens"),
        ({"eos_token_id": (2, -1)}, "eos_token_id -1"),
        ({"bos_token_id": 1.0}, "bos_token_id 1.0"),
        ({"vision": VisionConfig(image_token_id=99)}, "vision.image_token_id 99"),
    ],
)
def test_bad_values_are_named(changes: dict[str, object], message: str) -> None:
    """A value out of range is refused by the name of its field."""
    with pytest.raises(HavocError, match=message):
        dataclasses.replace(HavocConfig.pico(), **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_heads": 4, "num_kv_heads": 3, "head_dim": 8},
            r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)",
        ),
        ({"num_heads": 4, "num_kv_heads": 0, "head_dim": 8}, "num_kv_heads must be"),
        ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 7}, "head_dim must be even for RoPE, not 7"),
        ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 0}, "rope_theta"),
    ],
)
def test_bad_attention_is_named(fields: dict[str, int], message: str) -> None:
    """Heads that cannot be grouped or rotated are refused."""
    with pytest.raises(HavocError, match=message):
        AttentionConfig(**fields)


def test_bad_vision_and_scaling_are_named() -> None:
    """Four channels, or a llama3 band without width, are refused."""
    with pytest.raises(HavocError, match="num_channels must be 1"):
        VisionConfig(num_channels=4, image_token_id=3)
    with pytest.raises(HavocError, match=r"low_freq_factor \(4\) .*high_freq_factor \(4\)"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_seq_len=32)


def test_frozen_and_keyword_only() -> None:
    """A config cannot change under the model that was built from it."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        HavocConfig.pico().d_model = 7
    with pytest.raises(TypeError):
        MLPConfig(64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"model_type": "llama"}', "num_attention_heads is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The error of a directory begins with the file it is about."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HavocError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)
    with pytest.raises(HavocError, match="no such file"):
        read_config(tmp_path / "absent")


def test_configuration_and_cost_need_no_torch() -> None:
    """On a device, config, cost, structure, rope, tensors, tokenizer and vision load without torch."""
    names = ("config", "hf_config", "cost", "structure", "rope", "tensors", "tokenizer", "vision")
    imports = "; ".join(f"import havoc_core.model.{name}" for name in names)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
