"""What changes the cost of a model but not what it is: the format of its weights, the type of its activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import HavocError

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]
ActivationDtype = Literal["fp32", "fp16"]

WEIGHT_FORMATS: tuple[WeightFormat, ...] = ("fp32", "fp16", "int8", "int4")
ACTIVATION_DTYPES: tuple[ActivationDtype, ...] = ("fp32", "fp16")

BITS_PER_WEIGHT: dict[WeightFormat, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Structure:
    """One choice of formats. Integer weights come in blocks of `block_size` that share one scale."""

    weight_format: WeightFormat = "fp32"
    activation_dtype: ActivationDtype = "fp32"
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.weight_format not in WEIGHT_FORMATS:
            raise HavocError(
                f"no weight format is called {self.weight_format!r}; there are {', '.join(WEIGHT_FORMATS)}"
            )
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise HavocError(
                f"no activation dtype is called {self.activation_dtype!r}; there are {', '.join(ACTIVATION_DTYPES)}"
            )
        if self.block_size not in {16, 32, 64, 128, 256}:
            raise HavocError(f"block_size must be 16, 32, 64, 128 or 256, not {self.block_size!r}")

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are integers with scales."""
        return self.weight_format in {"int8", "int4"}

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation, one scale, or one cached key value."""
        return 4 if self.activation_dtype == "fp32" else 2

    def __str__(self) -> str:
        """Name the structure the way tables and file names do: `int4-fp32`."""
        return f"{self.weight_format}-{self.activation_dtype}"
