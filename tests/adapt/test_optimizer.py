"""MuonGrokfast is torch's AdamW and Muon and the paper's Lion behind the Grokfast filter, and never steps on NaN."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from havoc_core.adapt.optimizer import MuGrokConfig, MuonGrokfast
from havoc_core.errors import HavocError, MeasurementError

SEED_003 = MuGrokConfig(
    enable_muon=False,
    fallback_type="adamw",
    fallback_lr=2e-3,
    fallback_betas=(0.9, 0.999),
    fallback_weight_decay=0.01,
    enable_grokfast=True,
    grokfast_alpha=0.98,
    grokfast_lambda=0.05,
    use_qk_clip=False,
    kl_coefficient=0.2,
    phase_name="phase7_transformer2",
)
UNFILTERED = replace(SEED_003, grokfast_lambda=0.0)
SHAPES = ((7,), (5, 3), (3, 5), (4, 2, 3))


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, num_steps: int = 25, first: int = 0
) -> list[Tensor]:
    """Apply gradients that depend on the step's number alone; return the parameters."""
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (1 + step % 5) * torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


def trained(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], **shapes: Any) -> list[Tensor]:
    params = parameters(**shapes)
    return train(params, make(params))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_phase_7_is_the_seeds_listing() -> None:
    """from_phase(7) has every value of the seed's manual configuration, under the same names."""
    assert MuGrokConfig.from_phase(7) == SEED_003
    with pytest.raises(HavocError, match="phase 3"):
        MuGrokConfig.from_phase(3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fallback_lr", -1.0),
        ("fallback_lr", float("nan")),
        ("fallback_weight_decay", float("inf")),
        ("fallback_betas", (0.9, 1.0)),
        ("fallback_betas", (0.9,)),
        ("fallback_type", "sgd"),
        ("fallback_eps", 0.0),
        ("grokfast_alpha", 1.0),
        ("grokfast_lambda", -0.1),
        ("kl_coefficient", -1.0),
        ("muon_momentum", 1.5),
        ("muon_num_iterations", 0),
        ("max_consecutive_skips", 0),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, value: object) -> None:
    """The line names the setting and its value."""
    with pytest.raises(HavocError, match=name):
        replace(SEED_003, **{name: value})


def test_qk_clip_is_refused_because_z_cannot_express_it() -> None:
    """Turning it on is an error with the reason, not a setting that is silently ignored."""
    with pytest.raises(HavocError, match="z spans all heads"):
        replace(SEED_003, use_qk_clip=True)


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("is_on", [True, False])
def test_adamw_is_torchs_bit_for_bit(decay: float, is_on: bool) -> None:
    """With lambda 0, or the filter off, the fallback is torch.optim.AdamW."""
    config = replace(UNFILTERED, fallback_weight_decay=decay, enable_grokfast=is_on)
    ours = trained(lambda params: MuonGrokfast(params, config))
    theirs = trained(lambda params: torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.999), weight_decay=decay))
    assert_same(ours, theirs)


def test_lion_is_the_papers_formula() -> None:
    """theta <- theta - lr (sign(b1 m + (1 - b1) g) + wd theta); m <- b2 m + (1 - b2) g."""
    config = replace(UNFILTERED, fallback_type="lion", fallback_betas=(0.9, 0.99), fallback_lr=1e-2)
    params = parameters(((7,),))
    theta, mean = params[0].detach().double().clone(), torch.zeros(7, dtype=torch.float64)
    optimizer = MuonGrokfast(params, config)
    for step in range(20):
        train(params, optimizer, 1, first=step)
        gradient = params[0].grad.double()
        theta -= 1e-2 * ((0.9 * mean + 0.1 * gradient).sign() + 0.01 * theta)
        mean = 0.99 * mean + 0.01 * gradient
    torch.testing.assert_close(params[0].detach().double(), theta, atol=1e-5, rtol=0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_bit_for_bit(nesterov: bool) -> None:
    """Tall, wide and square matrices go through the same arithmetic as torch.optim.Muon."""
    shapes = ((6, 9), (9, 6), (16, 16), (40, 8))
    config = replace(UNFILTERED, enable_muon=True, muon_weight_decay=0.1, muon_nesterov=nesterov)
    ours = trained(lambda params: MuonGrokfast(params, config), shapes=shapes)
    theirs = trained(lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, nesterov=nesterov), shapes=shapes)
    assert_same(ours, theirs)


