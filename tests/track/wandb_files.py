"""Reads what the package wandb writes offline: a log of blocks of 32 KiB, as LevelDB's, of protobuf records.

Each piece of a record stands behind its CRC-32, its length and its kind: 1 whole, 2 first, 3 middle, 4 last.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK, _HEADER = 32768, 7


def pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each piece; the file begins with 7 bytes of its own."""
    position = _HEADER
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        yield kind, data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length


def records(folder: Path) -> list[Any]:
    """Every record of the one offline run in `folder`."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found, parts = [], b""
    for kind, piece in pieces(path.read_bytes()):
        parts = piece if kind in {1, 2} else parts + piece
        if kind in {1, 4}:
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(parts)
    return found


def of_kind(folder: Path, kind: str) -> list[Any]:
    """The records of one kind, such as "run", "metric", "history", "artifact"."""
    return [getattr(record, kind) for record in records(folder) if record.WhichOneof("record_type") == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, in order, without wandb's own keys."""
    lines = []
    for entry in of_kind(folder, "history"):
        items = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in entry.item}
        lines.append({name: value for name, value in items.items() if not name.startswith("_")})
    return lines
