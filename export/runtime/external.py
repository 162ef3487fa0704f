"""Which files an ONNX graph takes its weights from, read from its bytes without onnx or ONNX Runtime.

A tensor may keep its values in another file, which the graph names. These names must be known before a runtime opens
the graph, because weights in a file that was not hashed may have been replaced. Only the path to the names is read,
through messages and field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (Protocol Buffers wire
format); everything else is skipped, so it takes milliseconds. Why not by protobuf: docs/decisions/0020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import HavocError
from ...storage import explained, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ENTRY = "StringStringEntryProto"
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "TensorProto": {13: _ENTRY},
}
"""Every message on a way to a tensor: the fields to follow, and the message that each of them holds."""

_MAX_GRAPH_BYTES = 2**31
"""Of which Protocol Buffers reads no larger one."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES, _MAX_TAG = 10, 2**32 - 1


def external_locations(path: Path) -> set[str]:
    """Every file that the graph at `path` names as a file of weights, as written there: relative to the graph.

    A file that is not an ONNX graph, or is cut short, is a `HavocError`.
    """
    try:
        data = read_bounded(path, max_bytes=_MAX_GRAPH_BYTES)
    except OSError as error:
        raise explained(error, path) from error
    try:
        return _locations(data)
    except (ValueError, IndexError) as error:
        raise HavocError(
            f"{path}: not an ONNX graph, or a damaged one ({error}); copy or export the artifact again"
        ) from error


def _locations(data: bytes) -> set[str]:
    found: set[str] = set()
    waiting = [("ModelProto", 0, len(data))]  # not by recursion: a hostile graph may be nested as deep as it likes
    while waiting:
        message, start, end = waiting.pop()
        if message == _ENTRY:
            found |= _location(data, start, end)
            continue
        inner = _MESSAGES[message]
        waiting += [(inner[field], at, stop) for field, at, stop in _fields(data, start, end) if field in inner]
    return found


def _location(data: bytes, start: int, end: int) -> set[str]:
    """The value of an entry with the key `location`; readers differ on repeated fields, so all values count."""
    fields = [(field, data[at:stop]) for field, at, stop in _fields(data, start, end)]
    if (1, b"location") not in fields:
        return set()
    return {value.decode() for field, value in fields if field == 2}  # noqa: PLR2004


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte of each field of a message that has a length; numbers are stepped over."""
    while start < end:
        tag, start = _varint(data, start)
        kind = tag & 7
        if tag > _MAX_TAG:  # a reader that drops the upper bits would see another field
            raise ValueError(f"a field number of {tag >> 3} before byte {start}")
        if kind == _BYTES:
            size, start = _varint(data, start)
            stop = start + size
            yield tag >> 3, start, stop
        elif kind == _VARINT:
            _, stop = _varint(data, start)
        elif kind in (_FIXED64, _FIXED32):
            stop = start + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"wire type {kind} at byte {start}")
        start = stop
        if stop > end:
            raise ValueError(f"a field ends {stop - end} bytes after its message")


def _varint(data: bytes, start: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = data[start + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:  # noqa: PLR2004 - the last one
            return value, start + index + 1
    raise ValueError(f"a number of more than {_MAX_VARINT_BYTES} bytes at byte {start}")
