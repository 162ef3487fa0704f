"""One ONNX graph in construction: nodes in order, inputs, and initializers that point into the data file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from .layout import DATA_FILE, Initializer, Layout, StoredWeight

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ..model.structure import BlockFormat, Structure

OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"
ACCURACY_LEVELS: dict[str, int] = {"fp32": 1, "int8": 4, "w8a8": 4}
"""The accuracy with which MatMulNBits multiplies fp32 activations on the CPU, by the structure's compute type.

At level 4 it rounds them to int8, block by block: int8 and int4 weights decode several times faster, and logits of the
trained nano move by 2 % of their spread with int8 weights, by 6 % with int4 ones, whose own loss is 17 %.
"""

Attribute = int | float | str | list[int] | ir.TensorProtocol
Dimensions = list[int | str]

_IR_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}


class GraphTape:
    """One graph in construction: its tape of nodes, its inputs, and the initializers used so far."""

    def __init__(self, structure: Structure, layout: Layout, *, replaceable: Collection[str] = ()) -> None:
        """`replaceable` names initializers that are inputs too; their stored values are what counts by default."""
        self.structure = structure
        self.layout = layout
        self._replaceable = frozenset(replaceable)
        self.activation = ir.DataType.FLOAT16 if structure.activation_dtype == "fp16" else ir.DataType.FLOAT
        self.inputs: list[ir.Value] = []
        self._tape = Tape()
        self._initializers: dict[str, ir.Value] = {}
        self._casts: dict[str, ir.Value] = {}
        self._centres: dict[str, ir.Value] = {}
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._steps: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dimensions) -> ir.Value:
        """Declare a graph input."""
        value = ir.val(name, dtype, shape)
        self.inputs.append(value)
        return value

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        output: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Append one node with one output; `name` names the node and, unless `output` does, the value."""
        value = ir.val(output or name)
        return self._tape.op(op_type, inputs, attributes, domain=domain, name=f"/{name}", output=value)

    def ops(
        self,
        name: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        """Append one node with several outputs; one named "" is not wanted."""
        values = [ir.val(output) for output in outputs]
        return self._tape.op_multi_out(op_type, inputs, attributes, domain=domain, outputs=values, name=f"/{name}")

    def constant(self, name: str, value: int | Sequence[int]) -> ir.Value:
        """An int64 scalar or vector kept inside the graph file."""
        return self._initializer(f"const.{name}", ir.tensor(np.asarray(value, dtype=np.int64), name=f"const.{name}"))

    def stored(self, weight: StoredWeight) -> list[ir.Value]:
        """The initializers of one stored weight, as references into the data file."""
        return [self._initializer(item.name, _reference(item)) for item in weight.initializers]

    def part(self, source: str, index: int = 0) -> ir.Value:
        """One initializer: its only one, or of a quantized weight the blocks (0), scales (1) or zero points (2)."""
        item = self.layout[source].initializers[index]
        return self._initializer(item.name, _reference(item))

    def reshaped(self, source: str, index: int, name: str, shape: tuple[int, ...]) -> ir.Value:
        """A second name for the same bytes of one initializer in another shape."""
        item = self.layout[source].initializers[index]
        same = Initializer(name=name, dtype=item.dtype, shape=shape, offset_bytes=item.offset_bytes)
        return self._initializer(name, _reference(same))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            shape = ir.Shape(tensor.shape.numpy())
            kind = ir.TensorType(tensor.dtype)
            self._initializers[name] = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        return self._initializers[name]

    def linear(self, name: str, x: ir.Value, source: str, *, output: str = "") -> ir.Value:
        """`x W^T` for a stored weight [out, in], in the form of the layout."""
        weight = self.layout[source]
        *firsts, last = weight.factors or (weight,)
        for factor in firsts:
            x = self._product(f"{name}/in", x, factor)
        return self._product(name, x, last, output=output)

    def _product(self, name: str, x: ir.Value, weight: StoredWeight, *, output: str = "") -> ir.Value:
        if weight.blocks is not None:
            return self._block_product(name, x, weight, weight.blocks, output=output)
        (stored,) = self.stored(weight)
        matrix = self.as_activation(stored)
        if weight.form == "plain":  # a table that is also gathered by row: used in place, never transposed into a copy
            return self.op(name, "FusedMatMul", [x, matrix], domain=CONTRIB, output=output, transB=1)
        return self.op(name, "MatMul", [x, matrix], output=output)

    def _block_product(
        self, name: str, x: ir.Value, weight: StoredWeight, blocks: BlockFormat, *, output: str
    ) -> ir.Value:
        """MatMulNBits; blocks with minimums are centred, and sums of activations add the difference."""
        if blocks.is_w8a8:
            return self._integer_product(name, x, weight, output=output)
        rows, columns = weight.source_shape
        level = {"accuracy_level": ACCURACY_LEVELS[self.structure.compute]} if self.structure.has_compute else {}
        sizes = {"K": columns, "N": rows, "bits": blocks.num_bits, "block_size": blocks.block_size, **level}
        if blocks.zeros != "minimums":
            inputs = [x, *self.block_parts(weight)]
            return self.op(name, "MatMulNBits", inputs, domain=CONTRIB, output=output, **sizes)
        values, scales, _ = self.block_parts(weight)
        centred = self.op(f"{name}/centred", "MatMulNBits", [x, values, scales], domain=CONTRIB, **sizes)  # type: ignore[arg-type]
        sums, centres = self._block_sums(name, x, columns, blocks), self.centres(weight)
        moved = self.op(f"{name}/moved", "FusedMatMul", [sums, centres], domain=CONTRIB, transB=1)
        return self.op(name, "Add", [centred, moved], output=output)

    def _integer_product(self, name: str, x: ir.Value, weight: StoredWeight, *, output: str) -> ir.Value:
        """W8A8: int8 steps of x by int8 weights, summed as integers, times the scales of channel and token.

        MatMulIntegerToFloat takes one scale for all of x, so each row is divided by its largest value first.
        """
        steps, largest = self._row_steps(name, x)
        values, scales = self.stored(weight)
        inputs = [steps, values, self._step(), scales, self._middle()]
        product = self.op(f"{name}/unscaled", "MatMulIntegerToFloat", inputs, domain=CONTRIB)
        return self.op(name, "Mul", [product, largest], output=output)

    def _row_steps(self, name: str, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rows of x [B, T, K] in 127 steps of their largest value [B, T, 1], as uint8 around 128.

        Products that read the same x share them. A row of zeros is divided by the smallest number instead.
        """
        if x not in self._steps:
            absolute = self.op(f"{name}/absolute", "Abs", [x])
            largest = self.op(f"{name}/largest", "ReduceMax", [absolute, self.constant("last_axis", [2])], keepdims=1)
            largest = self.op(f"{name}/divisor", "Max", [largest, self._float("tiny", np.finfo(np.float32).tiny)])
            shares = self.op(f"{name}/shares", "Div", [x, largest])
            steps = self.op(f"{name}/steps", "QuantizeLinear", [shares, self._step(), self._middle()])
            self._steps[x] = steps, largest
        return self._steps[x]

    def _step(self) -> ir.Value:
        return self._float("int8_step", np.float32(1) / np.float32(127))

    def _middle(self) -> ir.Value:
        return self._initializer("const.int8_middle", ir.tensor(np.uint8(128), name="const.int8_middle"))

    def _float(self, name: str, value: np.floating[Any]) -> ir.Value:
        return self._initializer(f"const.{name}", ir.tensor(np.float32(value), name=f"const.{name}"))

    def _block_sums(self, name: str, x: ir.Value, num_columns: int, blocks: BlockFormat) -> ir.Value:
        """Sums [..., G] of the activations that meet one block; products that read the same x share them."""
        key = (x, blocks.block_size)
        if key not in self._sums:
            if padding := -num_columns % blocks.block_size:
                pads, last = self.constant(f"pad_{padding}", [0, padding]), self.constant("last_axis", [2])
                x = self.op(f"{name}/padded", "Pad", [x, pads, None, last])
            shape = self.constant(f"blocks_{blocks.num_blocks(num_columns)}", [0, 0, -1, blocks.block_size])
            cut = self.op(f"{name}/blocks", "Reshape", [x, shape])
            sums = self.op(f"{name}/sums", "ReduceSum", [cut, self.constant("block_axis", [3])], keepdims=0)
            self._sums[key] = sums
        return self._sums[key]

    def block_parts(self, weight: StoredWeight) -> list[ir.Value]:
        """Values, scales and zeros of a matrix in blocks, floats as activations are; the runtime casts them once."""
        parts = self.stored(weight)
        return [part if part.dtype == ir.DataType.UINT8 else self.as_activation(part) for part in parts]

    def centres(self, weight: StoredWeight) -> ir.Value:
        """The meaning of each block's middle value, m + 2^(bits-1) d: [N, G], computed once by the runtime."""
        if weight.source not in self._centres:
            _, scales, minimums = self.block_parts(weight)
            middle = ir.tensor(np.float32(8), name="const.middle")
            if self.activation == ir.DataType.FLOAT16:
                middle = ir.tensor(np.float16(8), name="const.middle")
            lifted = self.op(f"{weight.source}.lifted", "Mul", [scales, self._initializer("const.middle", middle)])
            self._centres[weight.source] = self.op(f"{weight.source}.centres", "Add", [minimums, lifted])
        return self._centres[weight.source]

    def as_activation(self, value: ir.Value) -> ir.Value:
        """Floats in the activations' type; the runtime casts stored ones when it opens the graph."""
        if value.dtype == self.activation:
            return value
        name = f"{value.name}.cast"
        if name not in self._casts:
            self._casts[name] = self.op(name, "Cast", [value], to=int(self.activation))
        return self._casts[name]

    def typed(self, value: ir.Value, dtype: ir.DataType, shape: Dimensions) -> ir.Value:
        """Declare dtype and shape of an output value."""
        value.dtype = dtype
        value.shape = ir.Shape(shape)
        return value

    def finish(self, name: str, outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished model; the producer is HAVOC, without version, date or path."""
        nodes = list(self._tape.nodes)
        opsets = {"": OPSET}
        if any(node.domain == CONTRIB for node in nodes):
            opsets[CONTRIB] = 1
        replaceable = [value for name, value in self._initializers.items() if name in self._replaceable]
        graph = ir.Graph(
            [*self.inputs, *replaceable],
            list(outputs),
            nodes=nodes,
            initializers=list(self._initializers.values()),
            opset_imports=opsets,
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="havoc")


def _reference(item: Initializer) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA_FILE, item.offset_bytes, item.num_bytes, _IR_TYPES[item.dtype], shape=ir.Shape(item.shape), name=item.name
    )
