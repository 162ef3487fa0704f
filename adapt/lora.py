"""LoRA on our decoder, by `peft`'s own layers: what SVF is held against, trained by the same loop on the same rows.

    W' = W + (alpha / r) B A        LoRA, arXiv 2106.09685

A [r, N] is drawn by `seed`, B [M, r] starts at 0, so an untrained LoRA is the base. alpha is r, a scale of 1, as in
peft's own defaults; there is no dropout, since no other way of adapting has one here.
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

_NAME = "default"  # what peft calls an adapter that nobody named


def require_peft() -> None:
    """Refuse to promise LoRA where `peft` is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise HavocError(
            'LoRA is trained through peft, which is not installed: pip install "havoc-core[baselines]", '
            "or name --arms without it"
        )


def attach_lora(model: HavocModel, names: Sequence[str], *, rank: int, seed: int) -> LoraAdapter:
    """Put LoRA of `rank` on the matrices with these Hugging Face names, all else frozen.

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
    """The factors A and B of every adapted matrix, by its name with lora_A and lora_B; see `adapter.Adapter`."""

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
        """Do nothing: the factors are multiplied in every forward pass."""

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
        """Give the model back as it was: its own layers and gradient flags."""
        for name, layer in self._layers.items():
            self.model.set_submodule(self._paths[name], layer.base_layer)
        self._layers = {}
        del self.model.peft_config  # else peft takes the next LoRA for a second one
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()
