"""The properties that change the cost of a model but not its function: format of weights, type of activations."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

WeightFormat = Literal["fp32", "fp16", "int8", "int4", "keep"]
ActivationDtype = Literal["fp32", "fp16"]
Quantizer = Literal["rtn", "hqq", "k_quant", "gptq"]
Compute = Literal["fp32", "int8", "w8a8"]

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("fp32", "fp16", "int8", "int4")
"""Formats for any model; in addition there is `keep`: a GGUF file's own blocks, for a base without experts."""
ACTIVATION_DTYPES: tuple[ActivationDtype, ...] = ("fp32", "fp16")
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "hqq", "k_quant", "gptq")
"""How values and scales are chosen: round to nearest, half-quadratic, llama.cpp's weighted least squares, or so that
the columns that follow make up for what a column loses on a calibration text."""

COMPUTES: tuple[Compute, ...] = ("fp32", "int8", "w8a8")
"""What fp32 activations are rounded to inside a quantized product: not at all; to int8, in blocks; or to int8 with one
scale a token, so that sums over whole rows are sums of integers (W8A8)."""

BITS_PER_WEIGHT: dict[WeightFormat, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "keep": 4}
"""Bits of the values only; for kept blocks, which may be larger, the least."""

Zeros = Literal["middle", "points", "minimums"]


