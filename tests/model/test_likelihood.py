"""What is read for log-likelihoods: trees of continuations, prompts that fit the context, beginnings read once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError
from havoc_core.model.likelihood import (
    MIN_SHARED_TOKENS,
    PROMPT_END,
    batches,
    build_tree,
    encode_requests,
    shared_prefix,
)
from havoc_core.model.tokenizer import Tokenizer

CONTINUATIONS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(CONTINUATIONS)
def test_a_tree_reads_every_beginning_once_and_leads_to_every_token(continuations: list[list[int]]) -> None:
    """Walking up from the node that predicts a token gives the tokens before it; no two nodes read the same."""
    tree = build_tree(continuations)

    def read_before(node: int) -> tuple[int, ...]:
        return () if node == PROMPT_END else (*read_before(tree.parents[node]), tree.tokens[node])

    for ids, path in zip(continuations, tree.paths, strict=True):
        assert [read_before(node) for node in path] == [tuple(ids[:place]) for place in range(len(ids))]
    beginnings = {tuple(ids[:place]) for ids in continuations for place in range(1, len(ids))}
    assert len(tree.tokens) == len(beginnings)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    assert [len(read_before(node)) - 1 for node in range(len(tree.tokens))] == list(tree.depths)


def test_a_single_token_reads_nothing_behind_its_prompt() -> None:
    """Choices of one token, and equal first tokens, are all scored by the prompt's own logits."""
    assert build_tree([[5], [6], [5]]).tokens == ()
    assert build_tree([[5, 7], [5, 8]]).tokens == (5,)


def test_a_prompt_too_long_loses_its_beginning(tokenizer: Tokenizer) -> None:
    """What is read along a choice fits the context, as in lm-evaluation-harness; each choice cuts what it must."""
    prompt, choices = Prompt("the quick brown fox " * 4 + "12"), [" the", " the quick brown fox 34 + 12 + 34"]
    whole = encode_requests(tokenizer, [(prompt, choices)], max_tokens=500)
    assert (len(whole), whole[0].num_dropped) == (1, 0)
    rows = encode_requests(tokenizer, [(prompt, choices)], max_tokens=len(whole[0].prompt_ids))
    assert sorted(place for row in rows for place in row.places) == [(0, 0), (0, 1)]
    for row in rows:
        (ids,) = row.continuations
        assert len(row.prompt_ids) + len(ids) - 1 == len(whole[0].prompt_ids)
        assert row.prompt_ids == whole[0].prompt_ids[row.num_dropped :]


@pytest.mark.parametrize(
    ("prompt", "choice", "words"),
    [
        (Prompt("what?", b"png"), " a", "prompt 1 has a picture"),
        (Prompt("what?"), "", "choice 2 of prompt 1 is '', which has no token"),
        (Prompt("what?"), " the quick brown fox" * 8, "leaves no room for its prompt in a context of 20"),
    ],
)
def test_what_cannot_be_scored_is_named(tokenizer: Tokenizer, prompt: Prompt, choice: str, words: str) -> None:
    """Pictures, empty choices and choices longer than the context are refused with their place."""
    with pytest.raises(HavocError, match=words):
        encode_requests(tokenizer, [(prompt, [" the", choice])], max_tokens=20)


def test_an_empty_prompt_is_the_beginning_of_a_text(tokenizer: Tokenizer) -> None:
    """Without a prompt the first token is scored behind the token that begins a text."""
    (row,) = encode_requests(tokenizer, [(Prompt(""), ["the fox"])], max_tokens=20)
    assert row.prompt_ids == (tokenizer.bos_id,)
    assert row.continuations == (tuple(tokenizer.encode("the fox")),)


def test_only_a_long_common_beginning_is_read_apart(tokenizer: Tokenizer) -> None:
    """Few-shot text is shared, a common word is not; every row keeps a token of its own prompt."""
    shots = "the quick brown fox 12 + 34 = 46. " * 6
    prompts = [Prompt(shots + end) for end in ("the", "the quick", "12")]
    rows = encode_requests(tokenizer, [(prompt, [" fox"]) for prompt in prompts], max_tokens=400)
    shared = shared_prefix(rows)
    assert len(shared) >= MIN_SHARED_TOKENS
    assert all(row.prompt_ids[: len(shared)] == shared and len(row.prompt_ids) > len(shared) for row in rows)
    assert shared_prefix(rows[:1]) == ()
    short = encode_requests(tokenizer, [(Prompt(f"the {end}"), [" fox"]) for end in "ab"], max_tokens=40)
    assert shared_prefix(short) == ()
    same = encode_requests(tokenizer, [(Prompt(shots), [" fox"])] * 2, max_tokens=400)
    assert len(shared_prefix(same)) == len(same[0].prompt_ids) - 1


def test_batches_hold_what_fits_and_every_row_once(tokenizer: Tokenizer) -> None:
    """Rows of like length stand together, and one that fits nowhere stands alone."""
    texts = ["the " * num for num in (1, 9, 2, 30, 2, 8)]
    rows = encode_requests(tokenizer, [(Prompt(text), [" fox"]) for text in texts], max_tokens=400)
    found = list(batches(rows, lambda batch: len(batch) * batch[0].num_tokens <= 30, length=lambda row: row.num_tokens))
    assert sorted(row.places for batch in found for row in batch) == sorted(row.places for row in rows)
    assert all(len(batch) == 1 or len(batch) * batch[0].num_tokens <= 30 for batch in found)
    assert 1 < len(found) < len(rows)
