"""Models to and from directories in Hugging Face layout, and the base that everything downstream starts from.

A base is such a directory or a GGUF file.

A directory holds `config.json`, `generation_config.json` and `model.safetensors` (or shards; or `model.pt` on
request) with Hugging Face's tensor names. Loading is strict: what is missing, extra, ill-shaped, not finite or not
tied as promised is named.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import HavocError
from ..storage import write_bytes, write_json
from .base_tokenizer import load_tokenizer, missing_tokenizer
from .config import PRESETS, HavocConfig
from .gguf import open_weights
from .gguf_header import is_gguf
from .tensors import EMBEDDING, module_name, tensor_name, tensor_shapes
from .transformer import HavocModel
from .weights import (
    INDEX_FILE,
    SAFETENSORS_FILE,
    RandomTensors,
    open_tensors,
    require_tensors,
    require_tied,
    weight_hash,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .tokenizer import Tokenizer

__all__ = [
    "BUNDLED_NANO",
    "Base",
    "assemble",
    "generation_fields",
    "load_base",
    "load_model",
    "named_tensors",
    "open_tensors",
    "open_weights",
    "require_base",
    "save_model",
    "weight_hash",
]

TORCH_FILE = "model.pt"
BUNDLED_NANO = Path(__file__).parent / "nano"
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Base:
    """A dense decoder to adapt and export, and the hash of its weights.

    `directory` is the Hugging Face directory or GGUF file; None for random weights.
    """

    model: HavocModel
    config: HavocConfig
    weight_hash: str
    directory: Path | None
    loaded_tokenizer: Tokenizer | None = None

    @property
    def is_random(self) -> bool:
        """Whether the weights are a preset's random ones: fit for measuring cost, not for answers."""
        return self.directory is None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; a base without one is a `HavocError` when text is asked of it."""
        if self.loaded_tokenizer is None:
            raise HavocError(missing_tokenizer(self.directory))
        return self.loaded_tokenizer

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by Hugging Face name, read from disk (or drawn) one at a time."""
        return RandomTensors(self.config) if self.directory is None else open_weights(self.directory, self.config)


def load_base(path_or_preset: str | Path, *, is_chat: bool = True) -> Base:
    """Load a directory, a GGUF file, the bundled `nano`, or another preset's shape with random weights (seed 0).

    Prompts go through the base's chat template where it has one and `is_chat` does not say otherwise.
    """
    if str(path_or_preset) == "nano" and not isinstance(path_or_preset, Path):
        return load_base(BUNDLED_NANO, is_chat=is_chat)
    if isinstance(path_or_preset, str) and (path_or_preset in PRESETS or path_or_preset == "havoc_7b"):
        config = HavocConfig.preset(path_or_preset)
        tensors = RandomTensors(config)
        return Base(assemble(config, tensors, source=path_or_preset), config, weight_hash(tensors), None)
    directory = Path(path_or_preset)
    require_base(directory)
    config = HavocConfig.from_directory(directory)
    stored = open_weights(directory, config)
    tokenizer = load_tokenizer(directory, num_rows=config.vocab_size)
    if tokenizer is not None and not is_chat:
        tokenizer = tokenizer.without_chat()
    return Base(assemble(config, stored, source=directory), config, weight_hash(stored), directory, tokenizer)


def require_base(path: Path) -> None:
    """Refuse what is neither a Hugging Face directory nor a GGUF file, and say what it is instead."""
    if is_gguf(path):
        return
    if path.is_file():
        raise HavocError(f"{path}: a file; a base is a Hugging Face directory, a .gguf file or a preset")
    if not path.is_dir():
        raise HavocError(
            f"{path}: no such directory or .gguf file, and no preset is called so (there are {', '.join(PRESETS)})"
        )
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise HavocError(f"{path}: holds no config.json; give its GGUF file: {files[0]}")


def load_model(directory: str | Path, *, device: str | torch.device = "cpu") -> HavocModel:
    """Read a directory into an fp32 model in eval mode; `model.pt` only where there is no safetensors file."""
    directory = Path(directory)
    config = HavocConfig.from_directory(directory)
    has_safetensors = (directory / SAFETENSORS_FILE).is_file() or (directory / INDEX_FILE).is_file()
    is_torch_file = not has_safetensors and (directory / TORCH_FILE).is_file()
    tensors = (
        _read_torch_file(directory / TORCH_FILE)
        if is_torch_file
        else open_tensors(directory, is_tied=config.tie_word_embeddings)
    )
    return assemble(config, tensors, source=directory).to(device)


def assemble(config: HavocConfig, tensors: Mapping[str, Tensor], *, source: object) -> HavocModel:
    """Build the model, fp32 and in eval mode, around tensors by Hugging Face name; the module says what is refused."""
    require_tensors(tensors, config, source=source)
    with torch.device("meta"):
        model = HavocModel(config)
    state = {module_name(name): _as_float32(name, tensors[name], source=source) for name in tensor_shapes(config)}
    if config.tie_word_embeddings:
        require_tied(tensors, config, source=source)
        state["lm_head.weight"] = state[module_name(EMBEDDING)]
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(requires_grad=True).eval()


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


def named_tensors(model: HavocModel) -> dict[str, Tensor]:
    """The model's live parameters by Hugging Face name, a tied table once; sharing memory with the model."""
    return {tensor_name(path): parameter for path, parameter in model.named_parameters()}


def save_model(
    model: HavocModel, directory: str | Path, *, use_safetensors: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write weights and configs, each file atomically, the weights in `dtype` (default: the model's own).

    A directory that holds weights in the other form is refused: the reader would find the old ones.
    """
    directory = Path(directory)
    for other in ({TORCH_FILE} if use_safetensors else {SAFETENSORS_FILE}) | {INDEX_FILE}:
        if (directory / other).exists():
            raise HavocError(f"{directory} already holds {other}; save to another directory or remove it first")
    state = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in named_tensors(model).items()
    }
    stored_dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    if use_safetensors:
        write_bytes(directory / SAFETENSORS_FILE, safetensors.torch.save(state, metadata={"format": "pt"}))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(directory / TORCH_FILE, buffer.getvalue())
    write_json(directory / "config.json", model.config.to_hf() | {"torch_dtype": stored_dtype, "dtype": stored_dtype})
    write_json(directory / "generation_config.json", generation_fields(model.config))


def generation_fields(config: HavocConfig) -> dict[str, Any]:
    """Fields of `generation_config.json`: greedy, and the ids that begin, end and pad a text."""
    eos = config.eos_token_id
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(eos) if isinstance(eos, tuple) else eos}
    return {"do_sample": False, **ids, "pad_token_id": config.pad_token_id}
