"""The source of an export: a base's configuration and its tensors one at a time, without building a model.

A base of any size opens in milliseconds; only the hash reads all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.base_tokenizer import load_tokenizer
from ..model.checkpoint import BUNDLED_NANO, Base, require_base
from ..model.config import PRESETS, HavocConfig
from ..model.config_file import is_gguf, read_config
from ..model.gguf import open_weights
from ..model.weights import RandomTensors, require_tensors, require_tied, weight_hash

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..model.tokenizer import Tokenizer
    from ..progress import Progress


@dataclass(frozen=True)
class Source:
    """A base to export. `directory` is its directory or GGUF file, None for a preset's random weights (seed 0)."""

    name: str
    config: HavocConfig
    tensors: Mapping[str, Tensor]
    directory: Path | None

    @property
    def is_random(self) -> bool:
        """Whether the weights are random: fit for measuring cost, not for answers."""
        return self.directory is None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights, as experts and records name the base."""
        return weight_hash(self.tensors)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The base's tokenizer, or None; a damaged one is a `HavocError`."""
        return None if self.directory is None else load_tokenizer(self.directory, num_rows=self.config.vocab_size)

    def read_hash(self, progress: Progress) -> str:
        """Return `hash`, and show the progress of reading, which takes a minute for gigabytes."""
        if "hash" not in vars(self):
            with progress.stage("hash the base", len(self.tensors), unit="tensors") as stage:
                vars(self)["hash"] = weight_hash(self.tensors, on_tensor=stage.advance)
        return self.hash


def open_source(base: Source | Base | Path | str) -> Source:
    """Open a directory, a GGUF file, the bundled `nano`, another preset with random weights, or a base that is loaded.

    A directory whose tensors do not fit its configuration is a `HavocError` that names the first one.
    """
    if isinstance(base, Source):
        return base
    if isinstance(base, Base):
        name = "random" if base.directory is None else _name(base.directory)
        return Source(name, base.config, base.tensors(), base.directory)
    name = str(base)
    if name == "nano" and not isinstance(base, Path):
        return _open_directory(BUNDLED_NANO, name)
    if not isinstance(base, Path) and (name in PRESETS or name == "havoc_7b") and not Path(name).is_dir():
        config = HavocConfig.preset(name)
        return Source(name, config, RandomTensors(config), None)
    directory = Path(base)
    require_base(directory)
    return _open_directory(directory, _name(directory))


def _name(path: Path) -> str:
    resolved = path.resolve()
    return resolved.stem if is_gguf(path) else resolved.name


def _open_directory(directory: Path, name: str) -> Source:
    config = read_config(directory)
    tensors = open_weights(directory, config)
    require_tensors(tensors, config, source=directory)
    require_tied(tensors, config, source=directory)
    return Source(name, config, tensors, directory)
