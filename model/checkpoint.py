"""The base that everything downstream starts from: a Hugging Face directory, a GGUF file, or a preset's shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HavocError
from .base_tokenizer import load_tokenizer, missing_tokenizer
from .config import PRESETS, HavocConfig
from .config_file import is_gguf, read_config
from .device import open_device
from .gguf import open_weights
from .transformer import HavocModel
from .weights import (
    RandomTensors,
    weight_hash,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..cores import TorchDevice
    from .tokenizer import Tokenizer

BUNDLED_NANO = Path(__file__).parent / "nano"


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
        """The tokenizer; a base without one is a `HavocError`."""
        if self.loaded_tokenizer is None:
            raise HavocError(missing_tokenizer(self.directory))
        return self.loaded_tokenizer

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by Hugging Face name, read from disk (or drawn) one at a time."""
        return RandomTensors(self.config) if self.directory is None else open_weights(self.directory, self.config)


def load_base(
    path_or_preset: str | Path, *, is_chat: bool = True, context: int | None = None, device: TorchDevice = "cpu"
) -> Base:
    """Load a directory, a GGUF file, the bundled `nano`, or another preset's shape with random weights (seed 0).

    Prompts go through the base's chat template if it has one, unless `is_chat` is False. `context` allows texts with
    more tokens than the base's own context, with continued RoPE angles; None: its own. A `context` that is not longer
    than its own is a `HavocError`. The model's weights are put on `device`, in fp32; `tensors` always gives those on
    the disk, on the CPU.
    """
    place = open_device(device)
    if str(path_or_preset) == "nano" and not isinstance(path_or_preset, Path):
        return load_base(BUNDLED_NANO, is_chat=is_chat, context=context, device=device)
    if isinstance(path_or_preset, str) and (path_or_preset in PRESETS or path_or_preset == "havoc_7b"):
        config = _extended(HavocConfig.preset(path_or_preset), context)
        tensors = RandomTensors(config)
        model = HavocModel.from_tensors(config, tensors, source=path_or_preset).to(place)
        return Base(model, config, weight_hash(tensors), None)
    directory = Path(path_or_preset)
    require_base(directory)
    config = _extended(read_config(directory), context)
    stored = open_weights(directory, config)
    tokenizer = load_tokenizer(directory, num_rows=config.vocab_size)
    if tokenizer is not None and not is_chat:
        tokenizer = tokenizer.without_chat()
    model = HavocModel.from_tensors(config, stored, source=directory).to(place)
    return Base(model, config, weight_hash(stored), directory, tokenizer)


def _extended(config: HavocConfig, context: int | None) -> HavocConfig:
    """The configuration with a longer context; weights and the angles of its own positions do not change."""
    if context is None:
        return config
    if context <= config.max_seq_len:
        raise HavocError(
            f"a context of {context} tokens: this base already has {config.max_seq_len}; leave the context out"
        )
    return replace(config, max_seq_len=context)


def require_base(path: Path) -> None:
    """Refuse a path that is neither a Hugging Face directory nor a GGUF file, and say what it is."""
    if is_gguf(path):
        return
    if path.is_file():
        raise HavocError(f"{path}: a file; a base is a Hugging Face directory, a .gguf file or a preset")
    if not path.is_dir():
        raise HavocError(f"{path}: not a directory, not a .gguf file and not a preset (presets: {', '.join(PRESETS)})")
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        raise HavocError(f"{path}: holds no config.json; give its GGUF file: {files[0]}")
