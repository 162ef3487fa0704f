"""The parts of the decoder: norm, rotary positions, grouped-query attention, SwiGLU, and the block they make.

Legend: B batch, T new tokens, P past tokens, S = P + T, D model, N query heads, K kv heads, H head dim, I mlp hidden
dim. RMSNorm: arXiv 1910.07467; RoPE: 2104.09864; GQA: 2305.13245; SwiGLU: 2002.05202.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear
from .rope import rope_tables

if TYPE_CHECKING:
    from .config import AttentionConfig, HavocConfig

KeyValue: TypeAlias = "tuple[Tensor, Tensor]"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; no mean is subtracted, no bias added."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Cosines and signed sines for every position, rounded once from float64.

    Each head's first and second half form the pairs (Hugging Face layout): out = x * cos + swap_halves(x) * (-sin,
    +sin).
    """

    cos_SH: Tensor  # noqa: N815 - a shape suffix
    sin_SH: Tensor  # noqa: N815

    def __init__(self, attention: AttentionConfig, max_seq_len: int) -> None:
        super().__init__()
        cos_SF, sin_SF = (torch.from_numpy(table) for table in rope_tables(attention, max_seq_len))
        self.register_buffer("cos_SH", torch.cat((cos_SF, cos_SF), dim=-1), persistent=False)
        self.register_buffer("sin_SH", torch.cat((-sin_SF, sin_SF), dim=-1), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Look up positions [T] or [B, T]; return cos and sin that broadcast over [B, heads, T, H]."""
        cos, sin = self.cos_SH[positions], self.sin_SH[positions]
        return (cos.unsqueeze(1), sin.unsqueeze(1)) if positions.ndim > 1 else (cos, sin)


def apply_rotary(x_BNTH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate every head of x by its position's angles."""
    cos, sin = rotary
    return torch.addcmul(x_BNTH * cos, x_BNTH.roll(x_BNTH.shape[-1] // 2, dims=-1), sin)


class LayerCache:
    """Preallocated keys and values of one layer, written in place: the cache of a loop that never looks back."""

    def __init__(self, key_BKSH: Tensor, value_BKSH: Tensor) -> None:
        self.key_BKSH, self.value_BKSH, self.length = key_BKSH, value_BKSH, 0

    def append(self, key_BKTH: Tensor, value_BKTH: Tensor) -> KeyValue:
        """Write T new positions; return views [B, K, S, H] of everything written so far."""
        start, self.length = self.length, self.length + key_BKTH.shape[2]
        self.key_BKSH[:, :, start : self.length] = key_BKTH
        self.value_BKSH[:, :, start : self.length] = value_BKTH
        return self.key_BKSH[:, :, : self.length], self.value_BKSH[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep, drop or repeat batch rows: row i becomes the old row `rows[i]`."""
        old_key, old_value, used = self.key_BKSH, self.value_BKSH, self.length
        shape = (len(rows), *old_key.shape[1:])
        self.key_BKSH, self.value_BKSH = old_key.new_empty(shape), old_value.new_empty(shape)
        self.key_BKSH[:, :, :used] = old_key[rows, :, :used]
        self.value_BKSH[:, :, :used] = old_value[rows, :, :used]


class GQAttention(nn.Module):
    """Grouped-query attention: N query heads share K key and value heads, N / K queries to each."""

    def __init__(self, config: HavocConfig) -> None:
        super().__init__()
        shape, d_model = config.attention, config.d_model
        self.head_dim = shape.head_dim
        self.q_proj = Linear(d_model, shape.num_heads * shape.head_dim, bias=shape.qkv_bias)
        self.k_proj = Linear(d_model, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = Linear(d_model, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, config.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, config.norm_eps) if shape.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past: KeyValue | LayerCache | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend from x to itself and to `past`.

        `mask` is additive, broadcastable to [B, N, T, S]; without one, attention is causal (T > 1 needs an empty past
        then). Returns the output [B, T, D] and all keys and values [B, K, S, H].
        """
        q_BNTH, k_BKTH, v_BKTH = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BNTH = apply_rotary(self.q_norm(q_BNTH).transpose(1, 2), rotary)
        k_BKTH = apply_rotary(self.k_norm(k_BKTH).transpose(1, 2), rotary)
        k_BKSH, v_BKSH = _with_past(past, k_BKTH, v_BKTH.transpose(1, 2))
        is_causal = mask is None and x_BTD.shape[1] > 1
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=is_causal, enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1]
        )
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2)), (k_BKSH, v_BKSH)


GroupedQueryAttention = GQAttention


def _with_past(past: KeyValue | LayerCache | None, key_BKTH: Tensor, value_BKTH: Tensor) -> KeyValue:
    if past is None:
        return key_BKTH, value_BKTH
    if isinstance(past, LayerCache):
        return past.append(key_BKTH, value_BKTH)
    return torch.cat((past[0], key_BKTH), dim=2), torch.cat((past[1], value_BKTH), dim=2)


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x): w1 is the gate, w2 goes up, w3 goes down; no biases."""

    def __init__(self, d_model: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(d_model, hidden_dim, bias=False)
        self.w2 = Linear(d_model, hidden_dim, bias=False)
        self.w3 = Linear(hidden_dim, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return [B, T, D]."""
        y_BTD: Tensor = self.w3(F.silu(self.w1(x_BTD)) * self.w2(x_BTD))
        return y_BTD


class TransformerBlock(nn.Module):
    """Norm, attention, residual; norm, SwiGLU, residual. Dropout on both branches, in training only."""

    def __init__(self, config: HavocConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = GQAttention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.mlp.hidden_dim)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past: KeyValue | LayerCache | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Return the residual stream [B, T, D] and this layer's keys and values; arguments as `GQAttention`."""
        attended_BTD, present = self.self_attn(self.input_layernorm(x_BTD), rotary, mask, past)
        x_BTD = x_BTD + self.dropout(attended_BTD)
        return x_BTD + self.dropout(self.mlp(self.post_attention_layernorm(x_BTD))), present
