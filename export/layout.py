"""The tensors of an artifact's data file, with their form and position.

The layout depends only on the configuration and the structure, so it is known before any weight is read. So the graph
has the same bytes for every mixture of one structure, the data file can be written front to back, one tensor at a time,
and a table that two graphs use (the tied embedding, the scales of its two readers) is on disk once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..errors import HavocError
from ..model.structure import BlockFormat
from ..model.tensors import EMBEDDING, HEAD, VISION_PROJECTION, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..model.config import HavocConfig
    from ..model.structure import Structure

DATA_FILE = "model.onnx.data"
ROPE_COS = "rope.cos_cache"
ROPE_SIN = "rope.sin_cache"

PAGE_BYTES = 4096
"""Large tensors start on a page, so that the runtime maps them in place."""
_CACHE_LINE_BYTES = 64

Form = Literal["plain", "transposed", "blocks", "factors"]
"""`plain`: as in the base; `transposed`: [K, N] for MatMul; `blocks`: quantized rows with their scales; `factors`: two
matrices with the tensor as their product, each with its own form."""

MatrixFormat = BlockFormat | Literal["float32", "float16"]
"""How one tensor is stored: in blocks, or whole in a dtype of NumPy's."""

ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """One named tensor of the graph: `shape`, NumPy `dtype`, and its place in the data file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the data file."""
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One tensor of the base (`source` is its Hugging Face name) and the initializers that hold it.

    A projection [M, N] of truncated rank r has two factors, `_in` [r, N] and `_out` [M, r], and their initializers.
    `blocks` says how a matrix in the form of blocks is stored.
    """

    source: str
    source_shape: tuple[int, ...]
    form: Form
    initializers: tuple[Initializer, ...]
    factors: tuple[StoredWeight, ...] = ()
    blocks: BlockFormat | None = None


@dataclass(frozen=True)
class Layout:
    """Every stored weight in file order; offsets are strictly increasing and do not overlap."""

    weights: tuple[StoredWeight, ...]

    def __getitem__(self, source: str) -> StoredWeight:
        """The stored weight of one source tensor; `KeyError` when the layout has none."""
        return next(weight for weight in self.weights if weight.source == source)

    def __contains__(self, source: object) -> bool:
        """Whether a source tensor is stored."""
        return any(weight.source == source for weight in self.weights)

    @property
    def num_factored(self) -> int:
        """How many projections are stored as two factors."""
        return sum(weight.form == "factors" for weight in self.weights)

    @property
    def num_bytes(self) -> int:
        """Size of the data file."""
        return max(item.offset_bytes + item.num_bytes for item in self.initializers())

    def initializers(self) -> Iterator[Initializer]:
        """All initializers in file order."""
        for weight in self.weights:
            yield from weight.initializers


def plan_layout(config: HavocConfig, structure: Structure, formats: Mapping[str, MatrixFormat] | None = None) -> Layout:
    """Lay out the data file of `config` stored as `structure`, single matrices by name as `formats` says.

    A structure that says fp32 and would store fp16 is refused.
    """
    if structure.weight_format == "fp32" and structure.activation_dtype == "fp16":
        raise HavocError("fp32 weights under fp16 activations would be rounded to fp16: ask for --weights fp16")
    shapes: dict[str, tuple[int, ...]] = dict(tensor_shapes(config))
    half = config.attention.head_dim // 2
    shapes[ROPE_COS] = shapes[ROPE_SIN] = (config.max_seq_len, half)
    weights: list[StoredWeight] = []
    end_bytes = 0
    for source, shape in shapes.items():
        form = (formats or {}).get(source) or _format(source, shape, structure)
        weight, end_bytes = _place(source, shape, structure, form, end_bytes)
        weights.append(weight)
    return Layout(tuple(weights))


def promoted_layout(config: HavocConfig, structure: Structure, promoted: Sequence[str]) -> Layout:
    """The layout of mixed bits with these matrices in int8."""
    return plan_layout(config, structure, dict.fromkeys(promoted, structure.promoted_blocks))


def _place(
    source: str, shape: tuple[int, ...], structure: Structure, stored_as: MatrixFormat, end_bytes: int
) -> tuple[StoredWeight, int]:
    rank = structure.kept_rank(source, shape)
    if rank is None:
        return _place_whole(source, shape, stored_as, end_bytes)
    num_rows, num_columns = shape
    first, end_bytes = _place_whole(f"{source}_in", (rank, num_columns), stored_as, end_bytes)
    second, end_bytes = _place_whole(f"{source}_out", (num_rows, rank), stored_as, end_bytes)
    weight = StoredWeight(
        source=source,
        source_shape=shape,
        form="factors",
        initializers=(*first.initializers, *second.initializers),
        factors=(first, second),
    )
    return weight, end_bytes


def _place_whole(
    source: str, shape: tuple[int, ...], stored_as: MatrixFormat, end_bytes: int
) -> tuple[StoredWeight, int]:
    form = _form(source, shape, stored_as)
    blocks = stored_as if isinstance(stored_as, BlockFormat) else None
    placed: list[Initializer] = []
    for name, dtype, stored_shape in _parts(source, shape, form, stored_as):
        item = Initializer(name=name, dtype=dtype, shape=stored_shape, offset_bytes=0)
        unit = PAGE_BYTES if item.num_bytes >= PAGE_BYTES else _CACHE_LINE_BYTES
        offset_bytes = -(-end_bytes // unit) * unit
        placed.append(replace(item, offset_bytes=offset_bytes))
        end_bytes = offset_bytes + item.num_bytes
    weight = StoredWeight(source=source, source_shape=shape, form=form, initializers=tuple(placed), blocks=blocks)
    return weight, end_bytes


def _format(source: str, shape: tuple[int, ...], structure: Structure) -> MatrixFormat:
    """How the structure stores a tensor: matrices in its weight format, the rest in the activations' type."""
    is_matrix = len(shape) == 2 and source not in {ROPE_COS, ROPE_SIN}  # noqa: PLR2004 - a matrix has two dimensions
    if is_matrix and structure.is_quantized and source != VISION_PROJECTION:
        return structure.blocks_of(source, shape[1])
    is_half = structure.activation_dtype == "fp16" or (is_matrix and structure.weight_format == "fp16")
    return "float16" if is_half else "float32"


