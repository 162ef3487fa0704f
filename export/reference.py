"""A decoder's forward pass in torch over tensors that are read one layer at a time: exact, in fp32, or as rounded.

    B batch, T tokens, D model, V vocab, R image patches

Several arithmetics go through the layers side by side, so that a tensor is read, and dequantized, once for all of them,
and a model of any size needs room for one layer.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..model.blocks import RotaryEmbedding, TransformerBlock
from ..model.rope import rope_frequencies
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD, VISION_PROJECTION, module_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..model.config import HavocConfig

_INT8_STEPS = 127
_HEAD_ROWS = 8192  # of the head, converted at a time


@dataclass(frozen=True)
class Arithmetic:
    """An arithmetic: torch's dtype, and the additional rounding of results."""

    name: str
    dtype: torch.dtype
    rounding: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)


EXACT = Arithmetic("float64", torch.float64)
FP32 = Arithmetic("torch fp32", torch.float32)


def fp16_activations() -> Arithmetic:
    """Every result of every operation rounded to fp16, sums inside an operation kept in fp32, as kernels do."""
    return Arithmetic("torch fp32 rounded to fp16", torch.float32, _HalfResults)


def int8_products(block_size: int | None) -> Arithmetic:
    """What goes into a product with a matrix rounded to int8, each block of a row, or each row, by its largest value.

    So does MatMulNBits of ONNX Runtime at accuracy level 4: scale = max |x| / 127, in blocks of the weight's size. W8A8
    takes whole rows.
    """
    return Arithmetic("torch fp32 over int8 activations", torch.float32, lambda: _Int8Factors(block_size))


class _HalfResults(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and function is not Tensor.to:
            return result.to(torch.float16).to(torch.float32)
        return result


class _Int8Factors(TorchFunctionMode):
    def __init__(self, block_size: int | None) -> None:
        super().__init__()
        self._block_size = block_size

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if function is F.linear or function is torch.ops.mkldnn._linear_pointwise:  # noqa: SLF001 - model.linear's
            args = (_rounded_to_int8(args[0], self._block_size), *args[1:])
        return function(*args, **(kwargs or {}))


def _rounded_to_int8(x: Tensor, block_size: int | None) -> Tensor:
    num_columns = x.shape[-1]
    block_size = block_size or num_columns
    blocks = F.pad(x, (0, -num_columns % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / _INT8_STEPS
    steps = (blocks / scale.clamp(min=torch.finfo(x.dtype).tiny)).round()
    rounded: Tensor = (steps * scale).flatten(-2)[..., :num_columns]
    return rounded


@dataclass(frozen=True)
class Batch:
    """Left-padded ids and mask [B, T], and the patches [R, patch_dim] of all images in row order."""

    ids: Tensor
    mask: Tensor
    patches: Tensor | None = None


class StreamedModel:
    """The forward pass of a decoder; its `tensors` (by Hugging Face name) are read when they are needed."""

    def __init__(
        self, config: HavocConfig, tensors: Mapping[str, Tensor], *, on_layer: Callable[[], object] = lambda: None
    ) -> None:
        """Each tensor is read once per pass, a tied table twice; `on_layer` is called after every layer."""
        self._config, self._tensors, self._on_layer = config, tensors, on_layer

    @torch.inference_mode()
    def hidden(self, batch: Batch, arithmetics: Sequence[Arithmetic]) -> list[Tensor]:
        """The head's input, [B, T, D] in each arithmetic's dtype: normalised activations of every position."""
        config = self._config
        positions_BT = (batch.mask.cumsum(1) - 1).clamp(min=0)
        itself_TT = torch.eye(batch.ids.shape[1], dtype=torch.bool)
        visible_BTT = torch.ones_like(itself_TT).tril() & (batch.mask[:, None, :].bool() | itself_TT)
        table = self._tensors[EMBEDDING]
        projection = None if batch.patches is None else self._tensors[VISION_PROJECTION]
        states = [_embedded(config, batch, table, projection, arithmetic) for arithmetic in arithmetics]
        del table
        masks = [_additive(visible_BTT, arithmetic.dtype) for arithmetic in arithmetics]
        tables = [_rotary(config, positions_BT, arithmetic) for arithmetic in arithmetics]
        for layer in range(config.num_layers):
            weights = self._weights(layer)
            for index, arithmetic in enumerate(arithmetics):
                block = build_block(config, weights, arithmetic.dtype)
                with arithmetic.rounding():
                    states[index], _ = block(states[index], tables[index], masks[index])
            self._on_layer()
        norm = self._tensors[FINAL_NORM]
        for index, arithmetic in enumerate(arithmetics):
            with arithmetic.rounding():
                scale = norm.to(arithmetic.dtype)
                states[index] = F.rms_norm(states[index], (config.d_model,), scale, config.norm_eps)
        return states

    def head(self) -> Tensor:
        """The matrix [V, D] that gives logits."""
        return self._tensors[EMBEDDING if self._config.tie_word_embeddings else HEAD]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, patches: Tensor | None = None
    ) -> Tensor:
        """Logits fp32 [B, T, V] of whole sequences."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        (hidden_BTD,) = self.hidden(Batch(input_ids, mask_BT, patches), [FP32])
        return logits_of(hidden_BTD, self.head(), FP32)

    def _weights(self, layer: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer}."
        names = [name for name in self._tensors if name.startswith(prefix)]
        return {module_name(name).removeprefix(f"layers.{layer}."): self._tensors[name] for name in names}


@torch.inference_mode()
def logits_of(hidden_ND: Tensor, head_VD: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Logits [N, V] in the arithmetic's dtype, of what `StreamedModel.hidden` gave."""
    with arithmetic.rounding():
        parts = [F.linear(hidden_ND, part.to(arithmetic.dtype)) for part in head_VD.split(_HEAD_ROWS)]
    return torch.cat(parts, dim=-1)


def _embedded(
    config: HavocConfig, batch: Batch, table: Tensor, projection: Tensor | None, arithmetic: Arithmetic
) -> Tensor:
    x_BTD = F.embedding(batch.ids, table).to(arithmetic.dtype)
    if batch.patches is None or projection is None or config.vision is None:
        return x_BTD
    is_image = batch.ids == config.vision.image_token_id
    with arithmetic.rounding():
        features = F.linear(batch.patches.to(arithmetic.dtype), projection.to(arithmetic.dtype))
    return x_BTD.masked_scatter(is_image.unsqueeze(-1), features)


def _additive(visible_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible_BTT.shape, dtype=dtype).masked_fill_(~visible_BTT, float("-inf")).unsqueeze(1)


def _rotary(config: HavocConfig, positions_BT: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position; in float64 they are not rounded, else as the model has them."""
    if arithmetic.dtype != torch.float64:
        with arithmetic.rounding():
            cos, sin = RotaryEmbedding(config.attention, config.max_seq_len)(positions_BT)
            return cos * 1, sin * 1
    angles_BTF = positions_BT[..., None] * torch.from_numpy(rope_frequencies(config.attention))
    cos, sin = angles_BTF.cos(), angles_BTF.sin()
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def build_block(config: HavocConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> TransformerBlock:
    """One layer of these tensors by the path of their parameters."""
    with torch.device("meta"):
        block = TransformerBlock(config)
    block.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return block.eval()
