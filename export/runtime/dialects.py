"""The dialects of graphs, with the facts that the writer, the runtime, the recipe and the command line need.

A new dialect is an entry in `DIALECTS` and a file with its `DecoderGraph`: see docs/extending.md. No torch, no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...model.structure import ActivationDtype

Cache = Literal["dynamic", "static"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One set of operators for the decoder's attention and normalisation.

    `decoders` names by cache the `DecoderGraph` that writes it, as "module:class"; a module that begins with a dot is
    of the folder `export`. `opsets` are the versions of ONNX's operators by cache, `ir_version` the oldest file format
    that holds the graph. `attention` is the operator whose limits count: it takes heads whose width is a multiple of
    `head_dim_unit`, and has no kernel for the pairs in `lacks`.
    `has_positions` says whether the graph has the input `position_ids`, `extends_many_rows` whether several rows, with
    padding among the new tokens or without, can continue after a past with more than one token each.
    """

    name: str
    decoders: Mapping[Cache, str]
    opsets: Mapping[Cache, int]
    ir_version: int
    attention: str
    head_dim_unit: int = 2
    lacks: frozenset[tuple[str, ActivationDtype]] = frozenset()
    has_positions: bool = True
    extends_many_rows: bool = True

    def require_heads(self, head_dim: int) -> None:
        """Raise a `HavocError` unless the attention operator takes heads of this width."""
        if head_dim % self.head_dim_unit:
            raise HavocError(
                f"{self.attention} rotates heads of a multiple of {self.head_dim_unit}, this model's have {head_dim}: "
                f"use --dialect {DEFAULT_DIALECT}"
            )

    def require_kernels(self, device: str, activation_dtype: ActivationDtype) -> None:
        """Raise a `HavocError` where `device` has no kernel of the attention operator for this dtype."""
        if (device, activation_dtype) in self.lacks:
            raise HavocError(
                f"the {self.name} dialect does not run in {activation_dtype} on {device.upper()}: {self.attention} has "
                f"no {activation_dtype} kernel there; use --dialect {DEFAULT_DIALECT} or another --activations"
            )


DEFAULT_DIALECT = "standard"
"""ONNX's own operators: every provider runs them, in every dtype and with all heads."""

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="standard",
            decoders={"dynamic": ".standard:StandardDecoder", "static": ".standard:StaticStandardDecoder"},
            opsets={"dynamic": 23, "static": 24},
            ir_version=11,
            attention="Attention",
        ),
        Dialect(
            name="contrib",
            decoders={"dynamic": ".contrib:ContribDecoder", "static": ".contrib:ContribDecoder"},
            opsets={"dynamic": 22, "static": 22},
            ir_version=10,
            attention="GroupQueryAttention",
            head_dim_unit=16,  # ONNX Runtime 1.31 checks it
            lacks=frozenset({("cuda", "fp32")}),
            has_positions=False,
            extends_many_rows=False,
        ),
    )
}

BEST_DIALECT: dict[tuple[str, ActivationDtype, Cache], str] = {
    ("cpu", "fp32", "dynamic"): "standard",  # prefill 120 ms, a step 3.2; GroupQueryAttention 126 and 3.7
    ("cpu", "fp32", "static"): "standard",
    ("cpu", "fp16", "dynamic"): "contrib",  # prefill 122 ms, a step 3.3; standard 131 and 3.6
    ("cpu", "fp16", "static"): "contrib",
    ("cuda", "fp32", "dynamic"): "standard",  # GroupQueryAttention has no fp32 kernel in the CUDA provider
    ("cuda", "fp32", "static"): "standard",
    ("cuda", "fp16", "dynamic"): "standard",  # a step 1.6 ms; GroupQueryAttention 44: see docs/decisions/0003
    ("cuda", "fp16", "static"): "contrib",
}
"""The best dialect of each execution provider, by device, activation dtype and cache.

The CPU's rows are measured: prefill of 512 tokens and a step after them, of a decoder of 26.7 M parameters on one
thread of ONNX Runtime 1.31. Of CUDA's rows, fp16 with a growing cache was timed, on an NVIDIA H200.
"""


def choose_dialect(
    name: str, *, device: str, activation_dtype: ActivationDtype, head_dim: int, cache: Cache = "dynamic"
) -> str:
    """The name of a dialect; `auto` takes it from `BEST_DIALECT`, if the heads allow it.

    A dialect whose operators `device` does not run in that dtype, or not with such heads, is a `HavocError`.
    """
    if name == "auto":
        best = DIALECTS[BEST_DIALECT.get((device, activation_dtype, cache), DEFAULT_DIALECT)]
        return DEFAULT_DIALECT if head_dim % best.head_dim_unit else best.name
    dialect = DIALECTS[name]
    dialect.require_kernels(device, activation_dtype)
    dialect.require_heads(head_dim)
    return name
