"""The tensors of a base, one at a time: mapped from safetensors or drawn from a seed, and the hash that names them.

Nothing here holds more than one tensor, so a base larger than memory can be hashed, folded and exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import safetensors
import torch
from torch import Tensor

from ..errors import HavocError
from ..storage import read_json
from .tensors import EMBEDDING, HEAD, tensor_shapes

if TYPE_CHECKING:
    from .config import HavocConfig

SAFETENSORS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
_FORMER_BUFFERS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a directory by Hugging Face name: mapped, read when needed, in their stored type."""

    def __init__(self, directory: str | Path, *, is_tied: bool = False) -> None:
        """Map the files; for a tied head (`is_tied`) a file may have only the table or only the head."""
        self.directory = Path(directory)
        self._files: dict[Path, Any] = {}
        self._file_of = _locate(self.directory)
        for name, file in self._file_of.items():
            if name not in self._open(file).keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                raise HavocError(f"{file}: tensor {name} is listed in {INDEX_FILE} but not in the file")
        for file in list(self._files):
            self._require_listed(file)
        self._table = HEAD if is_tied and EMBEDDING not in self._file_of and HEAD in self._file_of else EMBEDDING
        if self._table == HEAD:
            self._file_of[EMBEDDING] = self._file_of.pop(HEAD)

    def _stored_name(self, name: str) -> str:
        return self._table if name == EMBEDDING else name

    def _require_listed(self, file: Path) -> None:
        """Refuse tensors that the index does not list for the file; a tensor in two files would have two values."""
        for name in self._open(file).keys():  # noqa: SIM118
            home = self._file_of.get(name)
            if home != file and not name.endswith(_FORMER_BUFFERS):
                elsewhere = f"lists it in {home.name}" if home else "does not list it"
                raise HavocError(f"{file}: holds tensor {name}, but {INDEX_FILE} {elsewhere}")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open(self._file_of[name]).get_tensor(self._stored_name(name))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, read from the header."""
        return tuple(self._open(self._file_of[name]).get_slice(self._stored_name(name)).get_shape())

    def dtype(self, name: str) -> str:
        """Stored type of one tensor as safetensors names it, read from the header: F32, BF16, I8 and so on."""
        return str(self._open(self._file_of[name]).get_slice(self._stored_name(name)).get_dtype())

    def _open(self, file: Path) -> Any:  # noqa: ANN401 - safetensors has no types
        if file not in self._files:
            self._files[file] = _open_safetensors(file)
        return self._files[file]


def open_tensors(directory: str | Path, *, is_tied: bool = False) -> StoredTensors:
    """Map `model.safetensors`, or the shards that its index names; a broken or missing file is a `HavocError`.

    If the config ties the head (`is_tied`), the table is either of the two tensors, whichever exists.
    """
    return StoredTensors(directory, is_tied=is_tied)


def _open_safetensors(file: Path) -> Any:  # noqa: ANN401 - safetensors has no types
    try:
        return safetensors.safe_open(str(file), framework="pt", device="cpu")
    except FileNotFoundError:
        raise HavocError(f"{file}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise HavocError(f"{file}: not a whole safetensors file ({error})") from error


def _locate(directory: Path) -> dict[str, Path]:
    """File of every tensor; unused buffers of older checkpoints are left out."""
    single, index = directory / SAFETENSORS_FILE, directory / INDEX_FILE
    if single.is_file():
        located = dict.fromkeys(_open_safetensors(single).keys(), single)
    elif index.is_file():
        located = {name: _shard(directory, file) for name, file in _weight_map(index).items()}
    else:
        raise HavocError(f"{directory}: holds neither {SAFETENSORS_FILE} nor {INDEX_FILE}")
    return {name: file for name, file in located.items() if not name.endswith(_FORMER_BUFFERS)}


def _weight_map(index: Path) -> dict[str, Any]:
    fields = read_json(index)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HavocError(f"{index}: has no weight_map")
    return weight_map


def _shard(directory: Path, file: object) -> Path:
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise HavocError(
            f"{directory / INDEX_FILE}: {file!r} is not the name of a safetensors file in the same directory"
        )
    return directory / file


@runtime_checkable
class _HasShapes(Protocol):
    def shape(self, name: str) -> tuple[int, ...]: ...


class RandomTensors(Mapping[str, Tensor]):
    """The tensors of a fresh model, fp32, each drawn from its own seed: any one can be had without the others."""

    def __init__(self, config: HavocConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self._shapes = tensor_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        tensor = torch.empty(shape).normal_(0.0, self.config.initializer_range, generator=generator)
        if name == EMBEDDING and self.config.pad_token_id is not None:
            tensor[self.config.pad_token_id] = 0.0
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._shapes[name]


def weight_hash(tensors: Mapping[str, Tensor] | str | Path, *, on_tensor: Callable[[], object] = lambda: None) -> str:
    """Hex SHA-256 of the tensors (or of a directory's): name, type, shape and bytes of each, in order of name.

    `on_tensor` is called after each.
    """
    if not isinstance(tensors, Mapping):
        tensors = open_tensors(tensors)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.ndim else tensor.numpy().tobytes())
        on_tensor()
    return digest.hexdigest()


def require_tied(tensors: Mapping[str, Tensor], config: HavocConfig, *, source: object) -> None:
    """Refuse a stored head that differs from the table it is tied to: it is unknown which one is the model's."""
    if config.tie_word_embeddings and HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise HavocError(f"{source}: {HEAD} differs from {EMBEDDING}, but the config says tie_word_embeddings = true")


def require_tensors(tensors: Mapping[str, Tensor], config: HavocConfig, *, source: object) -> None:
    """Refuse, by name, a tensor that is missing, extra, not floating point or of another shape; reads headers only."""
    expected = tensor_shapes(config)
    found = set(tensors) - ({HEAD} if config.tie_word_embeddings else set())
    for problem, names in (("is missing", set(expected) - found), ("is not part of this model", found - set(expected))):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            hint = ": the config says tie_word_embeddings = false" if HEAD in names and problem == "is missing" else ""
            raise HavocError(f"{source}: tensor {min(names)} {problem}{others}{hint}")
    for name, shape in expected.items():
        has = tensors.shape(name) if isinstance(tensors, _HasShapes) else tuple(tensors[name].shape)
        if has != shape:
            raise HavocError(f"{source}: tensor {name} has shape {list(has)}, the config says {list(shape)}")
        if isinstance(tensors, StoredTensors) and (dtype := tensors.dtype(name)) not in _FLOAT_TYPES:
            raise HavocError(
                f"{source}: tensor {name} is {dtype}; quantized checkpoints are not read, only floating point"
            )
