"""A graph as it was written, changed in memory in one respect, so that a proof can look at more than it answers.

The bytes that ship are what is changed: what is wrong with them is wrong with the variant.
"""

from __future__ import annotations

import onnx

from .tape import CONTRIB

_LAST_POSITION = "/last_position"


def with_all_logits(graph: bytes) -> bytes:
    """Compute the logits of every position of unpadded rows; a graph that does so already is given back."""
    model = onnx.load_from_string(graph)
    found = [node for node in model.graph.node if node.name == _LAST_POSITION]
    if not found:
        return graph
    (gather,) = found
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == gather.output[0]:
                node.input[index] = gather.input[0]
    model.graph.node.remove(gather)
    _drop_unread(model.graph)
    (logits,) = [output for output in model.graph.output if output.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence"
    return bytes(model.SerializeToString())


def with_exact_products(graph: bytes) -> bytes:
    """Multiply quantized weights by activations as they are: accuracy level 0 in place of one that rounds them.

    A W8A8 product becomes one of the activations before they were rounded with the weights that the integers stand for.
    """
    model = onnx.load_from_string(graph)
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in list(model.graph.node):
        if node.domain == CONTRIB and node.op_type == "MatMulIntegerToFloat":
            steps, values, _, scales, _ = node.input
            whole, exact = f"{values}.float", f"{values}.exact"  # DequantizeLinear would become a rounding MatMulNBits
            cast = onnx.helper.make_node("Cast", [values], [whole], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, onnx.helper.make_node("Mul", [whole, scales], [exact]))
            model.graph.node.insert(0, cast)
            node.CopyFrom(onnx.helper.make_node("MatMul", [rounded[steps], exact], node.output, node.name))
        if node.domain == CONTRIB and node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
    return bytes(model.SerializeToString())


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs nothing reads, again and again: what only chose the position goes with it."""
    outputs = {output.name for output in graph.output}
    while True:
        read = outputs | {name for node in graph.node for name in node.input}
        unread = [node for node in graph.node if not read & {name for name in node.output if name}]
        if not unread:
            return
        for node in unread:
            graph.node.remove(node)
