"""LoRA on our decoder, with the layers of `peft`: a baseline for SVF, trained by the same loop on the same rows.

    W' = W + (alpha / r) B A        LoRA, arXiv 2106.09685

A [r, N] is drawn with `seed` and B [M, r] starts at 0, so an untrained LoRA is the base. alpha = r, so the scale is 1,
as in peft's defaults. There is no dropout, because no other method here has one.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..errors import HavocError
from ..model.tensors import module_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ..model.transformer import HavocModel

_NAME = "default"  # peft's name for an adapter without a name


def require_peft() -> None:
    """Raise a `HavocError` if `peft` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise HavocError(
            'LoRA needs peft, which is not installed: pip install "havoc-core[baselines]", or give --arms without LoRA'
        )


def attach_lora(model: HavocModel, names: Sequence[str], *, rank: int, seed: int) -> LoraAdapter:
    """Add LoRA of `rank` to the matrices with these Hugging Face names; all other parameters are frozen.

    Undo with `restore()`, or use the result as a context manager. Raises `HavocError` without `peft`.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    paths = {name: module_name(name).removesuffix(".weight") for name in names}
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(paths.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    return LoraAdapter(model, paths, required_grad)


class LoraAdapter:
    """The factors A and B of every adapted matrix, named lora_A and lora_B under its name; see `adapter.Adapter`."""

    def __init__(self, model: HavocModel, paths: Mapping[str, str], required_grad: Mapping[nn.Parameter, bool]) -> None:
        """Take over the layers that peft put at `paths`; use `attach_lora`."""
        self.model = model
        self._paths, self._required_grad = dict(paths), required_grad
        self._layers: dict[str, Any] = {name: model.get_submodule(path) for name, path in paths.items()}
        self.deltas: dict[str, nn.Parameter] = {
            f"{name.removesuffix('.weight')}.{factor}.weight": getattr(layer, factor)[_NAME].weight
            for name, layer in self._layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def parameters(self) -> list[nn.Parameter]:
        """Give the factors as a list, for an optimizer."""
        return list(self.deltas.values())

    def refold(self) -> None:
        """Do nothing: every forward pass multiplies the factors."""

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set every factor."""
        for name, parameter in self.deltas.items():
            parameter.copy_(values[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the factors to the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.deltas.items()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base itself, without a copy."""
        for layer in self._layers.values():
            layer.enable_adapters(enabled=False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(enabled=True)

    def restore(self) -> None:
        """Restore the model's own layers and gradient flags."""
        for name, layer in self._layers.items():
            self.model.set_submodule(self._paths[name], layer.base_layer)
        self._layers = {}
        del self.model.peft_config  # else peft treats the next LoRA as a second adapter
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()
