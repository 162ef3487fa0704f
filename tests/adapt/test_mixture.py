"""Mixing follows its rule exactly, and the dense fold equals recomputing U diag(s z) V^T."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from havoc_core.adapt import mixture as mixture_module
from havoc_core.adapt.basis import Basis, compute_basis, matrix_basis
from havoc_core.adapt.expert import Expert
from havoc_core.adapt.mixture import (
    MIXING_RULES,
    DenseMixture,
    MixingRule,
    low_rank_factors,
    mix,
    mixed_singular_values,
)
from havoc_core.adapt.svf import fold_matrix
from havoc_core.errors import HavocError

NAMES = [f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
SHAPES = ((8, 8), (12, 6), (6, 12))
WEIGHTS = st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4)
SEED_ALPHA = [1.2, 0.8, 1.5, 0.9]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in zip(NAMES, SHAPES, strict=True)}
    tensors[NAMES[0]][0, 0] = -0.0
    return tensors


@pytest.fixture(scope="module")
def basis(tensors: dict[str, Tensor]) -> Basis:
    return compute_basis(tensors, base_hash="a" * 64)


@pytest.fixture(scope="module")
def experts(basis: Basis) -> list[Expert]:
    generator = torch.Generator().manual_seed(1)
    return [
        Expert(
            domain=domain,
            deltas={
                name: 0.1 * torch.randn(matrix.num_directions, generator=generator)
                for name, matrix in basis.matrices.items()
            },
            base_hash=basis.base_hash,
            basis_hash=basis.hash,
        )
        for domain in ("math", "code", "reasoning", "vision")
    ]


def singular_values(basis: Basis) -> dict[str, Tensor]:
    return {name: matrix.singular_values for name, matrix in basis.matrices.items()}


@settings(max_examples=40, deadline=None)
@given(WEIGHTS)
def test_rules_are_their_formulas(basis: Basis, experts: list[Expert], alpha: list[float]) -> None:
    """delta: 1 + sum alpha (z - 1); literal: sum alpha z; renorm: literal rescaled to the base's nuclear norm."""
    by_rule = {
        rule: mix(experts, alpha, rule=rule, singular_values=singular_values(basis))
        for rule in MIXING_RULES
        if rule != "renorm" or sum(alpha) > 0.1
    }
    for name, matrix in basis.matrices.items():
        zs = [1 + expert.deltas[name].double() for expert in experts]
        literal = sum(weight * z for weight, z in zip(alpha, zs, strict=True))
        expected = {"delta": 1 + sum(weight * (z - 1) for weight, z in zip(alpha, zs, strict=True)), "literal": literal}
        if "renorm" in by_rule:
            values = matrix.singular_values.double()
            expected["renorm"] = literal * values.sum() / (values * literal).sum()
        for rule, deltas in by_rule.items():
            assert deltas[name].dtype == torch.float32
            torch.testing.assert_close(1 + deltas[name].double(), expected[rule], atol=1e-6, rtol=1e-6)


def test_no_weight_is_the_base(experts: list[Expert]) -> None:
    """Under delta, alpha = 0 gives exactly z = 1; under literal it would erase every adapted matrix."""
    assert all(not delta.any() for delta in mix(experts, [0, 0, 0, 0]).values())
    assert all(bool((delta == -1).all()) for delta in mix(experts, [0, 0, 0, 0], rule="literal").values())


@pytest.mark.parametrize("rule", ["delta", "literal"])
def test_one_whole_weight_is_that_expert(experts: list[Expert], rule: MixingRule) -> None:
    """alpha = e_k gives expert k itself, bit for bit."""
    mixed = mix(experts, [0, 1, 0, 0], rule=rule)
    assert all(torch.equal(mixed[name], delta) for name, delta in experts[1].deltas.items())


def test_literal_scales_all_weights_by_the_sum_of_alpha(
    tensors: dict[str, Tensor], basis: Basis, experts: list[Expert]
) -> None:
    """The documented number: the seed's mixture [1.2, 0.8, 1.5, 0.9] makes every weight about 4.4 times larger."""
    ratios = {}
    for rule in MIXING_RULES:
        folded = DenseMixture(tensors, basis, experts, rule=rule).fold(SEED_ALPHA)
        ratios[rule] = sum(float(w.norm()) for w in folded.values()) / sum(float(tensors[n].norm()) for n in NAMES)
    assert ratios["literal"] == pytest.approx(4.4, rel=0.05)
    assert ratios["delta"] == pytest.approx(1.0, rel=0.1)
    assert ratios["renorm"] == pytest.approx(1.0, rel=0.1)


