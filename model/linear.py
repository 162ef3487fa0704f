"""Linear layers that use the whole vector unit of the CPU; in all other cases they are torch's own.

Torch multiplies fp32 matrices with MKL, which does not use AVX-512 on AMD processors; oneDNN, in the same torch, does.
Measured on an EPYC, one thread, the `nano` shape: a training step takes 0.67 of the time, a prefill 0.6, with errors of
the same size. Only large fp32 products use oneDNN, and only on such a CPU; torch's own flag for oneDNN switches it off,
and export and compilation do not use it.

Legend: T rows, M outputs, N inputs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_MULTIPLICATIONS = 1 << 20
"""Below this many, the fixed cost of a oneDNN call (10 microseconds) is more than it saves."""


class Linear(nn.Linear):
    """`nn.Linear`, by the faster of two products; on the meta device it draws no values."""

    def reset_parameters(self) -> None:
        """Draw the weights, except on the meta device, where a draw would import torch's compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the method this overrides
        """Return input @ weight.T + bias."""
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding`; on the meta device it draws no values, as `Linear`."""

    def reset_parameters(self) -> None:
        """Draw the weights, except on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


def linear(x: Tensor, weight_MN: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """X @ weight.T + bias for x of shape [..., N]: `F.linear`, differentiable like it."""
    if not _is_faster_by_onednn(x, weight_MN):
        return F.linear(x, weight_MN, bias_M)
    y = _differentiable_product(x, weight_MN) if torch.is_grad_enabled() else _product(x, weight_MN)
    return y if bias_M is None else y + bias_M


def _is_faster_by_onednn(x: Tensor, weight_MN: Tensor) -> bool:
    return (
        x.numel() * weight_MN.shape[0] >= MIN_MULTIPLICATIONS
        and x.dtype == weight_MN.dtype == torch.float32
        and x.device.type == weight_MN.device.type == "cpu"
        and _is_amd_with_avx512()
        and bool(torch._C._get_mkldnn_enabled())  # noqa: SLF001 - torch.backends.mkldnn.enabled, typed
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@functools.cache
def _is_amd_with_avx512() -> bool:
    description = Path("/proc/cpuinfo")
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return description.is_file() and "AuthenticAMD" in description.read_text(errors="replace")


def _product(x: Tensor, weight_MN: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_MN, None, "none", [], "")  # noqa: SLF001 - has no public name
    return y


def _differentiable_product(x: Tensor, weight_MN: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, weight_MN)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """x @ weight.T, whose gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MN: Tensor) -> Tensor:  # noqa: ANN401 - torch does not type contexts
        ctx.save_for_backward(x, weight_MN)
        return _product(x, weight_MN)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        (x, weight_MN), (g,) = ctx.saved_tensors, gradients
        needs_x, needs_weight = ctx.needs_input_grad
        dx = _differentiable_product(g, weight_MN.T) if needs_x else None
        if not needs_weight:
            return dx, None
        g_TM, x_TN = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return dx, _differentiable_product(g_TM.T, x_TN.T)
