"""Quantize a decoder layer by layer on a calibration text; each layer reads the output of the quantized ones before it.

Only one layer's weights and second moments are in memory at a time.

    W windows of text, T tokens, D model, K inputs of a matrix

A tied table is stored before the text has passed through any layer, so as a head it reads the exact layers' output.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.blocks import RotaryEmbedding
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD, module_name
from .encode import require_usable
from .gptq import compensate
from .quantize import Blocks, dequantize_blocks, quantize_blocks
from .reference import build_block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..model.blocks import TransformerBlock
    from ..model.config import HavocConfig
    from ..model.structure import BlockFormat
    from .layout import Layout, StoredWeight

_WINDOWS_AT_ONCE = 4
_LOOKED_UP = 1.0
"""The share of its mean that is added to the diagonal of a tied table's moment, because its rows are also looked up.

Measured on SmolLM2-135M, the table alone in int4 with scales in fp16: KL divergence 0.068 nats rounded to nearest,
0.086 fitted by least squares, 0.024 as a head, of which the lookup is 0.008.
"""
_READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.w1", "mlp.w2"),
    "mlp.w3": ("mlp.w3",),
}
"""The matrices of a layer by the first one that reads the same input."""


class CalibratedBlocks:
    """The blocks of every matrix of a layout, in file order."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: HavocConfig,
        layout: Layout,
        windows_WT: NDArray[np.int64],
        *,
        on_layer: Callable[[], object] = lambda: None,
    ) -> None:
        """`tensors` by Hugging Face name, one layer at a time; `on_layer` is called after every layer."""
        self._tensors, self._config, self._layout = tensors, config, layout
        self._ids = torch.from_numpy(windows_WT)
        self._reader = LayerReader(config, windows_WT.shape[1])
        self._x_WTD = torch.empty(0)
        self._ready: dict[str, Blocks] = {}
        self._layer = 0
        self._on_layer = on_layer

    def __call__(self, weight: StoredWeight, blocks: BlockFormat) -> Blocks:
        """Quantize one matrix into `blocks`, the layout's of it; those of its layer are ready with it."""
        with single_thread(), torch.inference_mode():
            if weight.source == EMBEDDING:
                return self._table(weight, blocks)
            if weight.source == HEAD:
                return self._head(weight, blocks)
            if weight.source not in self._ready:
                self._next_layer()
        return self._ready.pop(weight.source)

    def _table(self, weight: StoredWeight, blocks: BlockFormat) -> Blocks:
        table_VD = self._tensors[EMBEDDING]
        num_columns = table_VD.shape[1]
        moment_DD = torch.eye(num_columns, dtype=torch.float64)
        if self._config.tie_word_embeddings:
            head_DD = head_moment(self._tensors, self._config, self._ids)
            moment_DD = head_DD + _LOOKED_UP * head_DD.diagonal().mean() * moment_DD
        stored = _quantized(weight, blocks, table_VD, moment_DD)
        self._x_WTD = F.embedding(self._ids, _restored(blocks, stored, num_columns))
        return stored

    def _next_layer(self) -> None:
        weights = layer_weights(self._tensors, self._layer)
        block = self._reader.block(weights)
        moments = self._reader.moments(block, self._x_WTD)
        for name, tensor in weights.items():
            weight = self._layout[name]
            if weight.blocks is not None:
                self._ready[name] = _quantized(weight, weight.blocks, tensor, moments[parameter_path(name)])
                weights[name] = _restored(weight.blocks, self._ready[name], tensor.shape[1])
        self._x_WTD = self._reader.read(self._reader.block(weights), self._x_WTD)
        self._layer += 1
        self._on_layer()

    def _head(self, weight: StoredWeight, blocks: BlockFormat) -> Blocks:
        norm = self._tensors[FINAL_NORM].to(torch.float32)
        x_WTD = F.rms_norm(self._x_WTD, (self._config.d_model,), norm, self._config.norm_eps)
        return _quantized(weight, blocks, self._tensors[HEAD], second_moment(x_WTD))


