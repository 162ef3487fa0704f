"""Which matrices of mixed bits become int8: those whose products int4 hurts most for the bytes that int8 costs them.

    W windows of text, T tokens, K inputs of a matrix

A matrix's loss is what rounding it leaves of its products on the calibration text, tr(E H E^T) with E the error of its
values and H the sum of x x^T over what it reads, as a share of the products themselves, tr(W H W^T). Matrices are
promoted in the order of loss saved per byte added, until the next does not fit into the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.tensors import EMBEDDING, FINAL_NORM, HEAD
from ..progress import SILENT, Progress
from .layerwise import LayerReader, parameter_path, second_moment, single_thread
from .quantize import dequantize_blocks, quantize_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ..model.config import HavocConfig
    from ..model.structure import BlockFormat, Structure
    from .layout import Layout


def choose_promoted(
    losses: Mapping[str, tuple[float, float]], shapes: Mapping[str, tuple[int, int]], structure: Structure
) -> tuple[str, ...]:
    """Names of the matrices that become int8, in file order; `losses` in int4 and in int8 by name.

    Deterministic: equal gains go by name. A matrix that does not fit is passed over for a smaller one.
    """
    plain, promoted = structure.blocks, structure.promoted_blocks
    extra_bytes = {name: promoted.matrix_bytes(*shape) - plain.matrix_bytes(*shape) for name, shape in shapes.items()}
    num_weights = sum(rows * columns for rows, columns in shapes.values())
    left_bytes = int((structure.average_bits or 0) / 8 * num_weights) - sum(
        plain.matrix_bytes(*s) for s in shapes.values()
    )
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
) -> dict[str, tuple[float, float]]:
    """Loss in int4 and in int8 of every matrix in blocks, by name, from one pass of the exact weights."""
    formats = structure.blocks, structure.promoted_blocks
    found: dict[str, tuple[float, float]] = {}
    with (
        progress.stage("find the sensitive matrices", config.num_layers, unit="layers") as stage,
        single_thread(),
        torch.inference_mode(),
    ):
        for name, tensor, moment_KK in _matrices(tensors, config, windows_WT):
            if layout[name].blocks is not None:
                found[name] = tuple(_loss(tensor, moment_KK, blocks) for blocks in formats)  # type: ignore[assignment]
            if name.endswith("mlp.down_proj.weight"):
                stage.advance()
    return {name: found[name] for name in (weight.source for weight in layout.weights) if name in found}


def _matrices(
    tensors: Mapping[str, Tensor], config: HavocConfig, windows_WT: NDArray[np.int64]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every matrix with the second moment of what it reads; a table that is only looked up reads one-hot rows."""
    table_VD = tensors[EMBEDDING]
    reader = LayerReader(config, windows_WT.shape[1])
    x_WTD = F.embedding(torch.from_numpy(windows_WT), table_VD.to(torch.float32))
    if not config.tie_word_embeddings:
        yield EMBEDDING, table_VD, torch.eye(config.d_model, dtype=torch.float64)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        weights = {name: tensors[name].to(torch.float32) for name in tensors if name.startswith(prefix)}
        block = reader.block(weights)
        moments = reader.moments(block, x_WTD)
        for name, tensor in weights.items():
            if (path := parameter_path(name)) in moments:
                yield name, tensor, moments[path]
        x_WTD = reader.read(block, x_WTD)
    norm = tensors[FINAL_NORM].to(torch.float32)
    moment_DD = second_moment(F.rms_norm(x_WTD, (config.d_model,), norm, config.norm_eps))
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    yield head, tensors[head], moment_DD


def _loss(tensor: Tensor, moment_KK: Tensor, blocks: BlockFormat) -> float:
    """tr(E H E^T) / tr(W H W^T) of a matrix rounded to nearest into blocks with zeros in the middle."""
    rounded = quantize_blocks(tensor, type(blocks)(blocks.num_bits, blocks.block_size))
    restored = dequantize_blocks(rounded, num_bits=blocks.num_bits, num_columns=tensor.shape[1])
    moment = moment_KK.to(torch.float32)
    lost = total = 0.0
    for exact_NK, stored_NK in zip(tensor.split(4096), torch.from_numpy(restored).split(4096), strict=True):
        error_NK = stored_NK - exact_NK
        lost += float((error_NK @ moment * error_NK).sum(dtype=torch.float64))
        total += float((exact_NK.float() @ moment * exact_NK).sum(dtype=torch.float64))
    return lost / total if total > 0 else 0.0
