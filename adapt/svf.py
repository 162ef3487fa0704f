"""Train singular values in place: dense forward, exact gradient of delta = z - 1 through one orthogonal factor.

    W' = W + W V diag(delta) V^T    rows >= columns          W' = W + U diag(delta) U^T W    otherwise

The forward pass uses the folded dense W', so rollouts run at dense speed. The backward pass needs no gradient of W'.
With y = x W'^T, gradient g = dL/dy and dx = g W' (which backpropagation computes anyway), W' V = (W V) diag(z) gives

    dL/d delta_i = sum_t (x_t V)_i (dx_t V)_i / z_i          dL/d delta_i = sum_t (y_t U)_i (g_t U)_i / z_i

Both are the diagonal of F^T C F for the small matrix C = x^T dx or y^T g [S, S]. That costs 2 T S^2 + 2 S^3 FLOPs, or
4 T S^2 without forming C, which is taken when T < S. So no temporary is larger than the activations, and for many
tokens the work is at most that of a dense weight gradient, 2 T M N. Where |z_i| is small the division would amplify
rounding; there the column W V_i itself is used: sum_t (x_t V)_i (g_t W V_i).

SVF: Transformer-Squared, arXiv 2501.06252. The gradient form is ours; tests/adapt/test_svf.py checks it with autograd.

T tokens, S smaller side, R directions, M rows (outputs), N columns (inputs)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import HavocError
from ..model.tensors import tensor_name
from ..model.transformer import HavocModel
from .basis import TARGETS, Basis, MatrixBasis, Side, cached_basis, compute_basis, is_target, matrix_basis

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "TARGETS",
    "Basis",
    "MatrixBasis",
    "Side",
    "SingularValueAdapter",
    "attach",
    "cached_basis",
    "compute_basis",
    "fold_matrix",
    "is_target",
    "matrix_basis",
]

_SMALL_Z: Final = 0.1
"""Below this |z| the division is avoided: it would cost more than one decimal digit."""


@torch.no_grad()
def fold_matrix(weight: Tensor, factor: Tensor, side: Side, delta: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Fold `delta` [R] into `weight` [M, N] through `factor` [S, R]; delta = 0 gives back `weight` bit for bit.

    Computed in the wider dtype of weight and factor, returned in the weight's dtype; `out` [M, N] receives the result.
    """
    if not delta.any():
        return weight.clone() if out is None else out.copy_(weight)
    work = torch.promote_types(weight.dtype, factor.dtype)
    factor_SR, base_MN = factor.to(weight.device, work), weight.to(work)
    change_SS = (factor_SR * delta.to(factor_SR)) @ factor_SR.T
    left, right = (base_MN, change_SS) if side == "right" else (change_SS, base_MN)
    if out is not None and out.dtype == work:
        return torch.addmm(base_MN, left, right, out=out)
    folded = torch.addmm(base_MN, left, right).to(weight.dtype)
    return folded if out is None else out.copy_(folded)