def layer_weights(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """One layer's tensors in fp32, by Hugging Face name."""
    prefix = f"model.layers.{layer}."
    return {name: tensors[name].to(torch.float32) for name in tensors if name.startswith(prefix)}


def head_moment(tensors: Mapping[str, Tensor], config: HavocConfig, ids_WT: Tensor) -> Tensor:
    """Sum of x x^T, fp64 [D, D], over the head's inputs x in a pass of these tensors."""
    reader = LayerReader(config, ids_WT.shape[1])
    x_WTD = F.embedding(ids_WT, tensors[EMBEDDING].to(torch.float32))
    for layer in range(config.num_layers):
        x_WTD = reader.read(reader.block(layer_weights(tensors, layer)), x_WTD)
    return second_moment(F.rms_norm(x_WTD, (config.d_model,), tensors[FINAL_NORM].to(torch.float32), config.norm_eps))


class LayerReader:
    """One layer's pass over the windows, and the second moments of what its matrices read."""

    def __init__(self, config: HavocConfig, num_tokens: int) -> None:
        self._config = config
        self._rotary = RotaryEmbedding(config.attention, config.max_seq_len)(torch.arange(num_tokens)[None])

    def block(self, weights: Mapping[str, Tensor]) -> TransformerBlock:
        """The layer that these tensors, by Hugging Face name, make."""
        return build_block(
            self._config, {parameter_path(name): tensor for name, tensor in weights.items()}, torch.float32
        )

    def read(self, block: TransformerBlock, x_WTD: Tensor) -> Tensor:
        """The residual stream [W, T, D] after the layer."""
        return torch.cat([block(part, self._rotary)[0] for part in x_WTD.split(_WINDOWS_AT_ONCE)])

    def moments(self, block: TransformerBlock, x_WTD: Tensor) -> dict[str, Tensor]:
        """Sum of x x^T, fp64 [K, K], over the inputs x of each matrix, by the path of its parameter in the layer."""
        found: dict[str, Tensor] = {}
        hooks = [block.get_submodule(path).register_forward_pre_hook(_adding(found, path)) for path in _READERS]
        try:
            self.read(block, x_WTD)
        finally:
            for hook in hooks:
                hook.remove()
        return {f"{path}.weight": found[first] for first, paths in _READERS.items() for path in paths}

    def back(
        self,
        block: TransformerBlock,
        x_WTD: Tensor,
        gradient_WTD: Tensor,
        errors: Mapping[str, Sequence[Tensor]],
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """The gradient at the layer's input, from that at its output; and half the mean of (g . E x)^2.

        The latter is for each error E of the matrices that `errors` names by the path of their parameter.
        """
        before, losses = [], {path: [0.0 for _ in matrices] for path, matrices in errors.items()}
        for x_part, gradient_part in zip(
            x_WTD.split(_WINDOWS_AT_ONCE), gradient_WTD.split(_WINDOWS_AT_ONCE), strict=True
        ):
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            hooks = [
                block.get_submodule(path.removesuffix(".weight")).register_forward_hook(_keeping(seen, path))
                for path in errors
            ]
            try:
                read = x_part.detach().requires_grad_()
                given, _ = block.requires_grad_(requires_grad=False)(read, self._rotary)
            finally:
                for hook in hooks:
                    hook.remove()
            outputs = [seen[path][1] for path in errors]
            first, *others = torch.autograd.grad(given, [read, *outputs], gradient_part)
            before.append(first)
            for path, output_gradient in zip(errors, others, strict=True):
                for index, error in enumerate(errors[path]):
                    moved = ((seen[path][0].detach() @ error.t()) * output_gradient).sum(-1)
                    losses[path][index] += float(moved.square().sum()) / 2 / x_WTD.shape[:2].numel()
        return torch.cat(before), losses


def _keeping(seen: dict[str, tuple[Tensor, Tensor]], path: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    def keep(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401 - torch's own signature
        seen[path] = inputs[0], output

    return keep


def _adding(found: dict[str, Tensor], path: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def add(_module: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ANN401 - torch's own signature
        moment_KK = second_moment(inputs[0])
        found[path] = found[path] + moment_KK if path in found else moment_KK

    return add


def second_moment(x: Tensor) -> Tensor:
    """Sum of x x^T over all leading positions of x [..., K], fp64 [K, K]."""
    x_PK = x.flatten(0, -2)
    return (x_PK.t() @ x_PK).to(torch.float64)


def parameter_path(name: str) -> str:
    """The path of a layer's tensor inside its `TransformerBlock`."""
    return module_name(name).split(".", 2)[2]


def _quantized(weight: StoredWeight, blocks: BlockFormat, tensor: Tensor, moment_KK: Tensor) -> Blocks:
    """int4 with compensation; int8 needs none and is rounded."""
    require_usable(weight, tensor)
    if blocks.num_bits == 8:  # noqa: PLR2004 - bits
        return quantize_blocks(tensor, blocks)
    return compensate(tensor, moment_KK, blocks)


def _restored(blocks: BlockFormat, stored: Blocks, num_columns: int) -> Tensor:
    return torch.from_numpy(dequantize_blocks(stored, num_bits=blocks.num_bits, num_columns=num_columns))


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Keep torch's sums in one order, so that the same weights give the same bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
