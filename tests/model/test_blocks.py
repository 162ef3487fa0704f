"""Each part against its formula, computed the slow way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from havoc_core.model import GQAttention, HavocConfig, RMSNorm, RotaryEmbedding, SwiGLU, TransformerBlock
from havoc_core.model.blocks import LayerCache, apply_rotary

CONFIG = HavocConfig.pico()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rotary(num_tokens: int) -> tuple[Tensor, Tensor]:
    return RotaryEmbedding(CONFIG.attention, CONFIG.max_seq_len)(torch.arange(num_tokens))


def test_rms_norm_is_its_formula() -> None:
    """x / sqrt(mean(x^2) + eps) * weight; no mean is subtracted."""
    norm, x = RMSNorm(32, eps=1e-3), torch.randn(2, 3, 32) + 5
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_swiglu_is_its_formula() -> None:
    """w3(SiLU(w1 x) * w2 x)."""
    mlp, x = SwiGLU(32, 64), torch.randn(2, 3, 32)
    gate = x @ mlp.w1.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ mlp.w2.weight.T)) @ mlp.w3.weight.T
    assert torch.allclose(mlp(x), expected, atol=1e-6)


def test_rotation_is_complex_multiplication() -> None:
    """Halves (a, b) of a head are a + ib, turned by e^(i angle): lengths stay."""
    x_BNTH = torch.randn(1, 2, 10, 8)
    as_complex = torch.complex(x_BNTH[..., :4].double(), x_BNTH[..., 4:].double())
    angles = torch.outer(torch.arange(10.0, dtype=torch.float64), 1e4 ** (-torch.arange(0, 8, 2).double() / 8))
    turned = as_complex * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1).float()
    assert torch.allclose(apply_rotary(x_BNTH, rotary(10)), expected, atol=1e-6)


def test_scores_depend_on_distance_only() -> None:
    """The product of a rotated query and key is the same 3 and 53 tokens into the text."""
    query, key = torch.randn(8), torch.randn(8)
    table = rotary(60)

    def score(query_at: int, key_at: int) -> float:
        turned = [
            apply_rotary(x.view(1, 1, 1, 8), (table[0][at : at + 1], table[1][at : at + 1]))
            for x, at in ((query, query_at), (key, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(53, 51), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


@torch.no_grad()
def test_attention_is_its_formula() -> None:
    """Query head n attends with kv head n // 2, causally, scaled by 1/sqrt(H)."""
    attention, x_BTD = GQAttention(CONFIG), torch.randn(2, 6, 32)
    output, (key, value) = attention(x_BTD, rotary(6))
    query = apply_rotary(attention.q_proj(x_BTD).view(2, 6, 4, 8).transpose(1, 2), rotary(6))
    heads = []
    for head in range(4):
        scores = query[:, head] @ key[:, head // 2].transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ value[:, head // 2])
    assert torch.allclose(output, attention.o_proj(torch.cat(heads, dim=-1)), atol=1e-6)


@torch.no_grad()
def test_block_is_pre_norm_with_two_residuals() -> None:
    """x + attention(norm(x)), then + mlp(norm(that))."""
    block, x_BTD = TransformerBlock(CONFIG), torch.randn(2, 5, 32)
    middle = x_BTD + block.self_attn(block.input_layernorm(x_BTD), rotary(5))[0]
    expected = middle + block.mlp(block.post_attention_layernorm(middle))
    assert torch.allclose(block(x_BTD, rotary(5))[0], expected, atol=1e-6)


@torch.no_grad()
def test_both_caches_hold_the_same() -> None:
    """Written in place or concatenated, keys, values and outputs are equal."""
    attention, x_BTD = GQAttention(CONFIG), torch.randn(2, 4, 32)
    table = rotary(4)
    before, step = (table[0][:3], table[1][:3]), (table[0][3:], table[1][3:])
    cache = LayerCache(torch.empty(2, 2, 9, 8), torch.empty(2, 2, 9, 8))
    _, past = attention(x_BTD[:, :3], before)
    attention(x_BTD[:, :3], before, past=cache)
    expected, (expected_key, expected_value) = attention(x_BTD[:, 3:], step, past=past)
    output, (key, value) = attention(x_BTD[:, 3:], step, past=cache)
    assert torch.equal(key, expected_key)
    assert torch.equal(value, expected_value)
    assert torch.allclose(output, expected, atol=1e-6)
    assert cache.length == 4


def test_selected_rows_take_their_past_along() -> None:
    """Rows can be dropped, repeated and reordered; room to grow stays."""
    key = torch.arange(24.0).view(3, 1, 4, 2)
    cache = LayerCache(key.clone(), -key)
    cache.length = 3
    cache.select(torch.tensor([2, 0, 2, 1]))
    assert cache.key_BKSH.shape == (4, 1, 4, 2)
    assert torch.equal(cache.key_BKSH[:, :, :3], key[[2, 0, 2, 1], :, :3])
    assert torch.equal(cache.value_BKSH[:, :, :3], -key[[2, 0, 2, 1], :, :3])
