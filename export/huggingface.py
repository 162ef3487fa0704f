"""`--to hf`: the folded model as a Hugging Face directory that transformers loads with the same logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from ..errors import HavocError
from ..model.hf_config import to_hf, with_ends
from ..model.pretrained import generation_fields
from ..model.tensors import tensor_shapes
from ..model.weights import INDEX_FILE, SAFETENSORS_FILE
from ..progress import SILENT, Progress
from ..storage import new_directory, read_json, write_bytes, write_json, write_text
from .card import huggingface_card
from .fold import FoldedTensors
from .package import Mixture, mixture_document, require_companions
from .runtime.artifact import MANIFEST
from .runtime.companions import carry, licence_of
from .source import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..adapt.expert import Expert
    from ..adapt.mixture import MixingRule
    from .runtime.signature import Signer

MAX_SHARD_BYTES = 1 << 30
_MARKER = "mixture.json"  # only HAVOC writes it, so another tool's directory is never replaced
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""What whole weights are written in, by the word of `--weights`."""


def export_huggingface(
    base: Source | Path | str,
    out: Path,
    *,
    experts: Sequence[Expert] = (),
    alpha: Sequence[float] = (),
    rule: MixingRule = "delta",
    weight_format: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    signer: Signer | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Fold and write `config.json`, safetensors (in shards where large), tokenizer and `mixture.json`; return `out`."""
    source, dtype = open_source(base), DTYPES[weight_format]
    require_companions(source)
    mixture = Mixture(experts=tuple(experts), alpha=tuple(alpha), rule=rule)
    tensors = FoldedTensors(source.tensors, mixture.deltas(source, None))
    if (out / MANIFEST).exists():
        raise HavocError(f"{out} is an artifact, not a Hugging Face directory: choose another --out")
    with new_directory(out, marker=_MARKER) as folder:
        _write_weights(folder, source, tensors, dtype, max_shard_bytes, progress)
        name = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", to_hf(source.config) | {"torch_dtype": name, "dtype": name})
        write_json(folder / "generation_config.json", _generation(source))
        carry(source.directory, folder)
        card = huggingface_card(source, mixture.weights, rule, name, licence_of(source.directory))
        write_text(folder / "README.md", card)
        write_json(folder / _MARKER, mixture_document(source, mixture))
        if signer is not None:
            signer.sign(folder, name=out.resolve().name)
    return out


def _generation(source: Source) -> dict[str, Any]:
    """How the base is sampled, as it says itself, with every end of text that its two files name."""
    file = None if source.directory is None else source.directory / "generation_config.json"
    ours = generation_fields(
        source.config if source.tokenizer is None else with_ends(source.config, source.tokenizer.eos_ids)
    )
    if file is None or not file.exists():
        return ours
    return {**ours, **read_json(file), "eos_token_id": ours["eos_token_id"], "pad_token_id": ours["pad_token_id"]}


def _write_weights(
    folder: Path,
    source: Source,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """One file, or shards with their index: at most one shard is in memory."""
    shards = _shards(source, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    num_bytes = sum(_num_bytes(shape, dtype.itemsize) for shape in tensor_shapes(source.config).values())
    with progress.stage("write weights", num_bytes, unit="bytes") as stage:
        for index, names in enumerate(shards, start=1):
            file = SAFETENSORS_FILE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            shard = {name: finite(name, tensors[name].to(dtype)).contiguous() for name in names}
            write_bytes(folder / file, safetensors.torch.save(shard, metadata={"format": "pt"}))
            weight_map |= dict.fromkeys(names, file)
            stage.advance(sum(tensor.nbytes for tensor in shard.values()), note=file)
    if len(shards) > 1:
        index_document = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_bytes(folder / INDEX_FILE, json.dumps(index_document, indent=2).encode())


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor; one that holds NaN, Inf or what its kind of number cannot is a `HavocError` with its name."""
    if not bool(torch.isfinite(tensor).all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise HavocError(f"{name}: holds NaN, Inf or a value beyond {kind}, so it is not exported")
    return tensor


def _shards(source: Source, item_bytes: int, max_shard_bytes: int) -> list[list[str]]:
    return list(_grouped(tensor_shapes(source.config), item_bytes, max_shard_bytes))


def _grouped(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, shape in shapes.items():
        size = _num_bytes(shape, item_bytes)
        if names and total + size > max_shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _num_bytes(shape: tuple[int, ...], item_bytes: int) -> int:
    count = item_bytes
    for size in shape:
        count *= size
    return count
