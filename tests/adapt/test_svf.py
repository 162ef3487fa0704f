"""The gradient of delta is exact, costs no dense weight gradient, and the base comes back bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from havoc_core.adapt.svf import Basis, SingularValueAdapter, attach, compute_basis, fold_matrix, matrix_basis
from havoc_core.errors import HavocError
from havoc_core.model.config import HavocConfig
from havoc_core.model.transformer import HavocModel

DOUBLE = torch.float64
SIZES = st.integers(1, 12)


def random(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass
class Case:
    """One linear layer in float64, a point delta, an input, and a loss that is not linear in the output."""

    weight: Tensor
    bias: Tensor | None
    delta: Tensor
    x: Tensor
    cotangent: Tensor

    def loss(self, y: Tensor) -> Tensor:
        return (y.sin() * self.cotangent).sum()


def make_case(
    rows: int, columns: int, batch: tuple[int, ...], seed: int, *, has_bias: bool, scale: float = 0.4
) -> Case:
    return Case(
        weight=random(rows, columns, seed=seed),
        bias=random(rows, seed=seed + 1) if has_bias else None,
        delta=scale * random(min(rows, columns), seed=seed + 2),
        x=random(*batch, columns, seed=seed + 3),
        cotangent=random(*batch, rows, seed=seed + 4),
    )


def ours(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of delta and gradient of x through the adapter."""
    model = nn.Sequential(nn.Linear(*reversed(case.weight.shape), bias=case.bias is not None, dtype=DOUBLE))
    with torch.no_grad():
        model[0].weight.copy_(case.weight)
        if case.bias is not None:
            model[0].bias.copy_(case.bias)
    basis = compute_basis({"0.weight": case.weight}, targets=("0",), dtype=DOUBLE)
    adapter = attach(model, basis)
    adapter.load({"0.weight": case.delta})
    x = case.x.clone().requires_grad_()
    loss = case.loss(model(x))
    loss.backward()
    assert model[0].weight.grad is None
    assert model[0].bias is None or model[0].bias.grad is None
    gradient = adapter.deltas["0.weight"].grad
    assert gradient is not None
    assert x.grad is not None
    return loss.detach(), gradient, x.grad


