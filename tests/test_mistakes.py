"""Mistakes: what pydantic refused is told in one bounded line, whoever wrote the document."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from havoc_core.mistakes import mistakes, nearest


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")
    part: Inner = Inner(size=1)
    rows: list[Inner] = []
    name: str = ""

    @model_validator(mode="after")
    def _is_named(self) -> Form:
        if self.name == "nobody":
            raise ValueError("nobody is\nno name")
        return self


def said(document: object, **how: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Form.model_validate(document)
    return mistakes(caught.value, Form, **how)


@pytest.mark.parametrize(
    ("document", "by_hand", "by_program"),
    [
        ({"part": {"size": "x"}}, "part.size = 'x': input should be a valid integer", "part.size: input should be"),
        ({"part": {}}, "the key part.size is missing", "the key part.size is missing"),
        ({"part": 3}, "part is a section: write [part] on its own line", "part: input should be a valid dict"),
        ({"part": {"size": 1, "siez": 2}}, "unknown key part.siez; did you mean size?", "unknown key part.siez;"),
        ({"rows": [{"size": 1, "a": 2}]}, "unknown key rows.0.a; known are size", "unknown key rows.0.a; known are"),
        ({"zzz": 1}, "unknown key zzz; known are part, rows, name", "unknown key zzz; known are part, rows, name"),
        ({"name": "nobody"}, "nobody is no name", "nobody is no name"),
    ],
)
def test_a_mistake_names_key_and_value(document: object, by_hand: str, by_program: str) -> None:
    """A person's file is quoted and explained, a program's is not copied."""
    assert said(document).startswith(by_hand)
    assert said(document, is_handwritten=False).startswith(by_program)


def test_three_mistakes_are_told_and_the_others_counted() -> None:
    """Five wrong rows are three in words and two in number."""
    line = said({"rows": [{"size": "x"}] * 5})
    assert [f"rows.{row}.size" in line for row in range(5)] == [True, True, True, False, False]
    assert line.endswith(" (and 2 more)")


def test_other_keys_at_the_top() -> None:
    """A file may hold keys that are taken out before it is validated."""
    assert said({"extend": 1}, keys=["extends"]) == "unknown key extend; did you mean extends?"
    assert said({"part": {"extend": 1, "size": 1}}, keys=["extends"]).endswith("known are size")


@given(st.dictionaries(st.text(), st.text() | st.lists(st.integers()), min_size=1))
def test_any_document_is_one_line(document: dict[str, object]) -> None:
    """Keys with line ends and of any length do not break it."""
    try:
        Form.model_validate(document)
    except ValidationError as error:
        line = mistakes(error, Form)
        assert len(line.splitlines()) == 1
        assert len(line) < 3000


def test_what_is_not_pydantics_keeps_its_words() -> None:
    """JSON that is too deep, or a date that JSON has not."""
    assert mistakes(RecursionError("maximum"), Form) == "nested too deep"
    with pytest.raises(TypeError) as caught:
        json.dumps({"a": object()})
    assert "not JSON serializable" in mistakes(caught.value, Form)


def test_the_nearest_word() -> None:
    """One word that is near, or all of them."""
    assert nearest("hots", ["host", "gtx1660"]) == "did you mean host?"
    assert nearest("zzz", ["host", "gtx1660"]) == "known are host, gtx1660"
