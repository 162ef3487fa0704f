"""What a Hugging Face directory is, after everything in it was checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HavocError
from ..model.tensors import tensor_shapes
from ..model.tokenizer import load_tokenizer
from ..progress import SILENT, Progress
from .companions import CHAT_TEMPLATES, carried_files, licence_of
from .source import open_source

if TYPE_CHECKING:
    from pathlib import Path

    from ..model.tokenizer import Tokenizer
    from .source import Source


def inspect_directory(directory: Path, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Read configuration, every tensor and the tokenizer; the first thing that is wrong is a `HavocError`."""
    source = open_source(directory)
    config, attention = source.config, source.config.attention
    carried_files(directory)
    tokenizer, licence = load_tokenizer(directory, num_rows=config.vocab_size), licence_of(directory)
    dtypes = _stored_types(source, directory, progress)
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
        "stored_as": ", ".join(dtypes),
        "tokenizer": _tokenizer(tokenizer, directory),
        "licence": licence.identifier or licence.file or "not named",
        "weight_hash": source.read_hash(progress),
    }


def _stored_types(source: Source, directory: Path, progress: Progress) -> list[str]:
    """Read every tensor and return the types found; one that holds NaN or Inf, also only as fp32, is refused."""
    dtypes = set()
    with progress.stage("read the weights", len(source.tensors), unit="tensors") as stage:
        for name in source.tensors:
            tensor = source.tensors[name]
            if not bool(torch.isfinite(tensor.float()).all()):
                msg = f"{directory}: tensor {name} holds NaN or Inf; the file is damaged or training diverged"
                raise HavocError(msg)
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            stage.advance(note=name)
    return sorted(dtypes)


def _tokenizer(tokenizer: Tokenizer | None, directory: Path) -> str:
    if tokenizer is None:
        return "none: it cannot read text"
    has_template = any((directory / name).is_file() for name in CHAT_TEMPLATES)
    return f"{tokenizer.vocab_size:,} ids" + (", with a chat template" if has_template else "")