def _form(source: str, shape: tuple[int, ...], stored_as: MatrixFormat) -> Form:
    if isinstance(stored_as, BlockFormat):
        return "blocks"
    is_table = source in {EMBEDDING, HEAD, ROPE_COS, ROPE_SIN}
    return "plain" if is_table or len(shape) != 2 else "transposed"  # noqa: PLR2004 - a matrix has two dimensions


def _parts(
    source: str, shape: tuple[int, ...], form: Form, stored_as: MatrixFormat
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each initializer of one source tensor."""
    if isinstance(stored_as, BlockFormat):
        return _block_parts(source, (shape[0], shape[1]), stored_as)
    return [(source, stored_as, shape[::-1] if form == "transposed" else shape)]


def _block_parts(source: str, shape: tuple[int, int], blocks: BlockFormat) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of values, scales and zeros of a matrix stored in blocks."""
    rows, columns = shape
    if blocks.is_w8a8:
        return [(f"{source}_int8", "int8", (columns, rows)), (f"{source}_scales", "float32", (rows,))]
    num_blocks, num_bits = blocks.num_blocks(columns), blocks.num_bits
    floats = "float16" if blocks.scale_bytes == 2 else "float32"  # noqa: PLR2004 - fp16
    values = (f"{source}_Q{num_bits}", "uint8", (rows, num_blocks, blocks.block_size * num_bits // 8))
    scales = (f"{source}_scales", floats, (rows, num_blocks))
    points = (f"{source}_zero_points", "uint8", (rows, -(-num_blocks * num_bits // 8)))
    minimums = (f"{source}_minimums", floats, (rows, num_blocks))
    return [values, scales, *{"middle": [], "points": [points], "minimums": [minimums]}[blocks.zeros]]