def test_routing_is_by_number_of_dimensions() -> None:
    """Vectors never reach Muon; matrices do when it is on; more dimensions count as a matrix of the rest."""
    config = replace(UNFILTERED, enable_muon=True)
    params = parameters()
    optimizer = MuonGrokfast(params, config)
    routes = {tuple(param.shape): group["route"] for group in optimizer.param_groups for param in group["params"]}
    assert routes == {(7,): "adamw", (5, 3): "muon", (3, 5): "muon", (4, 2, 3): "muon"}
    after = train(params, optimizer)
    vector = parameters()[:1]
    assert torch.equal(after[0], train(vector, torch.optim.AdamW(vector, lr=2e-3, weight_decay=0.01))[0])
    cube, matrix = (trained(lambda p: MuonGrokfast(p, config), shapes=(shape,))[0] for shape in ((4, 2, 3), (4, 6)))
    assert torch.equal(cube.reshape(4, 6), matrix)
    off = MuonGrokfast(parameters(), UNFILTERED)
    assert {group["route"] for group in off.param_groups} == {"adamw"}


def test_groups_choose_for_themselves() -> None:
    """A group may keep its matrices from Muon (embeddings) and set its own rate and decay; schedulers reach both."""
    matrix, table, vector = parameters(((4, 4), (9, 4), (4,)))
    config = replace(UNFILTERED, enable_muon=True)
    groups = [{"params": [matrix, vector], "lr": 0.5}, {"params": [table], "enable_muon": False, "weight_decay": 0.0}]
    optimizer = MuonGrokfast(groups, config)
    assert [(g["route"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("muon", 0.5, 0.0),
        ("adamw", 0.5, 0.01),
        ("adamw", 2e-3, 0.0),
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train([matrix, table, vector], optimizer, 1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 1e-3]


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.999), st.floats(0, 5), st.integers(1, 12))
def test_filter_is_an_exponential_mean(alpha: float, weight: float, num_steps: int) -> None:
    """g~ = g + lambda mu, where mu is the bias-corrected mean: the average of all gradients weighted by alpha^age."""
    config = replace(SEED_003, grokfast_alpha=alpha, grokfast_lambda=weight)
    param = nn.Parameter(torch.zeros(5))
    optimizer, gradients = MuonGrokfast([param], config), []
    for step in range(num_steps):
        param.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        gradients.append(param.grad.double())
        before = param.grad.clone()
        filtered = optimizer._filtered(param)
        assert torch.equal(param.grad, before)
    ages = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)
    shares = alpha**ages / (alpha**ages).sum()
    mean = (shares[:, None] * torch.stack(gradients)).sum(0)
    torch.testing.assert_close(filtered.double(), gradients[-1] + weight * mean, atol=1e-5, rtol=1e-5)


def test_filter_amplifies_what_lasts_and_not_what_flips() -> None:
    """Transfer gain 1 + lambda for a constant gradient, 1 + lambda (1 - alpha) / (1 + alpha) for an alternating one."""
    config = replace(SEED_003, grokfast_alpha=0.98, grokfast_lambda=2.0)
    for pattern, gain in (((1.0, 1.0), 3.0), ((1.0, -1.0), 1 + 2 * 0.02 / 1.98)):
        param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = MuonGrokfast([param], config)
        for step in range(2000):
            param.grad = torch.tensor([pattern[step % 2]], dtype=torch.float64)
            filtered = optimizer._filtered(param)
        assert abs(float(filtered)) == pytest.approx(gain, rel=1e-6)


def test_phase_7_filter_hardly_turns_an_adamw_step() -> None:
    """The documented number: lambda 0.05 adds at most 5 % of the mean gradient, so a step turns by under 5 %."""
    ours, theirs = (trained(lambda params, c=c: MuonGrokfast(params, c)) for c in (SEED_003, UNFILTERED))
    start = [param.detach() for param in parameters()]
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert not torch.equal(a, b)
        assert float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b - s)) < 0.05


