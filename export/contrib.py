"""The `contrib` dialect: ONNX Runtime's GroupQueryAttention and skip normalisation (opset 22, IR 10).

    B batch, T new tokens, P past tokens, S = P + T, C length of a static cache, D model, H head dim

GroupQueryAttention itself rotates queries and keys, by their position in the row, and appends them to the cache. It
supports padding only at the end of a row (`seqlens_k` counts the row's real tokens); this holds for all fast kernels.
So every row of new tokens is rotated left until its padding moves from the front to the end. The keys of a row then
have its own positions without a gap, and a past token is never padding. Only the first tokens of a row may be padding:
a later chunk of several tokens must have real tokens only, and one row, as the kernel requires.
"""

from __future__ import annotations

import onnx_ir as ir

from ..model.tensors import FINAL_NORM
from .decoder import DecoderGraph
from .layout import ROPE_COS, ROPE_SIN
from .tape import CONTRIB


class ContribDecoder(DecoderGraph):
    """Both caches: where past and present are one buffer of C tokens, GroupQueryAttention appends in place."""

    def build(self, x_BTD: ir.Value) -> ir.Model:
        """See `DecoderGraph.build`."""
        graph = self.graph
        mask_BS = graph.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self._count(x_BTD, mask_BS)
        x_BTD = self._turned("turned", x_BTD, self.num_pads_B1)
        presents: list[ir.Value] = []
        normed = self._norm("layers.0/input_norm", x_BTD, "model.layers.0.input_layernorm.weight")
        for layer in range(self.config.num_layers):
            x_BTD, normed, present = self._block(layer, x_BTD, normed)
            presents += present
        return graph.finish("havoc", [self.head(self._answered(normed)), *presents])

    def _count(self, x_BTD: ir.Value, mask_BS: ir.Value) -> None:
        """Numbers of new tokens, of real and of padding ones, [B, 1], and of all real ones minus one, int32 [B].

        ONNX Runtime computes lengths from shapes on the CPU. They are used only where a kernel on a CUDA card also
        reads them on the CPU, so that nothing is copied to the card and a step can be captured in a CUDA graph.
        """
        graph = self.graph
        one, columns = graph.constant("scalar_one", 1), graph.constant("axis_1", [1])
        num_new_1 = graph.op("num_new_1", "Shape", [x_BTD], start=1, end=2)
        width_1 = graph.op("width_1", "Shape", [mask_BS], start=1, end=2)
        self.num_new = graph.op("num_new", "Squeeze", [num_new_1])
        width = graph.op("width", "Squeeze", [width_1])
        self.num_total = graph.op("num_total", "Cast", [width], to=int(ir.DataType.INT32))
        num_past_1 = graph.op("num_past_1", "Sub", [width_1, num_new_1])
        new_BT = graph.op("new_mask", "Slice", [mask_BS, num_past_1, width_1, columns])
        self.num_real_B1 = graph.op("num_real", "ReduceSum", [new_BT, columns], keepdims=1)
        pads_BT = graph.op("new_pads", "Sub", [one, new_BT])
        self.num_pads_B1 = graph.op("num_pads", "ReduceSum", [pads_BT, columns], keepdims=1)
        self.num_new_B1 = graph.op("num_new_rows", "Add", [self.num_real_B1, self.num_pads_B1])
        num_seen_B = graph.op("num_seen", "ReduceSum", [mask_BS, columns], keepdims=0)
        newest_B = graph.op("newest", "Sub", [graph.op("num_seen_or_1", "Max", [num_seen_B, one]), one])
        self.seqlens_k = graph.op("seqlens_k", "Cast", [newest_B], to=int(ir.DataType.INT32))

    def _turned(self, name: str, x_BTD: ir.Value, num_places: ir.Value) -> ir.Value:
        """Every row rotated left by its number of places, int64 [B, 1]."""
        graph = self.graph
        if "new_index" not in self.__dict__:
            zero, one = graph.constant("scalar_zero", 0), graph.constant("scalar_one", 1)
            self.new_index = graph.op("new_index", "Range", [zero, self.num_new, one])
        source_BT = graph.op(f"{name}/shifted", "Add", [self.new_index, num_places])
        source_BT = graph.op(f"{name}/index", "Mod", [source_BT, self.num_new_B1])
        return self._gathered(name, x_BTD, source_BT)

    def _gathered(self, name: str, x_BTD: ir.Value, index_BN: ir.Value) -> ir.Value:
        """The tokens of each row at `index`, [B, N, D]."""
        graph = self.graph
        index_BN1 = graph.op(f"{name}/places", "Unsqueeze", [index_BN, graph.constant("axis_after", [-1])])
        return graph.op(name, "GatherND", [x_BTD, index_BN1], batch_dims=1)

    def _answered(self, normed: ir.Value) -> ir.Value:
        """The positions that logits are computed of: the last real one of each row, or all in the order of the ids."""
        graph, one = self.graph, self.graph.constant("scalar_one", 1)
        if self.options.logits == "all":
            return self._turned("turned_back", normed, self.num_real_B1)
        newest_B1 = graph.op("last/index", "Sub", [graph.op("last/count", "Max", [self.num_real_B1, one]), one])
        return self._gathered("last_position", normed, newest_B1)

    def _norm(self, name: str, x: ir.Value, source: str) -> ir.Value:
        scale = self.graph.part(source)
        return self.graph.op(
            name, "SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=self.config.norm_eps, stash_type=1
        )

    def _skip_norm(self, name: str, x: ir.Value, added: ir.Value, source: str) -> tuple[ir.Value, ir.Value]:
        """`x + added`, and that normalised."""
        normed, _, _, total = self.graph.ops(
            name,
            "SkipSimplifiedLayerNormalization",
            [x, added, self.graph.part(source)],
            [name, "", "", f"{name}/sum"],
            domain=CONTRIB,
            epsilon=self.config.norm_eps,
        )
        return total, normed

    def _block(self, layer: int, x_BTD: ir.Value, normed: ir.Value) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """The residual stream after the block, the same normalised for what follows, and its keys and values."""
        graph, name, source = self.graph, f"layers.{layer}", f"model.layers.{layer}."
        heads, present = self._attention(layer, normed)
        attended = graph.linear(f"{name}/attention/o", heads, source + "self_attn.o_proj.weight")
        after = source + "post_attention_layernorm.weight"
        x_BTD, normed = self._skip_norm(f"{name}/post_attention_norm", x_BTD, attended, after)
        is_last = layer == self.config.num_layers - 1
        name = "final_norm" if is_last else f"layers.{layer + 1}/input_norm"
        following = FINAL_NORM if is_last else f"model.layers.{layer + 1}.input_layernorm.weight"
        x_BTD, normed = self._skip_norm(name, x_BTD, self.mlp(layer, normed), following)
        return x_BTD, normed, self.presents(present)

    def _attention(self, layer: int, x_BTD: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The output of the heads, [B, T, heads * H], and the keys and values of all tokens."""
        attention, name = self.config.attention, f"layers.{layer}/attention"
        q = self._normalised(layer, "q", x_BTD, attention.num_heads)
        k = self._normalised(layer, "k", x_BTD, attention.num_kv_heads)
        v = self.projected(layer, "v", x_BTD)
        tables = [self.graph.part(ROPE_COS), self.graph.part(ROPE_SIN)]
        heads, *present = self.graph.ops(
            f"{name}/GroupQueryAttention",
            "GroupQueryAttention",
            [q, k, v, *self.past(layer), self.seqlens_k, self.num_total, *tables],
            [f"{name}/heads", f"present.{layer}.key", f"present.{layer}.value"],
            domain=CONTRIB,
            num_heads=attention.num_heads,
            kv_num_heads=attention.num_kv_heads,
            do_rotary=1,
        )
        return heads, present

    def _normalised(self, layer: int, kind: str, x_BTD: ir.Value, num_heads: int) -> ir.Value:
        """Queries or keys [B, T, heads * H], normalised per head where Qwen3 does."""
        x, name = self.projected(layer, kind, x_BTD), f"layers.{layer}/attention/{kind}"
        if not self.config.attention.qk_norm:
            return x
        x = self.split_heads(name, kind, x, num_heads)
        x = self._norm(f"{name}_norm", x, f"model.layers.{layer}.self_attn.{kind}_norm.weight")
        return self.join_heads(name, kind, x, num_heads)
