"""The `standard` dialect: ONNX's own RMSNormalization, RotaryEmbedding and Attention (opset 23; static cache: 24).

    B batch, T new tokens, P past tokens, S = P + T, C length of a static cache, D model, H head dim

Which key a query may see is `key <= query and (real key or key == query)`: a padding query sees itself, so that no row
of scores is empty and no NaN enters the cache; real queries never see padding.

Tokens are counted from the newest one, by sums over ones. To count them from the first, the length of the past would
be needed, a number that ONNX Runtime computes on the CPU: then not every node would run on a CUDA card, and a step
that waits for such a number cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..model.tensors import FINAL_NORM
from .decoder import DecoderGraph
from .layout import ROPE_COS, ROPE_SIN

_ZERO, _ONE = ir.tensor(np.zeros(1, np.int64)), ir.tensor(np.ones(1, np.int64))


class StandardDecoder(DecoderGraph):
    """A cache that grows: Attention joins past and new keys itself."""

    def build(self, x_BTD: ir.Value) -> ir.Model:
        """See `DecoderGraph.build`."""
        graph = self.graph
        mask_BS = graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.position_ids = graph.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.allowed = self._allowed(x_BTD, mask_BS)
        presents: list[ir.Value] = []
        for layer in range(self.config.num_layers):
            x_BTD, present = self._block(layer, x_BTD)
            presents += present
        if self.options.logits == "last":
            x_BTD = graph.op("last_position", "Gather", [x_BTD, graph.constant("last", [-1])], axis=1)
        return graph.finish("havoc", [self.head(self._norm("final_norm", x_BTD, FINAL_NORM)), *presents])

    def _allowed(self, x_BTD: ir.Value, mask_BS: ir.Value) -> ir.Value:
        """Which key each query may see, bool [B, 1, T, S]."""
        graph = self.graph
        key_S, query_T = (
            self._counted(name, graph.op(f"num_{name}", "Shape", [value], start=1, end=2), reverse=1)
            for name, value in (("key", mask_BS), ("query", x_BTD))
        )
        return self._visible(key_S, query_T, mask_BS)

    def _counted(self, name: str, length: ir.Value, *, reverse: int = 0) -> ir.Value:
        """The numbers from 1 to `length`, int64 [1], or from there down to 1: int64 [length]."""
        graph = self.graph
        ones = graph.op(f"{name}_ones", "ConstantOfShape", [length], value=_ONE)
        return graph.op(f"{name}_number", "CumSum", [ones, graph.constant("scalar_zero", 0)], reverse=reverse)

    def _visible(self, key_S: ir.Value, query_T: ir.Value, mask_BS: ir.Value) -> ir.Value:
        """Which key each query may see; both are counted from the newest token, 1, to the oldest."""
        graph = self.graph
        query_T1 = graph.op("query_column", "Unsqueeze", [query_T, graph.constant("axis_1", [1])])
        causal_TS = graph.op("causal", "GreaterOrEqual", [key_S, query_T1])
        itself_TS = graph.op("itself", "Equal", [key_S, query_T1])
        real_BS = graph.op("real", "Cast", [mask_BS], to=int(ir.DataType.BOOL))
        real_B11S = graph.op("real_keys", "Unsqueeze", [real_BS, graph.constant("axes_1_2", [1, 2])])
        visible = graph.op("visible", "Or", [real_B11S, itself_TS])
        return graph.op("allowed", "And", [causal_TS, visible])

    def _norm(self, name: str, x: ir.Value, source: str) -> ir.Value:
        scale = self.graph.part(source)
        return self.graph.op(name, "RMSNormalization", [x, scale], axis=-1, epsilon=self.config.norm_eps)

    def _block(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        graph, name, source = self.graph, f"layers.{layer}", f"model.layers.{layer}."
        normed = self._norm(f"{name}/input_norm", x_BTD, source + "input_layernorm.weight")
        heads, present = self._attention(layer, normed)
        attended = graph.linear(f"{name}/attention/o", heads, source + "self_attn.o_proj.weight")
        x_BTD = graph.op(f"{name}/attention_residual", "Add", [x_BTD, attended])
        normed = self._norm(f"{name}/post_attention_norm", x_BTD, source + "post_attention_layernorm.weight")
        return graph.op(f"{name}/mlp_residual", "Add", [x_BTD, self.mlp(layer, normed)]), self.presents(present)

    def _attention(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The output of the heads, [B, T, heads * H], and the keys and values of all tokens."""
        attention = self.config.attention
        name = f"layers.{layer}/attention"
        q = self._rotated(layer, "q", x_BTD, attention.num_heads)
        k = self._rotated(layer, "k", x_BTD, attention.num_kv_heads)
        v = self.projected(layer, "v", x_BTD)
        heads, *present = self.graph.ops(
            f"{name}/Attention",
            "Attention",
            [q, k, v, self.allowed, *self.past(layer)],
            [f"{name}/heads", f"present.{layer}.key", f"present.{layer}.value"],
            q_num_heads=attention.num_heads,
            kv_num_heads=attention.num_kv_heads,
        )
        return heads, present

    def _rotated(self, layer: int, kind: str, x_BTD: ir.Value, num_heads: int) -> ir.Value:
        """Queries or keys [B, T, heads * H], normalised per head where Qwen3 does, rotated."""
        name = f"layers.{layer}/attention/{kind}"
        x = self.projected(layer, kind, x_BTD)
        if self.config.attention.qk_norm:
            x = self.split_heads(name, kind, x, num_heads)
            x = self._norm(f"{name}_norm", x, f"model.layers.{layer}.self_attn.{kind}_norm.weight")
            x = self.join_heads(name, kind, x, num_heads)
        return self._rotate(f"{name}_rotated", x, num_heads=num_heads)

    def _rotate(self, name: str, x: ir.Value, *, num_heads: int) -> ir.Value:
        tables = [self.graph.part(ROPE_COS), self.graph.part(ROPE_SIN)]
        return self.graph.op(name, "RotaryEmbedding", [x, *tables, self.position_ids], num_heads=num_heads)


