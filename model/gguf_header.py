"""The header of a GGUF file: metadata and the place of each tensor, read without trusting it. It needs no library.

    header = read_header(Path("model.gguf"))
    header.metadata["general.architecture"]          # "llama"
    header.tensors["token_embd.weight"].shape        # (49152, 576), as Hugging Face has it: [out, in]

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is a list of lengths, each followed by data of
that length. Every length is compared with the rest of the file before data is read or allocated, so a false header
costs no more time and memory than a correct one of the same size.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HavocError, printable
from ..storage import unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 26
MAX_ITEMS = 1 << 22
"""Of all arrays together; the largest vocabularies in use have 1 M tokens and merges."""

MAX_TENSORS, MAX_ENTRIES, MAX_NAME_BYTES, MAX_DIMENSIONS, MAX_ALIGNMENT = 1 << 16, 1 << 16, 1 << 12, 4, 1 << 16

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class BlockType:
    """How a tensor is stored: blocks of `size` values along a row, each in `num_bytes` bytes."""

    name: str
    size: int
    num_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
"""By the number that the file gives."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: shape [out, in] or [size], and the place of its bytes."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the last dimension."""
        return self.shape[-1] // self.type.size * self.type.num_bytes

    @property
    def num_rows(self) -> int:
        """Rows of the last dimension."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file: metadata by key (arrays as lists) and tensors by their name in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read and check the header; an error in the file is a `HavocError` of one line."""
    if not path.is_file():
        raise HavocError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise HavocError(f"{path}: not a GGUF file (it does not begin with {MAGIC.decode()})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise unreadable(error, path) from error


class _Reader:
    """A position in the header of one file, and how much of the header's budget is left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(MAGIC)
        self._end = min(len(data), MAX_HEADER_BYTES)
        self._num_items = 0

    def header(self) -> Header:
        version = self._number("I", "the version")
        if version not in VERSIONS:
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in {1, *VERSIONS}
            kind = "big-endian: convert it to little-endian" if is_swapped else f"of version {version}"
            raise self._wrong(f"is {kind}; HAVOC reads little-endian files of version 2 and 3")
        num_tensors = self._count("tensors", MAX_TENSORS)
        num_entries = self._count("metadata entries", MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._wrong(f"gives {printable(key)} twice")
            metadata[key] = self._value(self._number("I", key), key)
        parts = metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise self._wrong(f"is one of {parts} parts; merge them first (llama-gguf-split --merge)")
        return Header(self._path, metadata, self._tensors(num_tensors, metadata))

    def _tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._wrong(
                f"has general.alignment {alignment!r:.40}; it must be a power of two up to {MAX_ALIGNMENT}"
            )
        found: dict[str, StoredTensor] = {}
        for _ in range(num_tensors):
            tensor = self._tensor()
            if tensor.name in found:
                raise self._wrong(f"holds tensor {printable(tensor.name)} twice")
            found[tensor.name] = tensor
        start = -(-self._at // alignment) * alignment
        return {name: self._placed(tensor, start, alignment) for name, tensor in found.items()}

    def _tensor(self) -> StoredTensor:
        name = self._name("a tensor's name")
        shown = f"tensor {printable(name)}"
        num_dimensions = self._number("I", shown)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._wrong(f"gives {shown} {num_dimensions} dimensions; it has 1 to {MAX_DIMENSIONS}")
        shape = tuple(reversed([self._number("Q", shown) for _ in range(num_dimensions)]))
        number = self._number("I", shown)
        if number not in BLOCK_TYPES:
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise self._wrong(
                f"stores {shown} in type {_type_name(number)}, which is not supported; HAVOC reads {known}"
            )
        block = BLOCK_TYPES[number]
        if min(shape) < 1 or shape[-1] % block.size:
            raise self._wrong(
                f"gives {shown} shape {list(shape)}, which {block.name} blocks of {block.size} cannot store"
            )
        return StoredTensor(name, shape, block, self._number("Q", shown))

    def _placed(self, tensor: StoredTensor, start: int, alignment: int) -> StoredTensor:
        """The tensor with its place in the file, which must hold it whole."""
        begin = start + tensor.offset_bytes
        end = begin + tensor.num_rows * tensor.row_bytes
        name = printable(tensor.name)
        if tensor.offset_bytes % alignment:
            raise self._wrong(
                f"puts tensor {name} at offset {tensor.offset_bytes}, which is not a multiple of {alignment}"
            )
        if end > len(self._data):
            raise self._wrong(
                f"ends at byte {len(self._data):,}, but tensor {name} ends at {end:,}: truncated or damaged"
            )
        return StoredTensor(tensor.name, tensor.shape, tensor.type, begin)

    def _value(self, kind: int, key: str) -> Any:  # noqa: ANN401 - a number, a text, or a list of them
        if kind == _STRING:
            return self._text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._wrong(f"gives {printable(key)} the unknown type {kind}")
        value = self._number(_SCALARS[kind], key)
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> list[Any]:
        kind, count = self._number("I", key), self._number("Q", key)
        self._num_items += count
        smallest = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind]) if kind in _SCALARS else 0
        if not smallest:
            what = "an array of arrays" if kind == _ARRAY else f"an array of the unknown type {kind}"
            raise self._wrong(f"gives {printable(key)} as {what}, which is not supported")
        if self._num_items > MAX_ITEMS or count * smallest > self._end - self._at:
            raise self._wrong(f"gives {printable(key)} {count:,} values, more than it can hold: truncated or damaged")
        if kind == _STRING:
            return [self._text(key) for _ in range(count)]
        values = struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * smallest, key))
        return [bool(value) for value in values] if kind == _BOOL else list(values)

    def _name(self, what: str) -> str:
        return self._text(what, most=MAX_NAME_BYTES)

    def _text(self, what: str, *, most: int = MAX_HEADER_BYTES) -> str:
        size = self._number("Q", what)
        if size > most:
            raise self._wrong(f"gives {printable(what)} {size:,} bytes; HAVOC reads at most {most:,}")
        try:
            return self._take(size, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"holds a text that is not UTF-8 in {printable(what)}") from error

    def _count(self, what: str, most: int) -> int:
        count: int = self._number("Q", f"the number of {what}")
        if count > most:
            raise self._wrong(f"claims {count:,} {what}; HAVOC reads at most {most:,}")
        return count

    def _number(self, form: str, what: str) -> Any:  # noqa: ANN401 - int or float, as the form says
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))[0]

    def _take(self, size: int, what: str) -> bytes:
        if size > self._end - self._at:
            limit = "" if len(self._data) <= self._end else f" of at most {MAX_HEADER_BYTES:,} bytes"
            raise self._wrong(f"ends inside its header{limit}, in {printable(what)}: truncated or damaged")
        self._at += size
        return self._data[self._at - size : self._at]

    def _wrong(self, what: str) -> HavocError:
        return HavocError(f"{self._path}: the GGUF file {what}")


def _type_name(number: int) -> str:
    """The name of a type that is not supported, for a person who has such a file."""
    others = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
    others |= {22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"}
    others |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
    return others.get(number, str(number))
