"""The past of a decoder: keys and values as ONNX Runtime returns them, or in buffers allocated once. No torch.

    B rows, P past tokens, S capacity in tokens, H head dim

A cache that grows is written by concatenation: a step reads one buffer and writes the other. A static cache has one
buffer, which a step reads and appends to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from ...errors import HavocError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The keys and values of one decoder: `num_tensors` (two per layer) of [B, num_kv_heads, tokens, head_dim]."""

    num_tensors: int
    num_kv_heads: int
    head_dim: int
    dtype: type[np.float32 | np.float16]
    device: str

    def shape(self, num_rows: int, num_tokens: int) -> tuple[int, int, int, int]:
        """The shape of one tensor."""
        return (num_rows, self.num_kv_heads, num_tokens, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values of every layer, [B, num_kv_heads, P, head_dim] each, alternating, on the session's device.

    In buffers (see `DecoderSession.empty_past`) a past is overwritten by the second extension after it; those of a
    static cache by every extension of an earlier past. `version` counts the switches of a live artifact's weights
    before it was read: another mixture does not continue with it.
    """

    num_rows: int
    num_tokens: int
    held: tuple[ort.OrtValue, ...] = ()
    buffers: KeyValueBuffers | None = None
    side: int = 0
    version: int = 0

    @property
    def values(self) -> tuple[ort.OrtValue, ...]:
        """The keys and values themselves; those in buffers are read, on a GPU copied to the host."""
        if self.buffers is None:
            return self.held
        return tuple(ort.OrtValue.ortvalue_from_numpy(array) for array in self.arrays())

    def arrays(self) -> list[NDArray[Any]]:
        """The keys and values on the host; on the CPU without a copy."""
        if self.buffers is None:
            return [on_host(value) for value in self.held]
        return self.buffers.arrays(self)


class Staged:
    """An int64 input whose place never changes: written on the host, read by the device."""

    def __init__(self, shape: tuple[int, ...], device: str, fill: int = 0) -> None:
        self._host = np.full(shape, fill, np.int64)
        self._is_aliased = device == "cpu"
        self.value = ort.OrtValue.ortvalue_from_numpy(self._host, device, 0)

    def write(self, array: NDArray[np.int64]) -> None:
        """Copy `array` to the input's place, into its first columns; later columns become 0."""
        width = array.shape[1]
        self._host[:, :width] = array
        self._host[:, width:] = 0
        if not self._is_aliased:
            self.value.update_inplace(self._host)


class KeyValueBuffers:
    """Room for `capacity` tokens of `num_rows` rows or fewer; `calls` are the `BoundCall`s to it by rows and tokens."""

    def __init__(self, layout: CacheLayout, num_rows: int, capacity: int, *, is_static: bool) -> None:
        self.layout = layout
        self.num_rows = num_rows
        self.capacity = capacity
        self.is_static = is_static
        count, num_sides = math.prod(layout.shape(num_rows, capacity)), 1 if is_static else 2
        self._host = [[np.zeros(count, layout.dtype) for _ in range(layout.num_tensors)] for _ in range(num_sides)]
        self.sides = [[ort.OrtValue.ortvalue_from_numpy(array, layout.device, 0) for array in s] for s in self._host]
        self._is_aliased = layout.device == "cpu"
        if not self._is_aliased:
            self._host = []
        self.pointers = [[int(value.data_ptr()) for value in side] for side in self.sides]
        self.ones = Staged((num_rows, capacity), layout.device, fill=1)
        self.calls: dict[tuple[int, int], Any] = {}

    def require_room(self, num_total: int) -> None:
        """Raise a `HavocError` unless `num_total` tokens fit."""
        if num_total > self.capacity:
            what = "static cache" if self.is_static else "past"
            raise HavocError(
                f"{num_total} tokens do not fit a {what} of {self.capacity}; shorten the prompt or make it longer"
            )

    def shape(self, num_rows: int, num_tokens: int) -> tuple[int, int, int, int]:
        """The shape that a graph sees of `num_tokens` tokens: a static cache is always whole."""
        return self.layout.shape(num_rows, self.capacity if self.is_static else num_tokens)

    def arrays(self, past: Past) -> list[NDArray[Any]]:
        """The filled part of one side on the host, [B, num_kv_heads, P, head_dim] each."""
        shape = self.shape(past.num_rows, past.num_tokens)
        whole = [on_host(value)[: math.prod(shape)].reshape(shape) for value in self.sides[past.side]]
        return [array[:, :, : past.num_tokens] for array in whole]

    def kept(self, past: Past, rows: NDArray[np.int64]) -> Past:
        """The past of some rows: on the other side, in a static cache in place of all."""
        side = 0 if self.is_static else 1 - past.side
        shape = self.shape(past.num_rows, past.num_tokens)
        for index, value in enumerate(self.sides[past.side]):
            kept = on_host(value)[: math.prod(shape)].reshape(shape)[rows].reshape(-1)
            if self._is_aliased:
                self._host[side][index][: len(kept)] = kept
            else:
                behind = np.zeros(math.prod(value.shape()) - len(kept), self.layout.dtype)
                self.sides[side][index].update_inplace(np.concatenate((kept, behind)))
        return replace(past, num_rows=len(rows), side=side)


def on_host(value: ort.OrtValue) -> NDArray[Any]:
    """The values as an array; on the CPU without a copy."""
    return np.from_dlpack(value._ortvalue) if value.device_name() == "cpu" else value.numpy()  # noqa: SLF001