class StaticStandardDecoder(StandardDecoder):
    """A cache of C tokens that never moves: TensorScatter writes the new keys after the past ones, in place.

    The mask is [B, S], or [B, C] with zeros after the newest token, so that all shapes of a step can stay the same: the
    place of the newest token is read from the mask's values. It must be real in at least one row, as with padding on
    the left.
    """

    def _allowed(self, x_BTD: ir.Value, mask_BS: ir.Value) -> ir.Value:
        """The keys that each query may see, bool [B, 1, T, C]; also sets where the new keys are written, int64 [B]."""
        graph = self.graph
        self.caches = [self.past(layer) for layer in range(self.config.num_layers)]
        cache_len = graph.op("cache_len", "Shape", [self.caches[0][0]], start=2, end=3)
        mask_BC = self._padded(mask_BS, cache_len)
        number_C = self._counted("key", cache_len)
        num_total = graph.op("num_total", "ReduceMax", [graph.op("places", "Mul", [mask_BC, number_C])], keepdims=0)
        query_T = self._counted("query", graph.op("num_new", "Shape", [x_BTD], start=1, end=2), reverse=1)
        num_query = graph.op("num_query", "ReduceMax", [query_T], keepdims=1)
        batch = graph.op("batch", "Shape", [x_BTD], start=0, end=1)
        self.write_at = graph.op("write_at", "Expand", [graph.op("num_past", "Sub", [num_total, num_query]), batch])
        next_number = graph.op("next_number", "Add", [num_total, graph.constant("scalar_one", 1)])
        key_C = graph.op("key_from_the_end", "Sub", [next_number, number_C])
        return self._visible(key_C, query_T, mask_BC)

    def _padded(self, mask_BS: ir.Value, cache_len: ir.Value) -> ir.Value:
        """The mask with zeros after it, [B, C]: joined and cut, because Pad needs the number of zeros."""
        graph = self.graph
        zero, one = graph.constant("zeroth", [0]), graph.constant("axis_1", [1])
        column_B1 = graph.op("mask_column", "Slice", [mask_BS, zero, one, one])
        zeros_C = graph.op("zeros", "ConstantOfShape", [cache_len], value=_ZERO)
        no_keys_BC = graph.op("no_keys", "Mul", [column_B1, zeros_C])
        joined = graph.op("mask_joined", "Concat", [mask_BS, no_keys_BC], axis=1)
        return graph.op("mask", "Slice", [joined, zero, cache_len, one])

    def _attention(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        graph, attention, name = self.graph, self.config.attention, f"layers.{layer}/attention"
        q = self._by_head(layer, "q", x_BTD, attention.num_heads)
        new = [self._by_head(layer, kind, x_BTD, attention.num_kv_heads) for kind in ("k", "v")]
        present = [
            graph.op(
                f"{name}/{kind}_cache", "TensorScatter", [past, update, self.write_at], output=f"present.{layer}.{kind}"
            )
            for kind, past, update in zip(("key", "value"), self.caches[layer], new, strict=True)
        ]
        heads = graph.op(f"{name}/Attention", "Attention", [q, *present, self.allowed])
        rows = graph.op(f"{name}/rows", "Transpose", [heads], perm=[0, 2, 1, 3])
        return self.join_heads(f"{name}/o", "q", rows, attention.num_heads), present

    def _by_head(self, layer: int, kind: str, x_BTD: ir.Value, num_heads: int) -> ir.Value:
        """Queries, keys or values [B, heads, T, H]; the first two normalised where Qwen3 does, and rotated."""
        graph, name = self.graph, f"layers.{layer}/attention/{kind}"
        x = self.split_heads(name, "q" if kind == "q" else "k", self.projected(layer, kind, x_BTD), num_heads)
        if kind != "v" and self.config.attention.qk_norm:
            x = self._norm(f"{name}_norm", x, f"model.layers.{layer}.self_attn.{kind}_norm.weight")
        x = graph.op(f"{name}_by_head", "Transpose", [x], perm=[0, 2, 1, 3])
        return x if kind == "v" else self._rotate(f"{name}_rotated", x, num_heads=num_heads)
