"""The costs of a decoder by arithmetic: parameters, bytes, floating-point operations. No torch, no measurement.

These are lower bounds for a roofline, not predictions: a multiplication and an addition are two operations; norms,
softmax, SiLU and rotation are left out (below one percent); attention counts only the keys that a causal query may see.
Units are in the names. Legend: D model, T new tokens, P past tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .structure import BITS_PER_WEIGHT, Structure
from .tensors import EMBEDDING, HEAD, VISION_PROJECTION, tensor_shapes

if TYPE_CHECKING:
    from .config import HavocConfig

FULL = Structure("fp32", "fp32")


def num_parameters(config: HavocConfig) -> int:
    """Numbers in the model, a tied table counted once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def num_layer_matmul_parameters(config: HavocConfig, structure: Structure = FULL) -> int:
    """Weights that every token is multiplied with: the projections of all layers, without tables, head and vision.

    A projection of truncated rank r counts as its two factors, r (M + N).
    """
    apart = {EMBEDDING, HEAD, VISION_PROJECTION}
    matrices = ((name, shape) for name, shape in tensor_shapes(config).items() if len(shape) > 1 and name not in apart)
    kept = ((shape, structure.kept_rank(name, shape)) for name, shape in matrices)
    return sum(math.prod(shape) if rank is None else rank * sum(shape) for shape, rank in kept)


def weight_bytes(config: HavocConfig, structure: Structure = FULL) -> int:
    """Bytes of all weights as an artifact stores them, block scales included, padding between tensors not.

    Of mixed bits the whole budget is counted: which matrices take it is known only after a calibration.
    """
    stored = sum(tensor_bytes(name, shape, structure) for name, shape in tensor_shapes(config).items())
    if structure.average_bits is None:
        return stored
    extra = (structure.average_bits - structure.blocks.bits_per_weight) / 8
    return stored + int(extra * num_block_weights(config))


def num_block_weights(config: HavocConfig) -> int:
    """Weights of the matrices that integer formats store in blocks: all but a vision projection; a tied table once."""
    shapes = tensor_shapes(config).items()
    return sum(math.prod(shape) for name, shape in shapes if len(shape) > 1 and name != VISION_PROJECTION)


def tensor_bytes(name: str, shape: tuple[int, ...], structure: Structure) -> int:
    """Bytes of one weight: norms and biases in the activation's type, matrices in the weight format.

    Integer matrices are cut, row by row, into blocks of `block_size` values (the last one padded) with one scale each,
    and a zero point if they are not symmetric; the vision projection is never quantized. A projection of truncated rank
    is two matrices.
    """
    if len(shape) == 1 or (structure.is_quantized and name == VISION_PROJECTION):
        return math.prod(shape) * structure.activation_bytes
    num_rows, num_columns = shape
    rank = structure.kept_rank(name, (num_rows, num_columns))
    if rank is None:
        return _matrix_bytes(name, num_rows, num_columns, structure)
    return _matrix_bytes(name, rank, num_columns, structure) + _matrix_bytes(name, num_rows, rank, structure)


def _matrix_bytes(name: str, num_rows: int, num_columns: int, structure: Structure) -> int:
    if structure.is_quantized:
        return structure.blocks_of(name, num_columns).matrix_bytes(num_rows, num_columns)
    return num_rows * num_columns * BITS_PER_WEIGHT[structure.weight_format] // 8


def kv_bytes_per_token(config: HavocConfig, structure: Structure = FULL) -> int:
    """Bytes the cache grows by with each token: a key and a value per layer and kv head, in the activation's type."""
    attention = config.attention
    return 2 * config.num_layers * attention.num_kv_heads * attention.head_dim * structure.activation_bytes


def prefill_flops(
    config: HavocConfig,
    num_tokens: int,
    structure: Structure = FULL,
    *,
    num_past: int = 0,
    has_all_logits: bool = False,
) -> int:
    """Operations to read T tokens after P others; the head runs on the last token, or on all.

    2 T (layer weights) + 4 (layers N H) (T P + T (T + 1) / 2) + 2 D V.
    """
    attention = config.attention
    num_pairs = num_tokens * num_past + num_tokens * (num_tokens + 1) // 2
    layers = 2 * num_tokens * num_layer_matmul_parameters(config, structure)
    scores_and_values = 4 * config.num_layers * attention.num_heads * attention.head_dim * num_pairs
    head = 2 * config.d_model * config.vocab_size * (num_tokens if has_all_logits else 1)
    return layers + scores_and_values + head


def decode_flops(config: HavocConfig, num_past: int, structure: Structure = FULL) -> int:
    """Operations to write one token after P others."""
    return prefill_flops(config, 1, structure, num_past=num_past)


def vision_flops(config: HavocConfig, num_patches: int) -> int:
    """Operations to project patches into the token stream; 0 for a text model."""
    return 0 if config.vision is None else 2 * num_patches * config.vision.patch_dim * config.d_model


def decode_read_bytes(config: HavocConfig, num_past: int, structure: Structure = FULL) -> int:
    """Bytes that must come from memory to write one token at batch 1: every weight once, and the cache of P tokens.

    Of an untied embedding one row is read; the vision projection is not.
    """
    shapes = tensor_shapes(config)
    unread = {VISION_PROJECTION} if config.tie_word_embeddings else {VISION_PROJECTION, EMBEDDING}
    weights = sum(tensor_bytes(name, shape, structure) for name, shape in shapes.items() if name not in unread)
    row = 0 if config.tie_word_embeddings else tensor_bytes(EMBEDDING, (1, config.d_model), structure)
    return weights + row + num_past * kv_bytes_per_token(config, structure)


def activation_bytes(
    config: HavocConfig, num_tokens: int, structure: Structure = FULL, *, num_past: int = 0, is_fused: bool = True
) -> int:
    """Estimated bytes in use at the widest point of a layer, batch 1, for a runtime that frees unneeded memory.

    The wider of attention (residual, normed, q, k, v, output; unless fused also the scores of all heads) and SwiGLU
    (residual, normed, gate, up), but at least the last token's logits.
    """
    attention, d_model = config.attention, config.d_model
    q_dim, kv_dim = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    scores = 0 if is_fused else attention.num_heads * num_tokens * (num_past + num_tokens)
    attending = num_tokens * (2 * d_model + 2 * q_dim + 2 * kv_dim) + scores
    feeding_forward = num_tokens * (2 * d_model + 2 * config.mlp.hidden_dim)
    return structure.activation_bytes * max(attending, feeding_forward, d_model + config.vocab_size)


def peak_bytes(config: HavocConfig, num_tokens: int, structure: Structure = FULL, *, num_new_tokens: int = 0) -> int:
    """Estimated bytes to read a prompt and write on: weights, cache of every token, activations of the prefill.

    A floor for the process: the runtime, its kernels and (on CUDA) the context come on top.
    """
    cache = (num_tokens + num_new_tokens) * kv_bytes_per_token(config, structure)
    return weight_bytes(config, structure) + cache + activation_bytes(config, num_tokens, structure)