def theirs(case: Case, product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd through `product(x, weight, factor, z)`."""
    basis = matrix_basis(case.weight, dtype=DOUBLE)
    delta, x = case.delta.clone().requires_grad_(), case.x.clone().requires_grad_()
    y = product(x, case.weight, basis.factor, 1 + delta)
    loss = case.loss(y if case.bias is None else y + case.bias)
    loss.backward()
    assert delta.grad is not None
    assert x.grad is not None
    return loss.detach(), delta.grad, x.grad


def through_dense(x: Tensor, weight: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    scaled = (factor * z) @ factor.T
    return x @ (weight @ scaled if weight.shape[0] >= weight.shape[1] else scaled @ weight).T


def through_factors(x: Tensor, weight: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    if weight.shape[0] >= weight.shape[1]:
        return ((x @ factor) * z) @ (weight @ factor).T
    return ((x @ (weight.T @ factor)) * z) @ factor.T


@settings(max_examples=120, deadline=None)
@given(SIZES, SIZES, st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(0, 10_000), st.booleans())
@example(12, 5, [40], 0, True)  # more tokens than directions: by x^T dx
@example(5, 12, [40], 0, True)
@example(12, 12, [3], 0, False)  # fewer: by the projections
@example(7, 7, [], 0, False)  # a single vector
def test_gradient_equals_autograd(rows: int, columns: int, batch: list[int], seed: int, has_bias: bool) -> None:
    """Tall, wide, square, any batch: loss and both gradients are autograd's, through dense and through factors."""
    case = make_case(rows, columns, tuple(batch), seed, has_bias=has_bias)
    for product in (through_dense, through_factors):
        for ours_value, theirs_value in zip(ours(case), theirs(case, product), strict=True):
            torch.testing.assert_close(ours_value, theirs_value, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("num_tokens", [2, 30])
@pytest.mark.parametrize("z", [0.0, 1e-300, -1e-9, 0.099, -0.05])
def test_gradient_is_exact_where_z_vanishes(shape: tuple[int, int], num_tokens: int, z: float) -> None:
    """z = 0 and |z| near 0 neither divide by zero nor lose digits."""
    case = make_case(*shape, (num_tokens,), 5, has_bias=True)
    case.delta[1], case.delta[3] = z - 1, -1.0
    for ours_value, theirs_value in zip(ours(case), theirs(case, through_factors), strict=True):
        torch.testing.assert_close(ours_value, theirs_value, atol=1e-10, rtol=1e-9)


def test_gradient_passes_gradcheck() -> None:
    """Finite differences of the folded loss agree: nothing here relies on our own algebra."""
    case = make_case(6, 4, (5,), 3, has_bias=False)
    basis, gradient = matrix_basis(case.weight, dtype=DOUBLE), ours(case)[1]
    for index in range(4):
        step = torch.zeros(4, dtype=DOUBLE)
        step[index] = 1e-6
        high, low = (
            case.loss(case.x @ fold_matrix(case.weight, basis.factor, basis.side, case.delta + sign * step).T)
            for sign in (1, -1)
        )
        assert float((high - low) / 2e-6) == pytest.approx(float(gradient[index]), rel=1e-6, abs=1e-7)


class NewShapes(TorchDispatchMode):
    """Remembers the shape of every tensor that an operation allocated; views and a known tensor are none."""

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known = known
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and result is not self.known:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize(
    ("rows", "columns", "num_tokens"), [(96, 80, 16), (80, 96, 16), (80, 80, 16), (400, 8, 64), (8, 400, 64)]
)
def test_backward_makes_nothing_larger_than_activations(rows: int, columns: int, num_tokens: int) -> None:
    """No dense weight gradient ever exists, and no tensor of the backward pass is larger than the activations."""
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    adapter = attach(model, compute_basis({"0.weight": model[0].weight}, targets=("0",)))
    adapter.load({"0.weight": 0.1 * random(min(rows, columns), seed=1, dtype=torch.float32)})
    loss = model(torch.randn(num_tokens, columns, requires_grad=True)).square().sum()
    with NewShapes() as seen:
        loss.backward()
    assert model[0].weight.grad is None
    assert seen.shapes.isdisjoint({(rows, columns), (columns, rows)})
    assert (num_tokens, columns) in seen.shapes  # dx: the recorder does see the backward pass
    assert max(math.prod(shape) for shape in seen.shapes) <= num_tokens * max(rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(96, 80), (80, 96), (80, 80)])
@pytest.mark.parametrize("num_tokens", [10, 79, 81, 500])
def test_backward_takes_the_cheaper_product(rows: int, columns: int, num_tokens: int) -> None:
    """Beyond dx it costs the smaller of 4 T S^2 and 2 T S^2 + 2 S^3 FLOPs: by x^T dx for many tokens."""
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    attach(model, compute_basis({"0.weight": model[0].weight}, targets=("0",)))
    loss = model(torch.randn(num_tokens, columns, requires_grad=True)).square().sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    side, dx = min(rows, columns), 2 * num_tokens * rows * columns
    assert counter.get_total_flops() == dx + min(4 * num_tokens * side**2, 2 * num_tokens * side**2 + 2 * side**3)


@pytest.mark.parametrize(("rows", "columns"), [(96, 80), (80, 96)])
def test_only_what_the_gradient_needs_is_kept(rows: int, columns: int) -> None:
    """The tall layer keeps its input, the wide one its output, until |z| is small; a wide one's dx is left out
    where nobody asks for it.
    """
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    adapter = attach(model, compute_basis({"0.weight": model[0].weight}, targets=("0",)))
    kept: list[tuple[int, ...]] = []
    x = torch.randn(20, columns)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        y = model(x)
    assert set(kept) == {(rows, columns), (20, columns) if rows > columns else (20, rows)}
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    projections = 4 * 20 * min(rows, columns) ** 2
    assert counter.get_total_flops() == projections + (2 * 20 * rows * columns if rows > columns else 0)
    kept.clear()
    adapter.load({"0.weight": torch.full((min(rows, columns),), -1.0)})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        model(x)
    assert (20, columns) in kept


def test_folding_leaves_no_graph_behind() -> None:
    """A delta that is trained gives a weight without a gradient."""
    weight = random(8, 6, seed=0)
    basis = matrix_basis(weight, dtype=DOUBLE)
    delta = nn.Parameter(random(6, seed=1))
    assert not fold_matrix(weight, basis.factor, basis.side, delta).requires_grad


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, DOUBLE])
def test_zero_delta_is_the_base_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """delta = 0 returns the same bits, negative zeros included, new or in place."""
    weight = random(*shape, seed=0).to(dtype)
    weight[0, 0] = -0.0
    basis = matrix_basis(weight)
    zero = torch.zeros(basis.num_directions)
    out = torch.empty_like(weight)
    assert fold_matrix(weight, basis.factor, basis.side, zero, out=out) is out
    for folded in (fold_matrix(weight, basis.factor, basis.side, zero), out):
        assert torch.equal(folded.view(torch.uint8), weight.view(torch.uint8))
        assert folded.data_ptr() != weight.data_ptr()


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(0, 999))
def test_fold_scales_the_singular_values(rows: int, columns: int, seed: int) -> None:
    """W' has the singular values |s z|, and equals U diag(s z) V^T of a full SVD where that is unique."""
    weight, delta = random(rows, columns, seed=seed), 0.5 * random(min(rows, columns), seed=seed + 1)
    basis = matrix_basis(weight, dtype=DOUBLE)
    folded = fold_matrix(weight, basis.factor, basis.side, delta)
    expected = (basis.singular_values * (1 + delta)).abs().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(folded), expected, atol=1e-6, rtol=1e-6)


