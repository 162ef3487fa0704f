"""Denormal numbers count as zero in a graph, and nowhere else."""

from __future__ import annotations

import sys
import threading

import numpy as np
import onnx
import pytest

from havoc_core.export.runtime.denormals import FlushedDenormals
from havoc_core.export.runtime.providers import open_graph, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ONNX Runtime alone decides")
DENORMAL = np.full(4, 1e-40, np.float32)


def doubled() -> bytes:
    """A graph that computes x + x."""
    kind = (onnx.TensorProto.FLOAT, [4])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
        "doubled",
        [onnx.helper.make_tensor_value_info("x", *kind)],
        [onnx.helper.make_tensor_value_info("y", *kind)],
    )
    opset = [onnx.helper.make_opsetid("", 23)]
    content: bytes = onnx.helper.make_model(graph, opset_imports=opset, ir_version=11).SerializeToString()
    return content


def answer() -> np.ndarray:
    session, _ = open_graph(
        doubled(),
        provider="CPUExecutionProvider",
        num_threads=1,
        weights={},
        packs_weights=True,
        provider_options={},
    )
    binding = session.io_binding()
    binding.bind_cpu_input("x", DENORMAL)
    binding.bind_output("y")
    run(session, binding)
    found: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return found


def test_a_graph_counts_them_as_zero_in_every_thread() -> None:
    """Also in a thread that opened no session before; afterwards each thread computes with them as before."""
    answers = [answer()]
    thread = threading.Thread(target=lambda: answers.append(answer()))
    thread.start()
    thread.join()
    assert len(answers) == 2
    assert not np.any(answers)
    assert (DENORMAL + DENORMAL > 0).all()


def test_the_mode_ends_with_an_error() -> None:
    """Whatever the call raises."""
    with pytest.raises(ValueError, match="stop"), FlushedDenormals():
        assert (DENORMAL + DENORMAL == 0).all()
        raise ValueError("stop")
    assert (DENORMAL + DENORMAL > 0).all()