def test_renorm_keeps_the_nuclear_norm_and_forgets_scale(basis: Basis, experts: list[Expert]) -> None:
    """sum s z = sum s, and alpha times any number is the same mixture."""
    values = singular_values(basis)
    once = mix(experts, SEED_ALPHA, rule="renorm", singular_values=values)
    twice = mix(experts, [2 * weight for weight in SEED_ALPHA], rule="renorm", singular_values=values)
    for name, delta in once.items():
        torch.testing.assert_close((values[name] * (1 + delta)).sum(), values[name].sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(delta, twice[name], atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.sampled_from(MIXING_RULES))
def test_dense_fold_equals_recomputing(
    tensors: dict[str, Tensor], basis: Basis, experts: list[Expert], alpha: list[float], rule: MixingRule
) -> None:
    """One weighted sum of dense deltas is U diag(s z) V^T of the mixture, for every alpha and rule."""
    if rule == "renorm" and sum(alpha) < 0.1:
        return
    deltas = mix(experts, alpha, rule=rule, singular_values=singular_values(basis))
    for name, folded in DenseMixture(tensors, basis, experts, rule=rule).fold(alpha).items():
        matrix = basis.matrices[name]
        expected = fold_matrix(tensors[name], matrix.factor, matrix.side, deltas[name])
        torch.testing.assert_close(folded, expected, atol=3e-5, rtol=1e-5)
        u, s, vt = torch.linalg.svd(tensors[name].double(), full_matrices=False)
        torch.testing.assert_close(folded.double(), (u * (s * (1 + deltas[name]))) @ vt, atol=1e-4, rtol=1e-4)


def test_dense_fold_returns_to_the_base_bit_for_bit(
    tensors: dict[str, Tensor], basis: Basis, experts: list[Expert]
) -> None:
    """After any mixture, alpha = 0 is the base again, in the same memory, with nothing accumulated."""
    mixture = DenseMixture(tensors, basis, experts)
    first = mixture.fold(SEED_ALPHA)
    addresses, copies = [w.data_ptr() for w in first.values()], {name: w.clone() for name, w in first.items()}
    base = mixture.fold([0, 0, 0, 0])
    assert all(torch.equal(base[name].view(torch.int32), tensors[name].view(torch.int32)) for name in NAMES)
    again = mixture.fold(SEED_ALPHA)
    assert all(torch.equal(again[name], copies[name]) for name in NAMES)
    assert [w.data_ptr() for w in again.values()] == addresses
    assert mixture.num_bytes == 6 * sum(tensor.nbytes for tensor in tensors.values())


def test_the_fold_does_not_depend_on_threads(
    tensors: dict[str, Tensor], basis: Basis, experts: list[Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into pieces of a few values and shared among threads, it is the same sum, bit for bit for any of them."""
    monkeypatch.setattr(mixture_module, "_PIECE_VALUES", 7)
    mixture = DenseMixture(tensors, basis, experts)
    num_threads, folded = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            folded.append({name: tensor.clone() for name, tensor in mixture.fold(SEED_ALPHA).items()})
    finally:
        torch.set_num_threads(num_threads)
    for name, tensor in mix(experts, SEED_ALPHA).items():
        matrix = basis.matrices[name]
        assert torch.allclose(
            folded[0][name], fold_matrix(tensors[name], matrix.factor, matrix.side, tensor), atol=1e-5
        )
        assert all(torch.equal(folded[0][name], other[name]) for other in folded[1:])


def test_experts_may_adapt_different_matrices(tensors: dict[str, Tensor], basis: Basis, experts: list[Expert]) -> None:
    """An expert without a matrix counts as z = 1 there; a matrix that no expert adapts is left out."""
    only = [
        Expert(domain=e.domain, deltas={n: e.deltas[n]}, base_hash=e.base_hash, basis_hash=e.basis_hash)
        for e, n in zip(experts[:2], NAMES[:2], strict=True)
    ]
    for rule in MIXING_RULES:
        deltas = mix(only, [0.5, 0.7], rule=rule, singular_values=singular_values(basis))
        assert set(deltas) == set(NAMES[:2])
        folded = DenseMixture(tensors, basis, only, rule=rule).fold([0.5, 0.7])
        for name in NAMES[:2]:
            matrix = basis.matrices[name]
            expected = fold_matrix(tensors[name], matrix.factor, matrix.side, deltas[name])
            torch.testing.assert_close(folded[name], expected, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(mix(only, [0.5, 0.7])[NAMES[0]], 0.5 * only[0].deltas[NAMES[0]])


def test_what_cannot_be_mixed_is_refused(tensors: dict[str, Tensor], basis: Basis, experts: list[Expert]) -> None:
    """Wrong counts, numbers, rules and strangers end in one line each."""
    stranger = Expert(domain="code", deltas=experts[0].deltas, base_hash="b" * 64, basis_hash=basis.hash)
    short = Expert(domain="code", deltas={NAMES[0]: torch.zeros(3)}, base_hash="a" * 64, basis_hash=basis.hash)
    unknown = Expert(domain="code", deltas={"x.weight": torch.zeros(3)}, base_hash="a" * 64, basis_hash=basis.hash)
    for group, alpha, rule, message in (
        ([], [], "delta", "at least one"),
        (experts, [1, 1], "delta", "2 weights for 4 experts"),
        (experts, [1, 1, float("nan"), 1], "delta", "not finite"),
        (experts, SEED_ALPHA, "average", "choose one of delta, literal, renorm"),
        (experts, SEED_ALPHA, "renorm", "needs the singular values"),
        ([experts[0], stranger], [1, 1], "delta", "2 different bases"),
        ([experts[0], short], [1, 1], "delta", "differ in length"),
    ):
        with pytest.raises(HavocError, match=message):
            mix(group, alpha, rule=rule)
    with pytest.raises(HavocError, match="renorm needs more"):
        mix(experts, [0, 0, 0, 0], rule="renorm", singular_values=singular_values(basis))
    with pytest.raises(HavocError, match="not in the basis"):
        DenseMixture(tensors, basis, [unknown])


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_a_slice_and_is_optimal(shape: tuple[int, int], rank: int) -> None:
    """The factors of a mixture at a rank equal the truncated SVD of its folded matrix, without a decomposition."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix_basis(weight, dtype=torch.float64)
    delta = 0.8 * torch.randn(matrix.num_directions, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    folded = fold_matrix(weight, matrix.factor, matrix.side, delta)
    values = mixed_singular_values(matrix, delta).sort(descending=True).values
    torch.testing.assert_close(values, torch.linalg.svdvals(folded), atol=1e-7, rtol=1e-7)
    left, right = low_rank_factors(weight, matrix, delta, rank=rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    u, s, vt = torch.linalg.svd(folded)
    torch.testing.assert_close(left @ right, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-7, rtol=1e-7)
    with pytest.raises(HavocError, match="outside 1"):
        low_rank_factors(weight, matrix, delta, rank=0)


def test_weights_that_overflow_are_refused(basis: Basis) -> None:
    """Each weight is finite, their sum is not."""
    deltas = {name: torch.zeros(size) for name, size in basis.num_directions().items()}
    experts = [Expert(domain=d, deltas=deltas, base_hash="a" * 64, basis_hash=basis.hash) for d in ("math", "code")]
    with pytest.raises(HavocError, match="smaller weights"):
        mix(experts, [1e308, 1e308])


def test_a_dense_mixture_is_checked_before_it_is_computed(
    tensors: dict[str, Tensor], basis: Basis, experts: list[Expert]
) -> None:
    """An unknown rule, and no expert, are refused when it is made, not at the first fold."""
    with pytest.raises(HavocError, match="mixing rule 'sum' is not known"):
        DenseMixture(tensors, basis, experts, rule="sum")  # type: ignore[arg-type]
    with pytest.raises(HavocError, match="at least one expert"):
        DenseMixture(tensors, basis, [])


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_what_renorm_needs_knows_no_scale(size: float) -> None:
    """Of the sum of the singular values a millionth must be left, however large they are."""
    singular_values, enough = torch.tensor([size, size]), torch.tensor([1.0, -1 + 4e-6])
    assert mixture_module._scale("renorm", enough.double(), singular_values, "m") == pytest.approx(5e5, rel=0.05)
    with pytest.raises(HavocError, match="renorm needs more"):
        mixture_module._scale("renorm", torch.tensor([1.0, -1 + 4e-7]).double(), singular_values, "m")
