"""The trained part of a model: named parameters on the layers of a base, which can be switched off to get the base.

Singular values (`svf.SingularValueAdapter`) and low-rank factors (`lora.LoraAdapter`) are adapters. The loop, the
objectives and the reader use only this interface, so both are trained on the same rows by the same rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn


class Adapter(Protocol):
    """Trainable values on the layers of a model. Names hold the layer's number, as in "model.layers.7.mlp...."."""

    @property
    def deltas(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters by name."""

    def parameters(self) -> list[nn.Parameter]:
        """The same as a list, for an optimizer."""

    def refold(self) -> None:
        """Make the model compute with the current values; called after every step."""

    def load(self, values: Mapping[str, Tensor], /) -> None:
        """Set the values, and make the model compute with them."""

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the values to the CPU."""

    def disabled(self) -> AbstractContextManager[None]:
        """Let the base itself compute, without a copy of it."""
