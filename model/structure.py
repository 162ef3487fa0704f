"""What changes the cost of a model but not what it is: the format of its weights, the type of its activations."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]
ActivationDtype = Literal["fp32", "fp16"]
Quantizer = Literal["rtn", "hqq", "k_quant"]
Compute = Literal["fp32", "int8"]

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("fp32", "fp16", "int8", "int4")
ACTIVATION_DTYPES: tuple[ActivationDtype, ...] = ("fp32", "fp16")
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "hqq", "k_quant")
"""How scales and zero points are chosen: round to nearest, half-quadratic, or llama.cpp's weighted least squares."""

COMPUTES: tuple[Compute, ...] = ("fp32", "int8")
"""What fp32 activations are rounded to inside a quantized product: not at all, or to int8."""

BITS_PER_WEIGHT: dict[WeightFormat, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Structure:
    """One choice of formats. Integer weights come in blocks of `block_size` that share one scale.

    Symmetric blocks have the zero point in the middle of the range, others one of their own. `rank_fraction` below 1
    stores each projection of the layers as two factors of that share of its directions. `compute` says what activations
    are rounded to inside a product with integer weights; `auto` becomes the fast one, int8, and fp32 where the weights
    or the activations allow nothing else.
    """

    weight_format: WeightFormat = "fp32"
    activation_dtype: ActivationDtype = "fp32"
    block_size: int = 32
    is_symmetric: bool = True
    quantizer: Quantizer = "rtn"
    rank_fraction: float = 1.0
    compute: Compute | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.compute == "auto":
            object.__setattr__(self, "compute", self._fast_compute())
        if self.weight_format not in WEIGHT_FORMATS:
            raise HavocError(
                f"no weight format is called {self.weight_format!r}; there are {', '.join(WEIGHT_FORMATS)}"
            )
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise HavocError(
                f"no activation dtype is called {self.activation_dtype!r}; there are {', '.join(ACTIVATION_DTYPES)}"
            )
        if self.block_size not in BLOCK_SIZES:
            raise HavocError(f"block_size must be 16, 32, 64, 128 or 256, not {self.block_size!r}")
        if self.quantizer not in QUANTIZERS:
            raise HavocError(f"no quantizer is called {self.quantizer!r}; there are {', '.join(QUANTIZERS)}")
        if type(self.rank_fraction) not in {int, float} or not 0 < self.rank_fraction <= 1:
            raise HavocError(f"the share of the rank to keep must be above 0 and at most 1, not {self.rank_fraction!r}")
        self._check_compute()
        self._check_quantizer()

    def _fast_compute(self) -> Compute:
        """What `auto` means: the one place where the default is decided."""
        return "int8" if self.is_quantized and self.activation_dtype == "fp32" else "fp32"

    def _check_compute(self) -> None:
        if self.compute not in COMPUTES:
            raise HavocError(f"products compute in {' or '.join(COMPUTES)}, not {self.compute!r}")
        if self.compute == "int8" and not self.is_quantized:
            raise HavocError(f"{self.weight_format} weights compute in fp32: int8 compute needs int8 or int4 weights")
        if self.compute == "int8" and self.activation_dtype != "fp32":
            raise HavocError("int8 compute rounds fp32 activations: leave it out, or ask for fp32 activations")

    def _check_quantizer(self) -> None:
        if not self.is_quantized and (named := self._blocks_asked_for()):
            raise HavocError(f"{self.weight_format} weights have no blocks: leave out {named}, or take int8 or int4")
        if self.quantizer == "hqq" and self.weight_format != "int4":
            raise HavocError(f"the quantizer hqq makes int4 weights, not {self.weight_format}; use rtn or k_quant")
        if self.quantizer != "rtn" and self.is_symmetric:
            raise HavocError(f"the quantizer {self.quantizer} chooses zero points: ask for asymmetric blocks as well")

    def _blocks_asked_for(self) -> str:
        """What is unusual about the blocks, in words."""
        size = [] if self.block_size == _DEFAULTS["block_size"] else [f"block size {self.block_size}"]
        symmetry = [] if self.is_symmetric else ["asymmetric blocks"]
        quantizer = [] if self.quantizer == _DEFAULTS["quantizer"] else [f"the quantizer {self.quantizer}"]
        return " and ".join([*size, *symmetry, *quantizer])

    @classmethod
    def named(cls, name: str, activation_dtype: ActivationDtype = "fp32") -> Self:
        """The structure that `str` names so, `activation_dtype` where the name leaves it out: `int4a-hqq-b64-r0.50`."""
        found = _NAME.fullmatch(name)
        if found is None:
            raise HavocError(
                f"no structure is called {name!r}; a name is a weight format ({', '.join(WEIGHT_FORMATS)}) and what is "
                "unusual about it, such as int4-b64, int4a-hqq or int8-r0.50"
            )
        return cls(
            found["weights"],  # type: ignore[arg-type]
            found["activations"] or activation_dtype,  # type: ignore[arg-type]
            int(found["block"] or _DEFAULTS["block_size"]),
            not found["asymmetric"],
            (found["quantizer"] or "rtn").replace("-", "_"),  # type: ignore[arg-type]
            float(found["rank"] or 1),
            found["compute"] or "auto",  # type: ignore[arg-type]
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
            )
        except (KeyError, ValueError, TypeError) as error:
            msg = f"the structure {dict(document)} cannot be read ({type(error).__name__}: {error})"
            raise HavocError(msg) from error

    def to_fields(self) -> dict[str, Any]:
        """Name every choice: formats and block size always, the others where they are not the default.

        `compute` stands there where there is a choice.
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
        symmetry = "symmetric" if self.is_symmetric else "asymmetric"
        blocks = f" ({symmetry} blocks of {self.block_size}, {self.quantizer})" if self.is_quantized else ""
        rank = "" if self.rank_fraction == 1 else f", {self.rank_fraction:g} of the rank"
        compute = f" computed in {self.compute}" if self.has_compute else ""
        return f"{self.weight_format} weights{blocks}, {self.activation_dtype} activations{compute}{rank}"

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.weight_format in {"int8", "int4"}

    @property
    def has_compute(self) -> bool:
        """Whether `compute` is a choice: integer weights under fp32 activations."""
        return self.is_quantized and self.activation_dtype == "fp32"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation, one scale, or one cached key value."""
        return 4 if self.activation_dtype == "fp32" else 2

    def kept_rank(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Directions r = ceil(rank_fraction min(M, N)) kept of the tensor `name` [M, N]; None where it stays whole.

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
        """Name the structure the way tables and file names do: `int4-fp32`, `int4a-hqq-b64-fp32-cfp32-r0.50`."""
        quantizer = "" if self.quantizer == "rtn" else f"-{self.quantizer}"
        block = "" if self.block_size == _DEFAULTS["block_size"] else f"-b{self.block_size}"
        weights = f"{self.weight_format}{'' if self.is_symmetric else 'a'}{quantizer}{block}"
        compute = "" if self.compute == self._fast_compute() else f"-c{self.compute}"
        return f"{weights}-{self.activation_dtype}{compute}{self._rank_name()}"

    def _rank_name(self) -> str:
        if self.rank_fraction == 1:
            return ""
        short = f"{self.rank_fraction:.2f}"
        return f"-r{short if float(short) == self.rank_fraction else self.rank_fraction}"


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Structure)}
_NAME = re.compile(
    r"(?P<weights>fp32|fp16|int8|int4)(?P<asymmetric>a)?(-(?P<quantizer>rtn|hqq|k[-_]quant))?(-b(?P<block>\d{1,4}))?"
    r"(-(?P<activations>fp32|fp16))?(-c(?P<compute>fp32|int8))?(-r(?P<rank>\d{0,3}\.?\d{1,20}(e-\d{1,3})?))?",
    re.ASCII,
)
_ALWAYS = ("weight_format", "activation_dtype", "block_size")