@dataclass(frozen=True)
class BlockFormat:
    """How one integer matrix is stored: rows cut into blocks of `block_size` values of `num_bits`, a scale d for each.

    A stored value q means d (q - 2^(bits-1)) if `zeros` is `middle`, d (q - z) if it is `points` (integers with the
    same number of bits), and d q + m if it is `minimums` (floats like the scales). `is_w8a8` means whole rows for
    products of integers: q - 128 is stored as int8, transposed.
    """

    num_bits: int
    block_size: int = 32
    zeros: Zeros = "middle"
    scale_bytes: int = 4
    is_w8a8: bool = False

    def num_blocks(self, num_columns: int) -> int:
        """Blocks in a row, the last one padded."""
        return -(-num_columns // self.block_size)

    def matrix_bytes(self, num_rows: int, num_columns: int) -> int:
        """Bytes of one stored matrix; the zero points of a row are packed like its values."""
        num_blocks = self.num_blocks(num_columns)
        beside = {"middle": 0, "points": -(-num_blocks * self.num_bits // 8), "minimums": num_blocks * self.scale_bytes}
        values = num_blocks * self.block_size * self.num_bits // 8
        return num_rows * (values + num_blocks * self.scale_bytes + beside[self.zeros])

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes with its share of scale and zero, in rows of whole blocks."""
        beside = {"middle": 0, "points": self.num_bits, "minimums": 8 * self.scale_bytes}
        return self.num_bits + (8 * self.scale_bytes + beside[self.zeros]) / self.block_size


@dataclass(frozen=True)
class Structure:
    """One choice of formats. Integer weights come in blocks of `block_size` that share one scale.

    Symmetric blocks have the zero point in the middle of the range; other blocks have their own. `rank_fraction` below
    1 stores each projection of the layers as two factors with that share of its directions. `compute` is the type that
    activations are rounded to inside a product with integer weights; `auto` becomes int8, the fast one, or fp32 if the
    weights or the activations allow nothing else. `average_bits` stores the most sensitive matrices of int4 weights as
    int8, as long as all matrices together take at most that many bits per weight, scales included.
    """

    weight_format: WeightFormat = "fp32"
    activation_dtype: ActivationDtype = "fp32"
    block_size: int = 32
    is_symmetric: bool = True
    quantizer: Quantizer = "rtn"
    rank_fraction: float = 1.0
    compute: Compute | Literal["auto"] = "auto"
    average_bits: float | None = None

    def __post_init__(self) -> None:
        if self.compute == "auto":
            object.__setattr__(self, "compute", self._fast_compute())
        if self.weight_format not in (*WEIGHT_FORMATS, "keep"):
            raise HavocError(
                f"unknown weight format {self.weight_format!r}; known are {', '.join(WEIGHT_FORMATS)} and keep"
            )
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise HavocError(
                f"unknown activation dtype {self.activation_dtype!r}; known are {', '.join(ACTIVATION_DTYPES)}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise HavocError(f"block_size must be 16, 32, 64, 128 or 256, not {self.block_size!r}")
        if self.quantizer not in QUANTIZERS:
            raise HavocError(f"unknown quantizer {self.quantizer!r}; known are {', '.join(QUANTIZERS)}")
        if type(self.rank_fraction) not in {int, float} or not 0 < self.rank_fraction <= 1:
            raise HavocError(f"the share of the rank to keep must be above 0 and at most 1, not {self.rank_fraction!r}")
        self._check_compute()
        self._check_quantizer()
        self._check_mixed()

    def _fast_compute(self) -> Compute:
        """The meaning of `auto`: only here the default is decided."""
        return "int8" if self.is_quantized and self.activation_dtype == "fp32" else "fp32"

    def _check_compute(self) -> None:
        if self.compute not in COMPUTES:
            raise HavocError(f"products compute in {', '.join(COMPUTES)}, not {self.compute!r}")
        if self.compute != "fp32" and not self.is_quantized:
            raise HavocError(
                f"{self.weight_format} weights compute in fp32: {self.compute} compute needs integer weights"
            )
        if self.compute != "fp32" and self.activation_dtype != "fp32":
            raise HavocError(
                f"{self.compute} compute rounds fp32 activations: leave it out, or ask for fp32 activations"
            )
        if self.is_w8a8 and (self.weight_format, self.is_symmetric, self.quantizer) != ("int8", True, "rtn"):
            raise HavocError("w8a8 compute needs int8 weights in symmetric blocks, rounded to nearest (rtn)")
        if self.is_w8a8 and self.rank_fraction != 1:
            raise HavocError("w8a8 compute works on whole matrices: leave out the share of the rank")

    def _check_quantizer(self) -> None:
        if self.weight_format == "keep" and (named := self._blocks_asked_for()):
            raise HavocError(f"kept blocks come from the file: leave out {named}, or take int8 or int4")
        if self.weight_format == "keep" and self.rank_fraction != 1:
            raise HavocError("kept blocks belong to whole matrices: leave out the share of the rank")
        if not self.is_quantized and (named := self._blocks_asked_for()):
            raise HavocError(f"{self.weight_format} weights have no blocks: leave out {named}, or take int8 or int4")
        if self.quantizer in {"hqq", "gptq"} and self.weight_format != "int4":
            other = "use rtn or k_quant"
            raise HavocError(f"the quantizer {self.quantizer} makes int4 weights, not {self.weight_format}; {other}")
        if self.quantizer in {"hqq", "k_quant"} and self.is_symmetric:
            raise HavocError(f"the quantizer {self.quantizer} chooses zero points: ask for asymmetric blocks as well")
        if self.is_calibrated and self.rank_fraction != 1:
            raise HavocError("gptq and mixed bits work on whole matrices: leave out the share of the rank")

    def _check_mixed(self) -> None:
        if self.average_bits is None:
            return
        if self.weight_format != "int4":
            raise HavocError(f"{self.weight_format} weights cannot be mixed: an average of bits needs int4 weights")
        least, most = self.blocks.bits_per_weight, self.promoted_blocks.bits_per_weight
        if type(self.average_bits) not in {int, float} or not least <= self.average_bits <= most:
            here = f"{self.average_bits!r} bits per weight"
            raise HavocError(f"{here}: these blocks take {least:g} with only int4 and {most:g} with only int8")

    def _blocks_asked_for(self) -> str:
        """The non-default options of the blocks, in words."""
        size = [] if self.block_size == _DEFAULTS["block_size"] else [f"block size {self.block_size}"]
        symmetry = [] if self.is_symmetric else ["asymmetric blocks"]
        quantizer = [] if self.quantizer == _DEFAULTS["quantizer"] else [f"the quantizer {self.quantizer}"]
        return " and ".join([*size, *symmetry, *quantizer])

    @classmethod
    def named(cls, name: str, activation_dtype: ActivationDtype = "fp32") -> Self:
        """The structure with that name, such as `int4a-hqq-b64-r0.50`; `activation_dtype` if the name leaves it out."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise HavocError(
                f"unknown structure {name!r}; a name is a weight format ({', '.join(WEIGHT_FORMATS)}) with its "
                "non-default options, such as int4-b64, int4-gptq-mix5.0 or int8-r0.50"
            )
        return cls(
            found["weights"],  # type: ignore[arg-type]
            found["activations"] or activation_dtype,  # type: ignore[arg-type]
            int(found["block"] or _DEFAULTS["block_size"]),
            not found["asymmetric"],
            (found["quantizer"] or "rtn").replace("-", "_"),  # type: ignore[arg-type]
            float(found["rank"] or 1),
            found["compute"] or "auto",  # type: ignore[arg-type]
            None if found["mixed"] is None else float(found["mixed"]),
        )

    @classmethod
    def from_fields(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_fields` wrote, values as they were or as text; a damaged one is a `HavocError`.

        Fields without `compute` are of a version in which int8 weights computed in int8 and int4 weights in fp32.
        """
        try:
            unknown = sorted(set(document) - set(_DEFAULTS))
            if unknown:
                raise HavocError(f"a structure has no {', '.join(unknown)}")
            weight_format = document["weight_format"]
            return cls(
                weight_format,
                document["activation_dtype"],
                int(document["block_size"]),
                {"True": True, "False": False}[str(document.get("is_symmetric", True))],
                document.get("quantizer", "rtn"),
                float(document.get("rank_fraction", 1.0)),
                document.get("compute") or ("fp32" if weight_format == "int4" else "auto"),
                None if document.get("average_bits") is None else float(document["average_bits"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise HavocError(
                f"the structure {dict(document)} cannot be read ({type(error).__name__}: {error})"
            ) from error

    def to_fields(self) -> dict[str, Any]:
        """Name every choice: formats and block size always, the others if they are not the default.

        `compute` is named if there is a choice.
        """
        document = asdict(self)
        always = (*_ALWAYS, "compute") if self.has_compute else _ALWAYS
        return {
            name: document[name]
            for name in document
            if name in always or (name != "compute" and document[name] != _DEFAULTS[name])
        }

    @property
    def description(self) -> str:
        """The structure in words: `int4 weights (asymmetric blocks of 64, hqq), fp32 activations`."""
        if self.weight_format == "keep":
            compute = f" computed in {self.compute}" if self.has_compute else ""
            return f"the weights of the file as they are, {self.activation_dtype} activations{compute}"
        symmetry = "symmetric" if self.is_symmetric else "asymmetric"
        mixed = "" if self.average_bits is None else f", int8 up to {self.average_bits:g} bits per weight"
        blocks = f" ({symmetry} blocks of {self.block_size}, {self.quantizer}{mixed})" if self.is_quantized else ""
        if self.is_w8a8:
            blocks = f" (one scale per output channel, tables in blocks of {self.block_size})"
        rank = "" if self.rank_fraction == 1 else f", {self.rank_fraction:g} of the rank"
        compute = f" computed in {self.compute}" if self.has_compute else ""
        return f"{self.weight_format} weights{blocks}, {self.activation_dtype} activations{compute}{rank}"

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are integers with scales; of kept ones that may be."""
        return self.weight_format in {"int8", "int4", "keep"}

    @property
    def blocks(self) -> BlockFormat:
        """The default storage of integer matrices: for gptq with scales in fp16, as in GGUF.

        Only for a structure with integer weights; for kept blocks the smallest possible.
        """
        is_half = self.activation_dtype == "fp16" or self.quantizer == "gptq" or self.weight_format == "keep"
        zeros: Zeros = "middle" if self.is_symmetric else "minimums" if self.quantizer == "gptq" else "points"
        return BlockFormat(BITS_PER_WEIGHT[self.weight_format], self.block_size, zeros, 2 if is_half else 4)

    def blocks_of(self, name: str, num_columns: int) -> BlockFormat:
        """How the integer matrix `name` [M, num_columns] is stored: as `blocks`, projections for W8A8 in whole rows."""
        if self.is_w8a8 and name.endswith("_proj.weight"):
            return BlockFormat(8, num_columns, is_w8a8=True)
        return self.blocks

    @property
    def is_w8a8(self) -> bool:
        """Whether projections multiply int8 by int8, with one scale per token and one an output channel."""
        return self.compute == "w8a8"

    @property
    def promoted_blocks(self) -> BlockFormat:
        """How the sensitive matrices of mixed bits are stored: in int8."""
        return BlockFormat(8, self.block_size, "middle", self.blocks.scale_bytes)

    @property
    def is_calibrated(self) -> bool:
        """Whether a text decides how weights are stored."""
        return self.quantizer == "gptq" or self.average_bits is not None

    @property
    def has_compute(self) -> bool:
        """Whether `compute` is a choice: integer weights under fp32 activations."""
        return self.is_quantized and self.activation_dtype == "fp32"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation, one scale, or one cached key value."""
        return 4 if self.activation_dtype == "fp32" else 2

    def kept_rank(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Directions r = ceil(rank_fraction min(M, N)) kept of the tensor `name` [M, N]; None if it stays whole.

        Only the layers' projections are factored, and only below break-even, r (M + N) < M N; integer rows are counted
        with the padding of their last block.
        """
        if self.rank_fraction == 1 or not name.endswith("_proj.weight"):
            return None
        num_rows, num_columns = shape
        rank = max(math.ceil(round(self.rank_fraction * min(shape), 9)), 1)
        factored = num_rows * self._stored_length(rank) + rank * self._stored_length(num_columns)
        return rank if factored < num_rows * self._stored_length(num_columns) else None

    def _stored_length(self, num_columns: int) -> int:
        return -(-num_columns // self.block_size) * self.block_size if self.is_quantized else num_columns

    def __str__(self) -> str:
        """Name the structure as tables and file names do: `int4-fp32`, `int4-gptq-mix5.0-fp32`, `int8-fp32-cfp32`."""
        quantizer = "" if self.quantizer == "rtn" else f"-{self.quantizer}"
        block = "" if self.block_size == _DEFAULTS["block_size"] else f"-b{self.block_size}"
        mixed = "" if self.average_bits is None else f"-mix{_shortest(self.average_bits, '.1f')}"
        weights = f"{self.weight_format}{'' if self.is_symmetric else 'a'}{quantizer}{mixed}{block}"
        compute = "" if self.compute == self._fast_compute() else f"-c{self.compute}"
        return f"{weights}-{self.activation_dtype}{compute}{self._rank_name()}"

    def _rank_name(self) -> str:
        return "" if self.rank_fraction == 1 else f"-r{_shortest(self.rank_fraction, '.2f')}"


def _shortest(number: float, form: str) -> str:
    """The number in that form, if the form is exact."""
    short = f"{number:{form}}"
    return short if float(short) == number else str(number)


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Structure)}
_NAME = re.compile(
    r"(?P<weights>fp32|fp16|int8|int4|keep)(?P<asymmetric>a)?(-(?P<quantizer>rtn|hqq|k[-_]quant|gptq))?"
    r"(-mix(?P<mixed>\d{1,2}(\.\d{1,20})?))?(-b(?P<block>\d{1,4}))?"
    r"(-(?P<activations>fp32|fp16))?(-c(?P<compute>fp32|int8|w8a8))?(-r(?P<rank>\d{0,3}\.?\d{1,20}(e-\d{1,3})?))?",
    re.ASCII,
)
_ALWAYS = ("weight_format", "activation_dtype", "block_size")
