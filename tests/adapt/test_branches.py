"""One pass over a prompt and its continuations says the same as one pass over each, and reads no token it need not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.adapt.branches import (
    Branched,
    batches,
    encode_branches,
    hidden_at_places,
    lay_out,
    log_likelihoods,
    log_probabilities,
)
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.task import load_task
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import Base, load_base

IDS = st.lists(st.integers(4, 500), min_size=1, max_size=9)
ROWS = st.lists(st.builds(Branched, IDS, st.lists(IDS, min_size=1, max_size=5)), min_size=1, max_size=4)


def one_by_one(base: Base, row: Branched) -> list[float]:
    """Log-likelihood of each branch from a plain pass over prompt and branch."""
    sums = []
    for branch in row.branches:
        ids = torch.tensor([[*row.prompt_ids, *branch]])
        log_p_TV = torch.log_softmax(base.model(ids)[0, :-1], dim=-1)
        taken = log_p_TV[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        sums.append(float(taken[-len(branch) :].sum()))
    return sums


@settings(deadline=None, max_examples=30)
@given(ROWS)
@torch.no_grad()
def test_branches_do_not_see_each_other(rows: list[Branched]) -> None:
    """Whatever stands beside a branch, in its row or in its batch, its log-likelihood is that of a plain pass."""
    base = load_base("nano")
    layout = lay_out(rows, pad_id=0)
    ours = log_likelihoods(log_probabilities(base.model, hidden_at_places(base.model, layout)), layout)
    theirs = [value for row in rows for value in one_by_one(base, row)]
    assert ours.tolist() == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert layout.row_of_C.tolist() == [place for place, row in enumerate(rows) for _ in row.branches]


@torch.no_grad()
def test_a_picture_stands_in_front_of_its_branches(base: Base) -> None:
    """A row with a picture has its patches read once, and the same log-likelihood as by itself."""
    task = load_task("vision")
    rows = sources.rows("vision", "train", 2)
    encoded = [
        encode_branches(base.model, base.tokenizer, task.prompt(row), [task.reference(row), "no"]) for row in rows
    ]
    both = lay_out(encoded, pad_id=0)
    together = log_likelihoods(log_probabilities(base.model, hidden_at_places(base.model, both)), both)
    for place, row in enumerate(encoded):
        alone = lay_out([row], pad_id=0)
        single = log_likelihoods(log_probabilities(base.model, hidden_at_places(base.model, alone)), alone)
        assert torch.allclose(together[both.row_of_C == place], single, rtol=1e-4, atol=1e-4)


@given(ROWS, st.integers(1, 120))
def test_batches_hold_every_row_once_within_their_tokens(rows: list[Branched], max_tokens: int) -> None:
    """Padding counts; only a row that is too long by itself goes over."""
    found = list(batches(rows, max_tokens=max_tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(rows)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(rows[index].num_tokens for index in batch) <= max_tokens


def test_the_last_token_of_a_branch_is_not_read() -> None:
    """It is predicted and predicts nothing, so branches of one token cost nothing at all."""
    row = Branched([5, 6, 7], [[8], [9], [10, 11]])
    assert row.num_tokens == 4
    assert lay_out([row], pad_id=0).ids_BT.tolist() == [[5, 6, 7, 10]]


@pytest.mark.parametrize(("prompt", "branches"), [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_what_predicts_nothing_is_refused(prompt: list[int], branches: list[list[int]]) -> None:
    """An empty prompt or continuation has no token to predict from or to predict."""
    with pytest.raises(HavocError, match="at least one token"):
        Branched(prompt, branches)


def test_a_row_longer_than_the_context_is_refused(base: Base) -> None:
    """The error has both numbers."""
    row = Branched([5] * (base.config.max_seq_len + 1), [[6]])
    with pytest.raises(HavocError, match=f"{base.config.max_seq_len + 1} tokens exceed"):
        hidden_at_places(base.model, lay_out([row], pad_id=0))
