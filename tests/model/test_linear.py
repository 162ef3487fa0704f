"""The fast product is the product: values, both gradients, second derivatives, and the switch to turn it off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from havoc_core.model import HavocConfig, HavocModel
from havoc_core.model.linear import Linear, _is_amd_with_avx512, _Product, linear

SHAPES = [((300, 128), (352, 128)), ((7, 50, 352), (128, 352)), ((1, 2, 3, 64), (8, 64)), ((33, 65), (31, 65))]


def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ours by oneDNN wherever this torch has it, and torch's in float64."""
    return _Product.apply(x, weight), F.linear(x.double(), weight.double())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_values_and_gradients_are_float32_exact(shapes: tuple[tuple[int, ...], tuple[int, int]]) -> None:
    """Output and both gradients are within float32 rounding of float64, for strided inputs too."""
    torch.manual_seed(0)
    x, weight = torch.randn(shapes[0], requires_grad=True), torch.randn(shapes[1], requires_grad=True)
    ours, exact = both(x, weight)
    assert (ours - exact).abs().max() < 1e-6 * shapes[1][1]
    g = torch.randn_like(ours).transpose(0, -1).contiguous().transpose(0, -1)
    dx, dweight = torch.autograd.grad(ours, (x, weight), g)
    exact_dx, exact_dweight = torch.autograd.grad(exact, (x, weight), g.double())
    assert torch.allclose(dx, exact_dx, atol=1e-4)
    assert torch.allclose(dweight, exact_dweight, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_second_derivatives_flow() -> None:
    """The gradient of a gradient is the one autograd finds for F.linear."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)

    def second(product: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(product.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    assert torch.allclose(second(_Product.apply(x, weight)), second(F.linear(x, weight)), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_torchs_layer(grad: bool, bias: bool) -> None:
    """Whatever path this machine takes, a large layer gives what nn.Linear gives; small ones give it bit for bit."""
    torch.manual_seed(0)
    layer = Linear(128, 352, bias=bias)
    with torch.set_grad_enabled(grad):
        large, small = torch.randn(2, 200, 128), torch.randn(1, 1, 128)
        assert torch.allclose(layer(large), F.linear(large, layer.weight, layer.bias), atol=1e-4)
        assert torch.equal(layer(small), F.linear(small, layer.weight, layer.bias))
        assert layer(large).requires_grad == grad


def test_it_can_be_switched_off() -> None:
    """With oneDNN disabled by torch's own flag, or in half precision, the result is F.linear's bit for bit."""
    x, weight = torch.randn(300, 128), torch.randn(352, 128)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))


def test_the_choice_is_made_once() -> None:
    """The processor is looked at once, not at every product."""
    for _ in range(2):
        linear(torch.randn(300, 128), torch.randn(352, 128))
    assert _is_amd_with_avx512.cache_info().misses == 1


def test_export_sees_plain_products() -> None:
    """A graph exported from the decoder holds standard operators only, however large its products."""
    model = HavocModel(HavocConfig.nano().replace(vision=None)).eval()
    graph = torch.export.export(model, (torch.randint(4, 512, (2, 64)),)).graph
    names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert {name for name in names if not name.startswith("aten.")} == set()
