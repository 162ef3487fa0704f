"""A decoder's weights as files in Hugging Face layout: what `save_pretrained` writes and `load_pretrained` reads.

A directory holds `config.json`, `generation_config.json` and `model.safetensors` (or shards; or `model.pt` on
request) with Hugging Face's tensor names. Loading is strict: what is missing, extra, ill-shaped, not finite or not
tied as promised is named.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import HavocError
from ..storage import write_bytes, write_json
from .hf_config import to_hf
from .tensors import EMBEDDING, module_name, tensor_shapes
from .weights import INDEX_FILE, SAFETENSORS_FILE, open_tensors, require_tensors, require_tied

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .config import HavocConfig

TORCH_FILE = "model.pt"
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(directory: Path, config: HavocConfig) -> Mapping[str, Tensor]:
    """The tensors of a directory by Hugging Face name; `model.pt` is used only if there is no safetensors file."""
    has_safetensors = (directory / SAFETENSORS_FILE).is_file() or (directory / INDEX_FILE).is_file()
    if not has_safetensors and (directory / TORCH_FILE).is_file():
        return _read_torch_file(directory / TORCH_FILE)
    return open_tensors(directory, is_tied=config.tie_word_embeddings)


def state_of(config: HavocConfig, tensors: Mapping[str, Tensor], *, source: object) -> dict[str, Tensor]:
    """Return a model's state dict in fp32 from tensors by Hugging Face name, a tied head being its embedding.

    `source` names the tensors in the `HavocError` for what is missing, extra, ill-shaped, no float or not finite.
    """
    require_tensors(tensors, config, source=source)
    state = {module_name(name): _as_float32(name, tensors[name], source=source) for name in tensor_shapes(config)}
    if config.tie_word_embeddings:
        require_tied(tensors, config, source=source)
        state["lm_head.weight"] = state[module_name(EMBEDDING)]
    return state


def _as_float32(name: str, tensor: Tensor, *, source: object) -> Tensor:
    if tensor.dtype not in _FLOAT_TYPES:
        raise HavocError(
            f"{source}: tensor {name} is {tensor.dtype}; quantized checkpoints are not read, only floating point"
        )
    converted = tensor.to(torch.float32, copy=True)
    if not bool(torch.isfinite(converted).all()):  # asked of fp32, which a float64 may overflow
        raise HavocError(f"{source}: tensor {name} holds NaN or Inf; the file is damaged or training diverged")
    return converted


def _read_torch_file(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a damaged or hostile file
        raise HavocError(f"{file}: not a file of plain tensors ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise HavocError(f"{file}: must hold tensors by name")
    return state


def write_tensors(
    directory: Path,
    config: HavocConfig,
    tensors: Mapping[str, Tensor],
    *,
    use_safetensors: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights and configs, each file atomically, the weights in `dtype` (default: each tensor's own).

    A directory that holds weights in the other form is refused: the reader would find the old ones.
    """
    for other in ({TORCH_FILE} if use_safetensors else {SAFETENSORS_FILE}) | {INDEX_FILE}:
        if (directory / other).exists():
            raise HavocError(f"{directory} already holds {other}; save to another directory or remove it first")
    state = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    stored_dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    if use_safetensors:
        write_bytes(directory / SAFETENSORS_FILE, safetensors.torch.save(state, metadata={"format": "pt"}))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(directory / TORCH_FILE, buffer.getvalue())
    write_json(directory / "config.json", to_hf(config) | {"torch_dtype": stored_dtype, "dtype": stored_dtype})
    write_json(directory / "generation_config.json", generation_fields(config))


def generation_fields(config: HavocConfig) -> dict[str, Any]:
    """Fields of `generation_config.json`: greedy, and the ids that begin, end and pad a text."""
    eos = config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos}
    return {"do_sample": False, **ids, "pad_token_id": config.pad_token_id}
