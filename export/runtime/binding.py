"""One shape of call, bound to ONNX Runtime once: what does not change between two calls is not handed over again.

    B rows, T new tokens, P past tokens, S = P + T, D model, V vocab

With the keys and values in buffers allocated beforehand, the runtime allocates nothing that outlives a call. Buffers
are addressed by pointer, through ONNX Runtime's own binding object: its Python wrapper costs as much again, for every
key and value of every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_inference_collection import OrtDevice

from .past import Staged
from .providers import run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...model.config import HavocConfig
    from .live import LiveWeights
    from .past import KeyValueBuffers, Past

_ONNX_TYPES = {np.float32: 1, np.float16: 10, np.int64: 7}  # onnx.TensorProto.DataType


class BoundCall:
    """T new tokens a row into one set of buffers: ids, positions and logits stay bound, the past when it is the same.

    It belongs to those buffers and does not hold them, so that both go when the last past does.
    A single token into a static cache has a mask of fixed width [B, capacity], so that every shape of the step stays
    the same; all others have the mask [B, S]. `version` is that of the live weights it was bound to.
    """

    def __init__(
        self,
        decoder: ort.InferenceSession,
        embedding: ort.InferenceSession | None,
        config: HavocConfig,
        buffers: KeyValueBuffers,
        shape: tuple[int, int],
        *,
        graph_id: int | None = None,
    ) -> None:
        """Bind everything but the past of calls of `shape` [B, T].

        `graph_id` numbers the CUDA graph they are captured in; -1 keeps them out of any.
        """
        layout, (num_rows, num_new) = buffers.layout, shape
        self._decoder, self._embedding = decoder, embedding
        self._num_rows, self._num_new = shape
        self._io = decoder.io_binding()
        self._raw_io = self._io._iobinding  # noqa: SLF001 - what its wrapper adds costs as much again
        self._ids = Staged((num_rows, num_new), layout.device)
        self._positions = Staged((num_rows, num_new), layout.device)
        self._mask = Staged((num_rows, buffers.capacity), layout.device) if buffers.is_static and num_new == 1 else None
        inputs = [item.name for item in decoder.get_inputs()]
        past_names = [name for name in inputs if name.startswith("past_key_values.")]
        self._names = [(name, name.replace("past_key_values", "present", 1)) for name in past_names]
        self._device = OrtDevice.make(layout.device, 0)._get_c_device()  # noqa: SLF001
        if "position_ids" in inputs:
            self._io.bind_ortvalue_input("position_ids", self._positions.value)
        if self._mask is not None:
            self._io.bind_ortvalue_input("attention_mask", self._mask.value)
        if embedding is None:
            self._io.bind_ortvalue_input("input_ids", self._ids.value)
        else:
            embeds = np.zeros((num_rows, num_new, config.d_model), layout.dtype)
            self._bind_embedding(embedding, ort.OrtValue.ortvalue_from_numpy(embeds, layout.device, 0))
        num_logits = 1 if decoder.get_outputs()[0].shape[1] == 1 else num_new
        self._host_logits = np.zeros((num_rows, num_logits, config.vocab_size), np.float32)
        is_captured = graph_id is not None and graph_id >= 0  # then everything it touches must stay on the device
        self._logits = ort.OrtValue.ortvalue_from_numpy(self._host_logits, layout.device if is_captured else "cpu", 0)
        self._io.bind_ortvalue_output("logits", self._logits)
        self.version = 0
        self._bound_past: tuple[int, int] | None = None
        self._bound_mask: int | None = None
        self._run_options = None if graph_id is None else ort.RunOptions()
        if self._run_options is not None:
            self._run_options.add_run_config_entry("gpu_graph_id", str(graph_id))

    def bind_weights(self, live: LiveWeights) -> None:
        """Read the trained matrices from `live` in place of those that the session loaded."""
        for name, value in live.values.items():
            self._io.bind_ortvalue_input(name, value)
        self.version = live.version

    def _bind_embedding(self, embedding: ort.InferenceSession, embeds: ort.OrtValue) -> None:
        self._io.bind_ortvalue_input("inputs_embeds", embeds)
        self._embedding_io = embedding.io_binding()
        self._embedding_io.bind_ortvalue_input("input_ids", self._ids.value)
        self._embedding_io.bind_ortvalue_output("inputs_embeds", embeds)

    def run(
        self,
        buffers: KeyValueBuffers,
        past: Past,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        positions: NDArray[np.int64],
        features: ort.OrtValue,
    ) -> tuple[NDArray[np.float32], int]:
        """Logits fp32 [B, 1 or T, V] (valid until the next run) and the side of `buffers` with the new past."""
        self._ids.write(input_ids)
        self._positions.write(positions)
        self._bind_mask(buffers, mask, past.num_tokens + self._num_new)
        side = self._bind_past(buffers, past)
        if self._embedding is not None:
            self._embedding_io.bind_ortvalue_input("image_features", features)
            run(self._embedding, self._embedding_io)
        run(self._decoder, self._io, self._run_options)
        return self._host_logits if self._logits.device_name() == "cpu" else self._logits.numpy(), side

    def _bind_mask(self, buffers: KeyValueBuffers, mask: NDArray[np.int64] | None, num_total: int) -> None:
        if self._mask is not None:
            self._mask.write(np.ones((self._num_rows, num_total), np.int64) if mask is None else mask)
        elif mask is not None:
            self._io.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
            self._bound_mask = None
        elif self._bound_mask != num_total:
            dtype, shape = _ONNX_TYPES[np.int64], (self._num_rows, num_total)
            self._raw_io.bind_input("attention_mask", self._device, dtype, shape, buffers.ones.value.data_ptr())
            self._bound_mask = num_total

    def _bind_past(self, buffers: KeyValueBuffers, past: Past) -> int:
        """Bind the filled buffers as past and the others as present; a static cache is both at once."""
        side = 0 if buffers.is_static else 1 - past.side
        if self._bound_past == (past.side, past.num_tokens) or (buffers.is_static and self._bound_past is not None):
            return side
        device, dtype, bound = self._device, _ONNX_TYPES[buffers.layout.dtype], self._raw_io
        before = buffers.shape(past.num_rows, past.num_tokens)
        after = buffers.shape(past.num_rows, past.num_tokens + self._num_new)
        places = zip(self._names, buffers.pointers[past.side], buffers.pointers[side], strict=True)
        for (name, present), source, target in places:
            bound.bind_input(name, device, dtype, before, source)
            bound.bind_output(present, device, dtype, after, target)
        self._bound_past = (past.side, past.num_tokens)
        return side
