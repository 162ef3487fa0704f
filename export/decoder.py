"""The decoder's graph in every dialect: embeddings in, blocks, head, and the names of inputs and outputs.

    B batch, T new tokens, P past tokens, S = P + T, C length of a static cache, D model, H head dim, V vocab

Each dialect has its own attention and normalisation: `runtime.dialects` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..model.tensors import EMBEDDING, HEAD

if TYPE_CHECKING:
    from ..model.config import HavocConfig
    from .runtime.options import GraphOptions
    from .tape import Dimensions, GraphTape


class DecoderGraph(ABC):
    """The decoder's nodes, block by block, in the order of the forward pass."""

    def __init__(self, config: HavocConfig, graph: GraphTape, options: GraphOptions) -> None:
        self.config = config
        self.graph = graph
        self.options = options

    @abstractmethod
    def build(self, x_BTD: ir.Value) -> ir.Model:
        """The decoder over embeddings [B, T, D]: logits fp32 [B, 1 or T, V] and every layer's keys and values."""

    def past(self, layer: int) -> list[ir.Value]:
        """Declare the inputs for one layer's keys and values, [B, num_kv_heads, P or C, H]."""
        tokens = "past" if self.options.cache == "dynamic" else "cache_len"
        names = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        return [self.graph.input(name, self.graph.activation, self._cache(tokens)) for name in names]

    def presents(self, values: list[ir.Value]) -> list[ir.Value]:
        """One layer's keys and values as graph outputs, [B, num_kv_heads, S or C, H]."""
        tokens = "total" if self.options.cache == "dynamic" else "cache_len"
        return [self.graph.typed(value, self.graph.activation, self._cache(tokens)) for value in values]

    def _cache(self, tokens: str) -> Dimensions:
        attention = self.config.attention
        return ["batch", attention.num_kv_heads, tokens, attention.head_dim]

    def projected(self, layer: int, kind: str, x_BTD: ir.Value) -> ir.Value:
        """Queries, keys or values [B, T, heads * H] before rotation, with Qwen2's bias."""
        name, source = f"layers.{layer}/attention/{kind}", f"model.layers.{layer}.self_attn.{kind}_proj."
        projected = self.graph.linear(name, x_BTD, source + "weight")
        if not self.config.attention.qkv_bias:
            return projected
        return self.graph.op(f"{name}_bias", "Add", [projected, self.graph.part(source + "bias")])

    def split_heads(self, name: str, kind: str, x: ir.Value, num_heads: int) -> ir.Value:
        """[B, T, heads * H] to [B, T, heads, H]."""
        split = self.graph.constant(f"{kind}_heads", [0, 0, num_heads, self.config.attention.head_dim])
        return self.graph.op(f"{name}_split", "Reshape", [x, split])

    def join_heads(self, name: str, kind: str, x: ir.Value, num_heads: int) -> ir.Value:
        """[B, T, heads, H] to [B, T, heads * H]."""
        joined = self.graph.constant(f"{kind}_joined", [0, 0, num_heads * self.config.attention.head_dim])
        return self.graph.op(f"{name}_join", "Reshape", [x, joined])

    def mlp(self, layer: int, normed: ir.Value) -> ir.Value:
        """SwiGLU over normalised activations [B, T, D], before the residual."""
        graph, name, source = self.graph, f"layers.{layer}/mlp", f"model.layers.{layer}.mlp."
        gate = graph.linear(f"{name}/gate", normed, source + "gate_proj.weight")
        up = graph.linear(f"{name}/up", normed, source + "up_proj.weight")
        silu = graph.op(f"{name}/silu", "Mul", [gate, graph.op(f"{name}/sigmoid", "Sigmoid", [gate])])
        hidden = graph.op(f"{name}/gated", "Mul", [silu, up])
        return graph.linear(f"{name}/down", hidden, source + "down_proj.weight")

    def head(self, normed: ir.Value) -> ir.Value:
        """Logits fp32 of normalised positions [B, 1 or T, D]."""
        graph, config = self.graph, self.config
        source = EMBEDDING if config.tie_word_embeddings else HEAD
        is_half = graph.activation == ir.DataType.FLOAT16
        logits = graph.linear("head", normed, source, output="" if is_half else "logits")
        if is_half:
            logits = graph.op("logits_fp32", "Cast", [logits], output="logits", to=int(ir.DataType.FLOAT))
        num_logits = 1 if self.options.logits == "last" else "sequence"
        return graph.typed(logits, ir.DataType.FLOAT, ["batch", num_logits, config.vocab_size])
