"""OpenVINO: a folder with `openvino_model.xml` as optimum-intel exports it, with the cache in the model's state.

The runtime itself runs the model, one greedy token after another, without the pipeline of openvino-genai; as there, the
head reads the last token only. The runtime chooses the precision of activations and cache for the processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "openvino"


class OpenVinoModel:
    """A compiled model; each prompt starts with an empty state."""

    is_own_process = True

    def __init__(self, request: Any, names: frozenset[str]) -> None:  # noqa: ANN401 - of another package
        self._request = request
        self._names = names

    def generate(self, ids: list[int], num_tokens: int) -> Iterator[int]:
        """Yield greedy tokens."""
        self._request.reset_state()
        next_ids, num_read = ids, 0
        for _ in range(num_tokens):
            logits = self._read(next_ids, num_read)
            num_read += len(next_ids)
            next_ids = [int(logits.argmax())]
            yield next_ids[0]

    def next_logits(self, ids: list[int], num_ids: int) -> Any:  # noqa: ANN401, ARG002 - an array
        """Logits of the next token [V]."""
        self._request.reset_state()
        return self._read(ids, 0).copy()

    def _read(self, ids: list[int], num_read: int) -> Any:  # noqa: ANN401 - an array
        """Logits [V] after further ids; `num_read` ids were read before."""
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, num_read + len(ids)), np.int64),
            "position_ids": np.arange(num_read, num_read + len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._names})
        return self._request.get_tensor("logits").data[0, -1]


def prepare() -> None:
    """Import the package before the clock starts, so the time of loading a model does not include it."""
    import openvino  # noqa: F401


def open_model(path: str, *, num_threads: int, capacity: int) -> OpenVinoModel:  # noqa: ARG001 - its state grows
    """Open a folder on the CPU; a model that keeps its cache outside its state is a `ValueError`."""
    import openvino

    core = openvino.Core()
    model = core.read_model(Path(path) / "openvino_model.xml")
    names = frozenset(name for put in model.inputs for name in put.names)
    if stray := sorted(name for name in names if "past" in name):
        raise ValueError(f"{stray[0]} is an input: export the model with its cache in the state, as optimum-intel does")
    read_last_only(model)
    options = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY"}
    return OpenVinoModel(core.compile_model(model, "CPU", options).create_infer_request(), names)


def read_last_only(model: Any) -> None:  # noqa: ANN401 - of another package
    """Let the head compute the logits of the last token only, if the head is one product, as in a decoder it is."""
    from openvino import opset13

    head = model.output("logits").node.input_value(0).get_node()
    if head.get_type_name() == "MatMul":
        last = opset13.gather(head.input_value(0), np.array([-1]), 1)
        head.input(0).replace_source_output(last.output(0))
