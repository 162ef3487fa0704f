"""The first pass gives every text one name, by likelihood and with the names' own likelihood taken off."""

from __future__ import annotations

import math

import pytest

from havoc_core.adapt.first_pass import FirstPass, asked
from havoc_core.adapt.tasks.task import Prompt
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.likelihood import Continuation, encode_requests

NAMES = ("math", "code")


class Scripted:
    """Likes "code" whatever it reads, and "math" a little more behind a text with a number."""

    def __init__(self, *, code: float = -1.0) -> None:
        self._code = code

    def generate_text(self, prompts: object, **_: object) -> list[str]:
        raise AssertionError("the first pass writes nothing")

    def log_likelihoods(self, requests: list) -> list[list[Continuation]]:
        return [
            [Continuation(self._of(name, prompt.text.partition("\nWhich domain")[0]), 1, False) for name in names]
            for prompt, names in requests
        ]

    def _of(self, name: str, text: str) -> float:
        has_number = any(letter.isdigit() for letter in text)
        return self._code if name == " code" else -3.0 + has_number * 1.0


def test_the_likeliest_name_is_chosen() -> None:
    """As it is, a name that the model likes anyway wins always."""
    prompts = [Prompt("2 and 3"), Prompt("def f():")]
    assert FirstPass(NAMES).choose(Scripted(), prompts) == [1, 1]
    assert FirstPass(NAMES).choose(Scripted(code=-2.5), prompts) == [0, 1]


def test_calibration_takes_a_names_own_likelihood_off() -> None:
    """What a text adds decides; where it adds nothing to any name, the first is taken."""
    prompts = [Prompt("def f():"), Prompt("2 and 3")]
    scorer = Scripted()
    assert FirstPass(NAMES, is_calibrated=True).choose(scorer, prompts) == [0, 0]
    assert FirstPass(("code", "math"), is_calibrated=True).choose(scorer, prompts) == [0, 1]


def test_a_long_text_loses_its_beginning_and_keeps_the_question() -> None:
    """The instruction with every name stands at the end of what is read."""
    tokenizer = load_base("nano").tokenizer
    request = (Prompt(asked("word " * 2000, NAMES)), [" math", " code"])
    rows = encode_requests(tokenizer, [request], max_tokens=256)
    assert all(row.num_dropped > 0 for row in rows)
    assert all(tokenizer.decode(row.prompt_ids).endswith(asked("", NAMES)) for row in rows)


def test_what_is_no_choice_is_refused() -> None:
    """One expert leaves nothing to choose, and a likelihood that is NaN says nothing."""
    with pytest.raises(HavocError, match="at least 2 experts; found math"):
        FirstPass(("math",))
    with pytest.raises(MeasurementError, match="not a number"):
        FirstPass(NAMES).choose(Scripted(code=math.nan), [Prompt("2")])
