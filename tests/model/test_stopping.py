"""Stop strings: an answer ends where its text says so, however its tokens are cut."""

from __future__ import annotations

import pytest

from havoc_core.errors import HavocError
from havoc_core.model.stopping import StopStrings, cut
from havoc_core.model.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Question: 1 + 1\nAnswer: 2\n\nQuestion: é"] * 6, 300)


@pytest.mark.parametrize("stop", ["\n\nQuestion:", "uest", "\n", "é", "2\n\nQ", "zqjxwzqjxw"])
def test_a_string_is_found_at_the_token_that_completes_it(tokenizer: Tokenizer, stop: str) -> None:
    """Over token boundaries, inside a token, one token a byte, two tokens a character; never before."""
    ids = tokenizer.encode("Answer: 2\n\nQuestion: é and more zqjxwzqjxw")
    stops = StopStrings(tokenizer, ["never there", stop])
    first = next(num for num in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:num]))
    reached = stops.are_reached([ids[:num] for num in range(1, first + 1)])
    assert reached == [False] * (first - 1) + [True]


def test_a_string_is_found_behind_a_long_text(tokenizer: Tokenizer) -> None:
    """Only the last tokens are looked at, and those suffice."""
    ids = tokenizer.encode("1 + " * 200 + "\n\nQuestion:")
    assert StopStrings(tokenizer, ["\n\nQuestion:"]).are_reached([ids, ids[:-1]]) == [True, False]


def test_a_special_token_ends_by_its_id(tokenizer: Tokenizer) -> None:
    """Its text is left out of what is decoded, so its id is what ends an answer."""
    assert StopStrings(tokenizer, ["<eos>", "x"]).token_ids == (tokenizer.eos_id,)
    assert StopStrings(tokenizer, ["eos"]).token_ids == ()


def test_text_is_cut_before_the_first_of_the_strings() -> None:
    """Whichever stands first in the text; without one nothing is cut."""
    assert cut("a b c", ["c", "b"]) == "a "
    assert cut("a b c", ["d"]) == "a b c"
    assert cut("a b c", []) == "a b c"


def test_an_empty_string_is_refused(tokenizer: Tokenizer) -> None:
    """It would end every answer before its first token."""
    with pytest.raises(HavocError, match="a stop string is empty"):
        StopStrings(tokenizer, ["", "x"])
