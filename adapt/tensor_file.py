"""Named tensors with text metadata in one safetensors file, written whole and read with suspicion.

What is read came from somewhere else: a short, oversized or inconsistent header, a missing key, a number that is not
finite, or bytes that do not match their digest each end in one `HavocError` line.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from ..errors import HavocError
from ..storage import canonical_json, write_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write `tensors` (moved to the CPU) and `metadata` to `path` atomically, with a digest of the tensors."""
    on_cpu = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    data = serialise(on_cpu, metadata={**metadata, "tensors_sha256": digest_of(on_cpu)})
    write_bytes(path, _with_sorted_header(data))


def _with_sorted_header(data: bytes) -> bytes:
    """Sort the header's keys: the library writes metadata in random order, and equal content should be equal bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = canonical_json(json.loads(data[8:end]))
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_tensor_file(path: Path, *, format_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensor_file` wrote with `format` = `format_name`; anything else is a `HavocError`."""
    if not path.is_file():
        raise HavocError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != format_name:
                raise HavocError(f"{path}: format is {metadata.get('format')!r}, expected {format_name!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise HavocError(f"{path}: not a whole safetensors file ({error}); make it again") from error
    if digest_of(tensors) != metadata.get("tensors_sha256"):
        raise HavocError(
            f"{path}: the tensors do not match their SHA-256; the file was changed or damaged, make it again"
        )
    return tensors, metadata


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over name, dtype, shape and bytes of each tensor (on the CPU), in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
