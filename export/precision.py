"""Choose the matrices of mixed bits that become int8: those for which int4 costs most nats per byte that int8 adds.

    W windows of text, T tokens, D model, V vocab, P positions W T

Rounding moves a matrix by E. To second order that changes the distribution of the next token by a KL divergence of
half the mean of (g . E x)^2 over positions, with x the matrix's input there and g the gradient of ln p(y) at its output
for a y drawn from the model's own distribution: the Fisher information along E (Martens 2020, arXiv:1412.1193). Every
matrix is measured alone, rounded to nearest. The forward pass keeps the input of each layer, and the backward pass
opens one layer at a time, so memory holds the activations of the text and one layer. Matrices are promoted in the order
of divergence saved per byte added.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.structure import BlockFormat
from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD
from ..progress import SILENT, Progress
from .layerwise import LayerReader, layer_weights, parameter_path, single_thread
from .quantize import dequantize_blocks, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .layout import Layout

Losses = dict[str, tuple[float, float]]
"""Nats that a matrix costs in int4 and in int8, by name."""

_SEED = 0
_POSITIONS_AT_ONCE = 128  # whose logits are in memory at a time


def choose_promoted(
    losses: Mapping[str, tuple[float, float]], shapes: Mapping[str, tuple[int, int]], structure: Structure
) -> tuple[str, ...]:
    """Names of the matrices that become int8, in the order of `shapes`; `losses` in int4 and in int8 by name.

    Equal gains go by name. A matrix that does not fit into the budget any more is passed over for a smaller one.
    """
    plain, promoted = structure.blocks, structure.promoted_blocks
    extra_bytes = {name: promoted.matrix_bytes(*shape) - plain.matrix_bytes(*shape) for name, shape in shapes.items()}
    num_weights = sum(rows * columns for rows, columns in shapes.values())
    left_bytes = int((structure.average_bits or 0) / 8 * num_weights)
    left_bytes -= sum(plain.matrix_bytes(*shape) for shape in shapes.values())
    gains = {name: (losses[name][0] - losses[name][1]) / extra_bytes[name] for name in shapes}
    chosen = set()
    for name in sorted(shapes, key=lambda name: (-gains[name], name)):
        if gains[name] > 0 and extra_bytes[name] <= left_bytes:
            chosen.add(name)
            left_bytes -= extra_bytes[name]
    return tuple(name for name in shapes if name in chosen)


def measure_losses(
    tensors: Mapping[str, Tensor],
    config: HavocConfig,
    layout: Layout,
    structure: Structure,
    windows_WT: NDArray[np.int64],
    *,
    progress: Progress = SILENT,
) -> Losses:
    """What int4 and int8 cost every matrix in blocks, from one pass of the exact weights forward and one back."""
    formats = structure.blocks, structure.promoted_blocks
    in_blocks = {weight.source for weight in layout.weights if weight.blocks is not None}
    ids_WT = torch.from_numpy(windows_WT)
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with (
        progress.stage("find the sensitive matrices", 2 * config.num_layers, unit="layers") as stage,
        single_thread(),
    ):
        reader = LayerReader(config, windows_WT.shape[1])
        states = [F.embedding(ids_WT, tensors[EMBEDDING].to(torch.float32))]
        for layer in range(config.num_layers):
            with torch.inference_mode():
                x_WTD = reader.read(reader.block(layer_weights(tensors, layer)), states[-1])
            states.append(x_WTD.clone())
            stage.advance()
        head = EMBEDDING if config.tie_word_embeddings else HEAD
        gradient_WTD, losses = _through_head(tensors[head], tensors[FINAL_NORM], states.pop(), config, formats)
        _add(found, head, losses)
        for layer in reversed(range(config.num_layers)):
            weights = layer_weights(tensors, layer)
            errors = {parameter_path(name): _errors(weights[name], formats) for name in weights if name in in_blocks}
            block = reader.block(weights)
            gradient_WTD, by_path = reader.back(block, states.pop(), gradient_WTD, errors)
            for name in weights:
                if (path := parameter_path(name)) in by_path:
                    _add(found, name, by_path[path])
            stage.advance()
        rows = [F.embedding(ids_WT, error_VD) for error_VD in _errors(tensors[EMBEDDING], formats)]
        _add(found, EMBEDDING, [float((row_WTD * gradient_WTD).sum(-1).square().mean()) / 2 for row_WTD in rows])
    return {name: (found[name][0], found[name][1]) for name in found if name in in_blocks}


def _add(found: defaultdict[str, list[float]], name: str, losses: list[float]) -> None:
    found[name] = [before + loss for before, loss in zip(found[name], losses, strict=True)]


def _errors(weight: Tensor, formats: tuple[BlockFormat, ...]) -> list[Tensor]:
    """What rounding to nearest, with zeros in the middle, adds to a matrix in each format."""
    return [_rounded(weight, blocks) - weight for blocks in formats]


def _rounded(weight: Tensor, blocks: BlockFormat) -> Tensor:
    stored = quantize_blocks(weight, BlockFormat(blocks.num_bits, blocks.block_size))
    return torch.from_numpy(dequantize_blocks(stored, num_bits=blocks.num_bits, num_columns=weight.shape[1]))


def _through_head(
    head_VD: Tensor, norm_D: Tensor, x_WTD: Tensor, config: HavocConfig, formats: tuple[BlockFormat, ...]
) -> tuple[Tensor, list[float]]:
    """The gradient of ln p(y) at the last layer's output, and the cost of each format of the head.

    For the head itself the mean over y is exact: half the variance of the logits' change under p.
    """
    generator = torch.Generator().manual_seed(_SEED)
    exact_VD = head_VD.to(torch.float32)
    errors, losses = _errors(exact_VD, formats), [0.0 for _ in formats]
    x_WTD = x_WTD.requires_grad_()
    hidden_WTD = F.rms_norm(x_WTD, (config.d_model,), norm_D.to(torch.float32), config.norm_eps)
    hidden_PD = hidden_WTD.detach().flatten(0, 1)
    gradients = []
    for part_PD in hidden_PD.split(_POSITIONS_AT_ONCE):
        p_PV = (part_PD @ exact_VD.t()).softmax(-1)
        drawn_P1 = torch.multinomial(p_PV, 1, generator=generator)
        gradients.append(exact_VD[drawn_P1[:, 0]] - p_PV @ exact_VD)
        for index, error_VD in enumerate(errors):
            moved_PV = part_PD @ error_VD.t()
            mean_P1 = (p_PV * moved_PV).sum(-1, keepdim=True)
            losses[index] += float((p_PV * (moved_PV - mean_P1).square()).sum()) / 2 / len(hidden_PD)
    gradient_WTD = torch.cat(gradients).unflatten(0, x_WTD.shape[:2])
    (gradient_WTD,) = torch.autograd.grad(hidden_WTD, x_WTD, gradient_WTD)
    return gradient_WTD, losses