def test_half_precision_weights_are_folded_in_float32() -> None:
    """A bf16 weight is folded in fp32 and rounded once, into a new tensor or a given one."""
    weight = random(8, 6, seed=0).bfloat16()
    basis, delta = matrix_basis(weight), 0.2 * random(6, seed=1, dtype=torch.float32)
    exact = fold_matrix(weight.float(), basis.factor, basis.side, delta)
    assert torch.equal(fold_matrix(weight, basis.factor, basis.side, delta), exact.bfloat16())
    out = torch.empty_like(weight)
    assert fold_matrix(weight, basis.factor, basis.side, delta, out=out) is out
    assert torch.equal(out, exact.bfloat16())


def test_folding_in_place_needs_no_second_weight() -> None:
    """With `out` of the dtype that is computed in, no other tensor as large as the weight is made."""
    weight, delta = random(40, 6, seed=0), random(6, seed=1)
    basis, out = matrix_basis(weight, dtype=DOUBLE), torch.empty_like(weight)
    with NewShapes(known=out) as seen:
        fold_matrix(weight, basis.factor, basis.side, delta, out=out)
    assert (6, 6) in seen.shapes  # the recorder does see it
    assert tuple(weight.shape) not in seen.shapes


def test_bf16_z_would_lose_its_updates() -> None:
    """Why delta is fp32: in bf16, 1 + 1e-3 is 1, so a hundred such steps change nothing; delta in fp32 moves by 0.1."""
    z, delta = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1)
    for _ in range(100):
        z += 1e-3
        delta += 1e-3
    assert float(z) == 1.0
    assert float(delta) == pytest.approx(0.1, rel=1e-4)


@pytest.fixture
def model() -> HavocModel:
    torch.manual_seed(0)
    return HavocModel(HavocConfig.pico()).eval()


