"""KL(adapted || base): the formula on whole sequences, by every mixing rule, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from havoc_core.adapt.divergence import MAX_TOKENS, compared_rows, divergences
from havoc_core.adapt.expert import Expert
from havoc_core.adapt.mixture import DenseMixture, MixingRule
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.task import load_task
from havoc_core.model.checkpoint import Base
from havoc_core.model.tensors import tensor_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from havoc_core.adapt.basis import Basis
    from havoc_core.adapt.branches import Branched

ALPHA = (0.7, -0.4)


@pytest.fixture(scope="module")
def experts(base: Base, basis: Basis) -> list[Expert]:
    """Two experts of random deltas; the second one leaves the first layer alone."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for domain in ("math", "code"):
        deltas = {
            name: 0.3
            * torch.randn(matrix.num_directions, generator=generator)
            * float(domain == "math" or ".layers.0." not in name)
            for name, matrix in basis.matrices.items()
        }
        made.append(Expert(domain=domain, deltas=deltas, base_hash=base.weight_hash, basis_hash=basis.hash))
    return made


@pytest.fixture(scope="module")
def rows(base: Base) -> dict[str, list[Branched]]:
    """Rows of a task that writes and of one whose prompt holds a picture."""
    tasks = [load_task("math"), load_task("vision")]
    return {task.name: compared_rows(base, task, sources.rows(task, "search", 3))[:3] for task in tasks}


def plain_kl(base: Base, weights: Mapping[str, torch.Tensor], rows: Sequence[Branched]) -> float:
    """Read every answer behind its prompt, by a copy of the model with the mixture's weights and by the base."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if tensor_name(name) in weights:
                parameter.copy_(weights[tensor_name(name)])
    total = 0.0
    for row in rows:
        (answer,) = row.branches
        ids = torch.tensor([[*row.prompt_ids, *answer]])
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(one(ids, torch.ones_like(ids), patches=row.patches).double(), dim=-1)[0]
                for one in (model, base.model)
            )
        places = slice(len(row.prompt_ids) - 1, -1)
        total += float((log_p.exp() * (log_p - log_q))[places].sum(-1).mean())
    return total / len(rows)


@pytest.mark.parametrize("rule", ["delta", "literal", "renorm"])
def test_a_divergence_is_that_of_whole_sequences(
    base: Base, basis: Basis, experts: list[Expert], rows: dict[str, list[Branched]], rule: MixingRule
) -> None:
    """Against two plain forward passes in float64 probabilities, with weights folded by another path."""
    weights = DenseMixture(base.tensors(), basis, experts, rule=rule).fold(ALPHA)
    (found,) = divergences(base, basis, experts, [ALPHA], rows, rule=rule)
    for task, some in rows.items():
        expected = plain_kl(base, weights, some)
        assert expected > 0.001
        assert found[task] == pytest.approx(expected, rel=1e-3)


def test_each_alpha_is_its_own_and_the_base_is_given_back(
    base: Base, basis: Basis, experts: list[Expert], rows: dict[str, list[Branched]]
) -> None:
    """In the order asked, whatever was asked before; 0 for the base; the model in memory is as before."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    alphas = [(0.0, 0.0), ALPHA, (1.0, 1.0), ALPHA]
    found = divergences(base, basis, experts, alphas, rows)
    assert found[0] == pytest.approx(dict.fromkeys(rows, 0.0), abs=1e-6)
    assert found[1] == pytest.approx(found[3])
    assert found[2]["math"] > found[1]["math"]
    assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())


def test_experts_that_change_nothing_are_at_the_base(
    base: Base, basis: Basis, experts: list[Expert], rows: dict[str, list[Branched]]
) -> None:
    """Then nothing is read: exactly 0."""
    still = [
        dataclasses.replace(one, deltas={name: torch.zeros_like(delta) for name, delta in one.deltas.items()})
        for one in experts
    ]
    assert divergences(base, basis, still, [ALPHA], rows) == [{"math": 0.0, "vision": 0.0}]


def test_what_is_read_is_bounded(base: Base) -> None:
    """A prompt longer than the context loses its beginning; rows are read up to a number of tokens."""
    task = load_task("math")
    some = sources.rows(task, "search", 200)
    kept = compared_rows(base, task, some)
    assert 1 < len(kept) < 200
    assert sum(row.num_tokens for row in kept) <= MAX_TOKENS
    long = [{**some[0], "question": "7 " * 2 * base.config.max_seq_len + str(some[0]["question"])}]
    (cut,) = compared_rows(base, task, long)
    assert cut.num_tokens == base.config.max_seq_len
    assert cut.branches == kept[0].branches
    assert list(cut.prompt_ids[-5:]) == list(kept[0].prompt_ids[-5:])