def attach(model: nn.Module, basis: Basis, *, modules: Mapping[str, nn.Linear] | None = None) -> SingularValueAdapter:
    """Make the singular values of `model` trainable: one fp32 delta per matrix of `basis`, all else frozen.

    `modules` maps the basis's tensor names to linear layers; by default they are found in the model. A matrix without
    its layer, or of another size, is a `HavocError`. Undo with `restore()`, or use the result as a context manager.
    """
    found = _linear_layers(model) if modules is None else modules
    missing = sorted(set(basis.matrices) - set(found))
    if missing:
        raise HavocError(f"the basis has {len(missing)} matrices the model lacks, the first is {missing[0]}")
    return SingularValueAdapter(model, {name: (found[name], basis.matrices[name]) for name in basis.matrices})


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers by tensor name: Hugging Face's for our decoder, else the module's own."""
    paths = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {tensor_name(path): paths[path] for path in paths} if isinstance(model, HavocModel) else paths


class SingularValueAdapter:
    """Trainable singular-value scales on the linear layers of a model.

    `deltas` holds the parameters by tensor name (fp32, or the factor's dtype if wider). After each optimizer step call
    `refold()`; a forward pass with stale weights is refused. The model's parameter names do not change, its state dict
    holds the folded weights. The base tensors are kept and never written, so `restore()` is exact.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, tuple[nn.Linear, MatrixBasis]]) -> None:
        """Take over `layers` of `model`; use `attach`."""
        self.model = model
        for name, (module, matrix) in layers.items():
            _check_fit(name, module, matrix)
        self._required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(requires_grad=False)
        self._layers = {name: _Layer(name, module, matrix) for name, (module, matrix) in layers.items()}
        self.deltas: dict[str, nn.Parameter] = {name: layer.delta for name, layer in self._layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Give the deltas as a list, for an optimizer."""
        return list(self.deltas.values())

    def refold(self) -> None:
        """Recompute every dense weight from base and delta, in place."""
        for layer in self._layers.values():
            layer.refold()

    @torch.no_grad()
    def load(self, deltas: Mapping[str, Tensor]) -> None:
        """Set the deltas (a matrix that is not named gets 0) and refold."""
        unknown = sorted(set(deltas) - set(self.deltas))
        if unknown:
            raise HavocError(f"{len(unknown)} deltas have no matrix here, the first is {unknown[0]}")
        for name, parameter in self.deltas.items():
            parameter.copy_(deltas[name]) if name in deltas else parameter.zero_()
        self.refold()

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the deltas to the CPU, fit for an expert file."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.deltas.items()}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base itself, without a copy: for the reference of a KL term."""
        for layer in self._layers.values():
            layer.use(layer.base)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.use(layer.folded)

    def restore(self) -> None:
        """Give the model back as it was: the base tensors themselves, its own forward, its gradient flags."""
        for layer in self._layers.values():
            layer.release()
        self._layers = {}
        for parameter, required in self._required_grad.items():
            parameter.requires_grad_(required)

    detach = restore

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def _check_fit(name: str, module: nn.Linear, matrix: MatrixBasis) -> None:
    num_rows, num_columns = module.weight.shape
    side = "right" if num_rows >= num_columns else "left"
    if matrix.side != side or matrix.factor.shape[0] != min(num_rows, num_columns):
        size = f"{matrix.side} factor {list(matrix.factor.shape)}"
        raise HavocError(f"{name}: the basis ({size}) does not fit the weight [{num_rows}, {num_columns}]")
    if "forward" in vars(module):
        raise HavocError(f"{name} is adapted already; restore() the first adapter before attaching another")


class _Layer:
    """One adapted linear layer: base and folded weight, the delta, and the z of the folded weight."""

    def __init__(self, name: str, module: nn.Linear, matrix: MatrixBasis) -> None:
        self.name, self.module, self.side = name, module, matrix.side
        self.base = module.weight.data
        self.folded = self.base.clone()
        self.factor = matrix.factor.to(self.base.device)
        zeros = torch.zeros(matrix.num_directions, dtype=self.factor.dtype, device=self.base.device)
        self.delta = nn.Parameter(zeros)
        self.refold()
        self.use(self.folded)
        module.forward = self.forward  # type: ignore[method-assign,assignment]

    def refold(self) -> None:
        delta = self.delta.detach()
        fold_matrix(self.base, self.factor, self.side, delta, out=self.folded)
        self.z = 1 + delta
        self.small = (self.z.abs() < _SMALL_Z).nonzero().flatten()
        self.delta_version = self.delta._version  # noqa: SLF001 - bumped by every in-place change

    def use(self, weight: Tensor) -> None:
        self.module.weight.data = weight
        self.is_base = weight is self.base

    def release(self) -> None:
        self.use(self.base)
        del self.module.forward

    def forward(self, x: Tensor) -> Tensor:
        if self.is_base or not torch.is_grad_enabled():
            return F.linear(x, self.module.weight, self.module.bias)
        if self.delta._version != self.delta_version:  # noqa: SLF001
            raise HavocError(f"{self.name}: delta changed after the weight was folded; call refold() after each step")
        y: Tensor = _FoldedLinear.apply(x, self.delta, self.module.bias, self)  # type: ignore[no-untyped-call]
        return y


class _FoldedLinear(torch.autograd.Function):
    """y = x W'^T + b with the gradients of x and delta only; the module docstring has the formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _delta: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:  # noqa: ANN401
        y = F.linear(x, layer.folded, bias)
        needs_x = layer.side == "right" or bool(layer.small.numel())
        needs_y = layer.side == "left"
        ctx.save_for_backward(layer.folded, x if needs_x else None, y if needs_y else None, bias)
        ctx.layer, ctx.z, ctx.small = layer, layer.z, layer.small
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        folded_MN, x, y, bias = ctx.saved_tensors
        layer: _Layer = ctx.layer
        g_TM = g.reshape(-1, g.shape[-1])
        x_TN = None if x is None else x.reshape(-1, x.shape[-1]).to(g.dtype)
        needs_dx = ctx.needs_input_grad[0]
        dx_TN = g_TM @ folded_MN.to(g.dtype) if needs_dx or layer.side == "right" else None
        if layer.side == "right":
            assert x_TN is not None and dx_TN is not None  # noqa: PT018, S101
            gradient_R = _diagonal(layer.factor, x_TN, dx_TN) / ctx.z
        else:
            y_TM = y.reshape(-1, y.shape[-1]).to(g.dtype)
            gradient_R = _diagonal(layer.factor, y_TM if bias is None else y_TM - bias.to(g.dtype), g_TM) / ctx.z
        if ctx.small.numel():
            assert x_TN is not None  # noqa: S101
            gradient_R[ctx.small] = _small_z_gradient(layer, ctx.small, x_TN, g_TM)
        dx = dx_TN.reshape(*g.shape[:-1], -1) if needs_dx and dx_TN is not None else None
        return dx, gradient_R, None, None


def _diagonal(factor_SR: Tensor, a_TS: Tensor, b_TS: Tensor) -> Tensor:
    """Return sum_t (a_t F)_i (b_t F)_i for each direction i, by whichever order of products costs fewer FLOPs."""
    if a_TS.shape[0] < a_TS.shape[1]:
        return ((a_TS.to(factor_SR.dtype) @ factor_SR) * (b_TS.to(factor_SR.dtype) @ factor_SR)).sum(0)
    product_SS = (a_TS.T @ b_TS).to(factor_SR.dtype)
    return (factor_SR * (product_SS @ factor_SR)).sum(0)


def _small_z_gradient(layer: _Layer, small: Tensor, x_TN: Tensor, g_TM: Tensor) -> Tensor:
    """Return the gradient in the directions `small` from the columns W V_i (or W^T U_i) themselves."""
    work = layer.factor.dtype
    few_S, base_MN = layer.factor[:, small], layer.base.to(work)
    if layer.side == "right":
        return ((x_TN.to(work) @ few_S) * (g_TM.to(work) @ (base_MN @ few_S))).sum(0)
    return ((x_TN.to(work) @ (base_MN.T @ few_S)) * (g_TM.to(work) @ few_S)).sum(0)
