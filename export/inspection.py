"""Describe a base, a Hugging Face directory or a GGUF file, after everything in it was checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HavocError, printable
from ..model.base_tokenizer import load_tokenizer, missing_tokenizer
from ..model.config_file import is_gguf
from ..model.gguf import GgufTensors
from ..model.hf_config import to_hf
from ..model.tensors import tensor_shapes
from ..progress import SILENT, Progress
from ..storage import read_json
from .runtime.companions import carried_files, licence_of
from .source import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..model.config import HavocConfig
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
        "architecture": to_hf(config)["architectures"][0],
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
        "text_begins_and_ends": _around_text(tokenizer),
        "padding": _padding(config, directory),
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
                raise HavocError(
                    f"{directory}: tensor {name} holds NaN or Inf; the file is damaged or training diverged"
                )
            dtypes.add(_stored_type(source.tensors, name, tensor))
            stage.advance(note=name)
    return sorted(dtypes)


def _stored_type(tensors: Mapping[str, Tensor], name: str, tensor: Tensor) -> str:
    if isinstance(tensors, GgufTensors):
        return tensors.block_type(name).name
    return str(tensor.dtype).removeprefix("torch.")


def _tokenizer(tokenizer: Tokenizer | None, directory: Path) -> str:
    if tokenizer is None:
        return f"none: {missing_tokenizer(directory)}"
    return f"{tokenizer.vocab_size:,} ids" + (", with a chat template" if tokenizer.chat is not None else "")


def _around_text(tokenizer: Tokenizer | None) -> str:
    """The text before a plain prompt, and every token at which generation stops."""
    if tokenizer is None:
        return "not known"
    begins = _names(tokenizer, tokenizer.without_chat().encode_prompt("")) or "nothing"
    return f"{begins} before plain text; generation stops at {_names(tokenizer, tokenizer.eos_ids)}"


def _padding(config: HavocConfig, directory: Path) -> str:
    """The id that fills rows up; a config may name one that no row of the table has."""
    if config.pad_token_id is not None:
        return f"id {config.pad_token_id}"
    file = directory / "config.json"
    named = None if is_gguf(directory) else read_json(file).get("pad_token_id")
    return "none" if named is None else f"none: pad_token_id {named} of {file.name} has no row in the table"


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return printable(", ".join(str(tokenizer.backend.id_to_token(token_id)) for token_id in ids))