@pytest.fixture
def basis(model: HavocModel) -> Basis:
    return compute_basis(model.named_tensors())


def token_ids(model: HavocModel) -> Tensor:
    return torch.randint(4, model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))


def moved(adapter: SingularValueAdapter, scale: float = 0.2) -> SingularValueAdapter:
    adapter.load({name: scale * torch.randn(delta.shape) for name, delta in adapter.deltas.items()})
    return adapter


def test_decoder_gradients_equal_dense_autograd(model: HavocModel, basis: Basis) -> None:
    """In a whole decoder each delta's gradient is diag(F^T dW ...) of the dense weight gradient that autograd gives."""
    ids = token_ids(model)
    adapter = moved(attach(model, basis))
    deltas = adapter.snapshot()
    model.compute_loss(ids)[0].backward()
    gradients = {name: delta.grad for name, delta in adapter.deltas.items()}
    adapter.restore()
    base = {name: tensor.detach().clone() for name, tensor in model.named_tensors().items()}
    with torch.no_grad():
        for name, delta in deltas.items():
            matrix = basis.matrices[name]
            fold_matrix(base[name], matrix.factor, matrix.side, delta, out=model.named_tensors()[name])
    model.compute_loss(ids)[0].backward()
    for name, tensor in model.named_tensors().items():
        if name not in deltas:
            continue
        matrix, weight = basis.matrices[name], base[name]
        assert tensor.grad is not None
        dense = tensor.grad.T @ weight if matrix.side == "right" else tensor.grad @ weight.T
        expected = (matrix.factor * (dense @ matrix.factor)).sum(0)
        torch.testing.assert_close(gradients[name], expected, atol=1e-6, rtol=1e-3)


def test_attached_model_is_the_base_until_it_is_trained(model: HavocModel, basis: Basis) -> None:
    """Attaching changes no logit, no parameter name and no value of the state dict."""
    ids, before = token_ids(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(ids)
    with attach(model, basis):
        assert torch.equal(model(ids), logits)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inference_runs_the_plain_dense_product(model: HavocModel, basis: Basis) -> None:
    """Without gradients an adapted layer does one linear product and nothing else."""
    adapter = moved(attach(model, basis))
    layer, x = model.layers[0].mlp.w1, torch.randn(2, model.config.d_model)
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        layer(x)
    assert called.count("mm") + called.count("addmm") + called.count("linear") == 1
    assert set(called) <= {"t", "mm", "addmm", "linear"}
    adapter.restore()


def test_restore_gives_the_base_back_bit_for_bit(model: HavocModel, basis: Basis) -> None:
    """After training steps, restore() returns the very same tensors, forward methods and gradient flags."""
    ids, logits = token_ids(model), model(token_ids(model))
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.named_tensors().items()}
    adapter = attach(model, basis)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.compute_loss(ids)[0].backward()
        optimizer.step()
        adapter.refold()
    assert not torch.equal(model(ids), logits)
    adapter.restore()
    for name, tensor in model.named_tensors().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]
        assert tensor.requires_grad
    assert torch.equal(model(ids), logits)
    assert "forward" not in vars(model.layers[0].self_attn.q_proj)


def test_training_descends(model: HavocModel, basis: Basis) -> None:
    """A few gradient steps on delta alone lower the loss, and only delta receives gradients."""
    ids = token_ids(model)
    with attach(model, basis) as adapter:
        optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model.compute_loss(ids)[0]
            loss.backward()
            optimizer.step()
            adapter.refold()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.01
        assert all(parameter.grad is None for parameter in model.parameters())


