"""What a Hugging Face directory is, after everything in it was checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HavocError
from ..model.tensors import EMBEDDING, HEAD, tensor_shapes
from ..model.tokenizer import Tokenizer
from .source import open_source

if TYPE_CHECKING:
    from pathlib import Path


def inspect_directory(directory: Path) -> dict[str, Any]:
    """Read configuration, every tensor and the tokenizer; the first thing that is wrong is a `HavocError`."""
    source = open_source(directory)
    config, attention = source.config, source.config.attention
    dtypes = set()
    for name in source.tensors:
        tensor = source.tensors[name]
        if not bool(torch.isfinite(tensor.float()).all()):
            msg = f"{directory}: tensor {name} holds NaN or Inf; the file is damaged or training diverged"
            raise HavocError(msg)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    if config.tie_word_embeddings and HEAD in source.tensors:
        _require_tied(source.tensors[HEAD], source.tensors[EMBEDDING], directory)
    scaling = attention.rope_scaling
    return {
        "directory": str(directory),
        "architecture": config.to_hf()["architectures"][0],
        "parameters": sum(math.prod(shape) for shape in tensor_shapes(config).values()),
        "layers": config.num_layers,
        "width": config.d_model,
        "heads": f"{attention.num_heads} query, {attention.num_kv_heads} key-value, {attention.head_dim} wide",
        "mlp": config.mlp.hidden_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_seq_len,
        "rope": f"theta {attention.rope_theta:g}" + (f", llama3 scaling x{scaling.factor:g}" if scaling else ""),
        "tied_head": config.tie_word_embeddings,
        "vision": "none" if config.vision is None else f"patches of {config.vision.patch_size} pixels",
        "stored_as": ", ".join(sorted(dtypes)),
        "tokenizer": _tokenizer(directory, config.vocab_size),
        "weight_hash": source.hash,
    }


def _require_tied(head: torch.Tensor, table: torch.Tensor, directory: Path) -> None:
    if not torch.equal(head, table):
        msg = f"{directory}: {HEAD} differs from {EMBEDDING}, but the config says tie_word_embeddings = true"
        raise HavocError(msg)


def _tokenizer(directory: Path, vocab_size: int) -> str:
    if not (directory / "tokenizer.json").is_file():
        return "none: it cannot read text"
    num_ids = Tokenizer.load(directory).vocab_size
    if num_ids > vocab_size:
        msg = f"{directory}: the tokenizer has {num_ids} ids, the model's table {vocab_size} rows"
        raise HavocError(msg)
    return f"{num_ids:,} ids"
