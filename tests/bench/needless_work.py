"""An artifact that computes more than it needs, by a known share, and answers the same.

Loaded with `runpy`, because tests are no package.

Some products of the graph are computed once more, of twice their input so that no optimizer takes both for one, and
added to the first times zero. Who is asked for 5 % gets the smallest set of matrices, the largest first, that is no
less.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def products(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, int]]:
    """Return every product with a stored matrix, and the number of its weights."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return [(node, sizes[node.input[1]]) for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes]


def with_needless_work(artifact: Path, out: Path, share: float) -> float:
    """Write a copy of an fp32 artifact whose products do `share` more work; return the share that it came to."""
    shutil.copytree(artifact, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    graph, found = model.graph, products(model.graph)
    total, extra = sum(size for _, size in found), 0
    for name, value in (("needless/two", 2.0), ("needless/zero", 0.0)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    for node, size in sorted(found, key=lambda pair: -pair[1]):
        left = share * total - extra
        if left <= 0:
            break
        if size > left and any(size > other >= left for _, other in found):
            continue  # a smaller one is enough
        extra += size
        _repeat(graph, node)
    del graph.value_info[:]
    data = model.SerializeToString()
    (out / "model.onnx").write_bytes(data)
    document = json.loads((out / "manifest.json").read_text())
    document["files"]["model.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    (out / "manifest.json").write_text(json.dumps(document))
    return extra / total


def _repeat(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Compute one product a second time, to no effect."""
    name, place = node.output[0], list(graph.node).index(node)
    node.output[0] = f"needless/{name}/once"
    added = [
        helper.make_node("Mul", [node.input[0], "needless/two"], [f"needless/{name}/input"]),
        helper.make_node("MatMul", [f"needless/{name}/input", node.input[1]], [f"needless/{name}/again"]),
        helper.make_node("Mul", [f"needless/{name}/again", "needless/zero"], [f"needless/{name}/nothing"]),
        helper.make_node("Add", [node.output[0], f"needless/{name}/nothing"], [name]),
    ]
    for offset, new in enumerate(added, start=1):
        graph.node.insert(place + offset, new)