def test_base_can_be_run_beside_the_policy(model: HavocModel, basis: Basis) -> None:
    """disabled() gives the base's logits even between a policy's forward and backward, and harms no gradient."""
    ids, reference = token_ids(model), model(token_ids(model)).detach()
    adapter = moved(attach(model, basis))
    model.compute_loss(ids)[0].backward()
    expected = {name: delta.grad.clone() for name, delta in adapter.deltas.items()}
    for delta in adapter.parameters():
        delta.grad = None
    loss = model.compute_loss(ids)[0]
    with adapter.disabled(), torch.no_grad():
        assert torch.equal(model(ids), reference)
    with adapter.disabled():
        assert torch.equal(model(ids), reference)  # with gradients too
    loss.backward()
    for name, delta in adapter.deltas.items():
        assert torch.equal(delta.grad, expected[name])
    with pytest.raises(RuntimeError, match="stop"), adapter.disabled():
        raise RuntimeError("stop")
    assert not torch.equal(model(ids), reference)


def test_stale_weights_are_refused(model: HavocModel, basis: Basis) -> None:
    """A step without refold(), and a refold between forward and backward, are errors instead of wrong gradients."""
    ids = token_ids(model)
    with attach(model, basis) as adapter:
        with torch.no_grad():
            adapter.parameters()[0].add_(0.1)
        with pytest.raises(HavocError, match="refold"):
            model.compute_loss(ids)
        adapter.refold()
        loss = model.compute_loss(ids)[0]
        moved(adapter)
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


def test_snapshot_and_load_are_inverse(model: HavocModel, basis: Basis) -> None:
    """Deltas survive a snapshot; a matrix that is not named gets 0; an unknown name is refused."""
    with attach(model, basis) as adapter:
        moved(adapter)
        ids = token_ids(model)
        logits, deltas = model(ids), adapter.snapshot()
        adapter.load({})
        assert all(not delta.any() for delta in adapter.parameters())
        adapter.load(deltas)
        assert torch.equal(model(ids), logits)
        with pytest.raises(HavocError, match="no matrix here"):
            adapter.load({"nonsense": torch.ones(1)})


def test_what_does_not_fit_is_refused(model: HavocModel, basis: Basis) -> None:
    """A matrix the model lacks, another size, a second adapter on a layer: one line each, model untouched."""
    name = "model.layers.0.mlp.up_proj.weight"
    lacking = Basis(matrices={name.replace(".0.", ".99."): basis.matrices[name]}, base_hash="")
    with pytest.raises(HavocError, match="lacks"):
        attach(model, lacking)
    with pytest.raises(HavocError, match="does not fit"):
        attach(model, Basis(matrices={name: matrix_basis(torch.randn(5, 3))}, base_hash=""))
    with attach(model, basis), pytest.raises(HavocError, match="adapted already"):
        attach(model, basis)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_basis_of_the_largest_directions_alone_is_enough(model: HavocModel, basis: Basis) -> None:
    """A factor with fewer columns than rows is attached, and trains that many scales."""
    name = "model.layers.0.mlp.up_proj.weight"
    whole = basis.matrices[name]
    few = dataclasses.replace(whole, factor=whole.factor[:, :5], singular_values=whole.singular_values[:5])
    with attach(model, Basis(matrices={name: few}, base_hash="")) as adapter:
        model.compute_loss(token_ids(model))[0].backward()
        (delta,) = adapter.parameters()
        assert delta.grad is not None
        assert delta.grad.shape == (5,)
        assert bool((delta.grad != 0).all())


def test_autocast_keeps_the_gradient(model: HavocModel, basis: Basis) -> None:
    """Under bf16 autocast the delta gradient stays fp32 and close to the exact one."""
    ids = token_ids(model)
    with attach(model, basis) as adapter:
        moved(adapter)
        model.compute_loss(ids)[0].backward()
        exact = {name: delta.grad.clone() for name, delta in adapter.deltas.items()}
        for delta in adapter.parameters():
            delta.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.compute_loss(ids)[0]
        loss.backward()
        for name, delta in adapter.deltas.items():
            assert delta.grad.dtype == torch.float32
            assert float((delta.grad - exact[name]).norm() / exact[name].norm()) < 0.1