def test_decay_pulls_z_to_one() -> None:
    """With no gradient to follow, delta shrinks to 0 and z = 1 + delta goes to 1 from both sides."""
    delta = nn.Parameter(torch.tensor([0.5, -0.5]))
    optimizer = MuonGrokfast([delta], replace(SEED_003, fallback_lr=0.1, fallback_weight_decay=1.0))
    for _ in range(100):
        delta.grad = torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(1 + delta.detach(), torch.ones(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradients_never_step(bad: float) -> None:
    """One bad number anywhere skips the whole step: parameters and state stay, and it is counted."""
    params = parameters()
    optimizer = MuonGrokfast(params, replace(SEED_003, enable_muon=True))
    before = train(params, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    params[2].grad[0, 0] = bad
    optimizer.step()
    assert_same([param.detach() for param in params], before)
    for index, own in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(own[key]), torch.as_tensor(state[index][key])) for key in own)
    assert (optimizer.num_steps, optimizer.num_skipped, optimizer.num_consecutive_skips) == (3, 1, 1)
    train(params, optimizer, 1)
    assert (optimizer.num_steps, optimizer.num_skipped, optimizer.num_consecutive_skips) == (4, 1, 0)


def test_too_many_bad_gradients_end_the_run_at_the_last_good_state() -> None:
    """After N in a row: MeasurementError; restore_last_good() gives the parameters and state that were still good."""
    params = parameters()
    optimizer = MuonGrokfast(params, replace(SEED_003, max_consecutive_skips=3))
    good = train(params, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, 1, first=4)  # the gradient at `good` was finite; what this step made gives only NaN
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    optimizer.step()
    with pytest.raises(MeasurementError, match="3 gradients .* after 5 good steps") as caught:
        optimizer.step()
    assert caught.value.exit_code == 4
    assert optimizer.restore_last_good()
    assert_same([param.detach() for param in params], good)
    assert optimizer.num_steps == 4
    once_more = train(params, optimizer, 3, first=4)
    fresh = parameters()
    other = MuonGrokfast(fresh, replace(SEED_003, max_consecutive_skips=3))
    with torch.no_grad():
        for param, value in zip(fresh, good, strict=True):
            param.copy_(value)
    other.load_state_dict(state)
    assert_same(once_more, train(fresh, other, 3, first=4))


def test_nothing_to_restore_is_said() -> None:
    """Before any good step, or when copies are turned off, restore_last_good() returns False and changes nothing."""
    params = parameters()
    optimizer = MuonGrokfast(params, replace(SEED_003, keep_last_good=False))
    after = train(params, optimizer, 2)
    assert not optimizer.restore_last_good()
    assert_same([param.detach() for param in params], after)


@pytest.mark.parametrize(
    "config", [SEED_003, replace(SEED_003, enable_muon=True), replace(SEED_003, fallback_type="lion")]
)
def test_resuming_is_exact(config: MuGrokConfig) -> None:
    """10 steps, saved and loaded into a fresh optimizer, then 10 more: the same bits as 20 in one go."""
    whole = parameters()
    expected = train(whole, MuonGrokfast(whole, config), 20)
    params = parameters()
    optimizer = MuonGrokfast(params, config)
    train(params, optimizer, 10)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = MuonGrokfast(fresh, config)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.num_steps == 10
    assert_same(train(fresh, resumed, 10, first=10), expected)


def test_resuming_with_other_settings_is_refused() -> None:
    """The line names what changed."""
    state = MuonGrokfast(parameters(), SEED_003).state_dict()
    with pytest.raises(HavocError, match="other settings: fallback_lr, grokfast_lambda"):
        MuonGrokfast(parameters(), replace(SEED_003, fallback_lr=1e-3, grokfast_lambda=0.1)).load_state_dict(state)


def test_unused_parameters_and_closures_are_as_in_torch() -> None:
    """A parameter without a gradient is left alone; a closure is called with gradients on, and its loss returned."""
    used, unused = parameters(((3,), (3,)))
    optimizer = MuonGrokfast([used, unused], SEED_003)
    before = unused.detach().clone()

    def closure() -> float:
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(float(parameters(((3,),))[0].detach().square().sum()))
    assert torch.equal(unused, before)
    assert unused not in optimizer.state


def test_a_group_may_be_one_tensor() -> None:
    """As torch's own optimizers allow: the tensor is the parameter, not its rows."""
    matrix, vector = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    optimizer = MuonGrokfast([{"params": matrix}, {"params": vector}], MuGrokConfig())
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == 2
    assert held[0] is matrix
    assert held[1] is vector
