"""LoRA by peft's own layers inside our decoder: the base until trained, then W + B A, and gone without a trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from havoc_core.adapt.basis import TARGETS, is_target
from havoc_core.adapt.lora import LoraAdapter, attach_lora, require_peft
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.tensors import module_name
from havoc_core.model.transformer import HavocModel

pytest.importorskip("peft", reason="peft is not installed: LoRA has no layers")

IDS = torch.tensor([[5, 9, 200, 31, 7]])


@pytest.fixture(scope="module")
def model() -> HavocModel:
    return load_base("nano").model


@pytest.fixture(scope="module")
def names() -> list[str]:
    return [name for name in load_base("nano").tensors() if is_target(name, TARGETS)]


@pytest.fixture
def adapter(model: HavocModel, names: list[str]) -> Iterator[LoraAdapter]:
    with attach_lora(model, names, rank=4, seed=3) as attached:
        yield attached


def logits(model: HavocModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)
    return found


def test_untrained_it_is_the_base_bit_for_bit(model: HavocModel, names: list[str]) -> None:
    """B starts at 0."""
    before = logits(model)
    with attach_lora(model, names, rank=4, seed=0):
        assert torch.equal(logits(model), before)


def test_every_matrix_gets_two_factors_of_the_rank(adapter: LoraAdapter, names: list[str], model: HavocModel) -> None:
    """A [r, N] and B [M, r] for each, under names that hold the layer: r (M + N) numbers a matrix."""
    shapes = {name: tuple(value.shape) for name, value in adapter.deltas.items()}
    matrices = {name: model.get_parameter(_base_path(name)).shape for name in names}
    expected = {f"{name.removesuffix('.weight')}.lora_A.weight": (4, size[1]) for name, size in matrices.items()}
    expected |= {f"{name.removesuffix('.weight')}.lora_B.weight": (size[0], 4) for name, size in matrices.items()}
    assert shapes == expected


def _base_path(name: str) -> str:
    return module_name(name).removesuffix("weight") + "base_layer.weight"


def test_the_layers_compute_w_plus_b_times_a(adapter: LoraAdapter, names: list[str], model: HavocModel) -> None:
    """Against the decoder with the products added to its weights: a scale of 1, all matrices, nothing else."""
    generator = torch.Generator().manual_seed(1)
    values = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in adapter.deltas.items()}
    adapter.load(values)
    found = logits(model)
    merged = load_base("nano").model
    with torch.no_grad():
        for name in names:
            stem = name.removesuffix(".weight")
            change = values[f"{stem}.lora_B.weight"] @ values[f"{stem}.lora_A.weight"]
            merged.get_parameter(module_name(name)).add_(change)
    torch.testing.assert_close(found, logits(merged), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(load_base("nano").model), atol=1e-2)
    assert all(torch.equal(value, values[name]) for name, value in adapter.snapshot().items())


def test_switched_off_it_is_the_base_and_learns_again_after(adapter: LoraAdapter, model: HavocModel) -> None:
    """The reference of a KL term costs no copy; gradients reach every factor and nothing else."""
    base = logits(load_base("nano").model)
    adapter.load({name: value + 0.1 for name, value in adapter.snapshot().items()})
    loss = model(IDS).square().mean()
    with adapter.disabled():
        assert torch.equal(logits(model), base)
    loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in adapter.parameters())
    assert {id(value) for value in model.parameters() if value.grad is not None} == set(map(id, adapter.parameters()))


def test_the_model_is_given_back_as_it_was(names: list[str]) -> None:
    """Names, bits and gradient flags; and a second LoRA is no second adapter beside the first."""
    model = load_base("nano").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    for _ in range(2):
        with attach_lora(model, names, rank=2, seed=0) as adapter:
            adapter.load({name: value + 1 for name, value in adapter.snapshot().items()})
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags


def test_the_seed_draws_the_factors_and_nothing_else(model: HavocModel, names: list[str]) -> None:
    """Equal seeds, equal factors; the caller's random numbers go on as if nothing had been drawn."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        with attach_lora(model, names[:1], rank=4, seed=seed) as adapter:
            found.append(adapter.snapshot())
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    first, again, other = (values[f"{names[0].removesuffix('.weight')}.lora_A.weight"] for values in found)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: what is missing and how to get it, or how to do without."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HavocError, match=r'peft, .*pip install "havoc-core\[baselines\]"'):
        require_peft()
