from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.adapt.tasks.answers import found_answer
from havoc_core.adapt.tasks.math import eval_step
from havoc_core.adapt.tasks.numbers import last_number, read_number
from havoc_core.adapt.tasks.task import load_task

TASK = load_task("math")
METRIC = TASK.definition.generate.metrics[0]


def final_number(text):
    answer = found_answer(METRIC, text)
    return read_number(answer) if answer else None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("####72", "72"),
        ("#### -5", "-5"),
        ("#### +7", "7"),
        ("#### 1,000", "1000"),
        ("#### 2,000", "2000"),
        ("#### 1,234,567.89", "1234567.89"),
        ("#### $1,250.", "1250"),
        ("#### $-3", "-3"),
        ("#### 0.50", "0.5"),
        ("#### .5", "0.5"),
        ("#### 12 apples", "12"),
        ("#### 50%", "50"),
        ("#### 3.\n", "3"),
        ("2*3=<<2*3=6>>6\n#### 6", "6"),
        ("#### 5\nno, wait\n#### 6", "6"),
    ],
)
def test_the_number_after_the_last_mark_is_the_answer(text, number):
    """Signs, thousands separators, decimals, a currency sign, a full stop and words behind it."""
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text", ["", "72", "the answer is 72", "###72", "####", "#### ", "#### x", "#### -", "#### $", "####."]
)
def test_without_a_number_after_the_mark_there_is_no_answer(text):
    """Nothing is guessed: a number elsewhere in the text does not count."""
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("gold", "given", "is_right"),
    [
        ("1,000", "1000", True),
        ("1,000", "2,000", False),
        ("1,000", "1", False),
        ("-5", "5", False),
        ("5", "-5", False),
        ("1250", "$1,250.", True),
        ("0.5", ".50", True),
        ("250", "1,250", False),
        ("72", "72.0", True),
        ("72", "72.001", False),
    ],
)
def test_answers_are_compared_by_value(gold, given, is_right):
    """The defects of a published harness: 1,000 is not 2,000, -5 is not 5, $1,250. is not 250."""
    row = {"question": "?", "answer": f"Because.\n#### {gold}"}
    assert (TASK.judge([(row, f"So.\n#### {given}")])[0].outcome == "right") is is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1/2", "1/2"),
        ("1 / 2 of it", "1/2"),
        ("\u00bd", "1/2"),
        ("1 000", "1000"),
        ("1\u00a0000\u202f000", "1000000"),
        ("1'000", "1000"),
        ("1e3", "1000"),
        ("2.5E-1", "1/4"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("\u20ac5", "5"),
        ("\u20ac 5", "5"),
        ("1,00,000", "100000"),
        ("12,34,567.5", "1234567.5"),
        ("**7**", "7"),
        ("$\\$5$", None),
        ("1,2", None),
        ("1.2.3", None),
        ("2 1/2", None),
        ("2\u00bd", None),
        ("5:30", None),
        ("10\u00b2", None),
        ("5 6", None),
        ("5/0", None),
        ("1/2/3", None),
        ("1e999", None),
        ("9" * 5000, None),
    ],
)
def test_a_number_is_read_as_people_write_it_or_not_at_all(text, number):
    """Fractions, groups of every kind, exponents, any minus sign and currency; never a part of another number."""
    assert read_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    ("text", "number"), [("It was 1 000, then 2 000.", 2000), ("5 apples and 1/2 pie", Fraction(1, 2)), ("none", None)]
)
def test_the_last_number_of_a_text_is_found_whole(text, number):
    """A group of digits is not taken for the number that it ends."""
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_any_integer_is_read_with_and_without_separators(number):
    """Whatever the size and sign."""
    assert final_number(f"#### {number}") == final_number(f"#### {number:,}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_any_decimal_is_read_exactly(number):
    """Decimals do not pass through binary floats."""
    assert final_number(f"#### {number:f}") == Fraction(number)


@given(st.text())
def test_any_text_is_an_answer_or_none(text):
    """No completion makes the judge raise."""
    number = final_number(text)
    assert number is None or isinstance(number, Fraction)
    assert TASK.judge([({"question": "?", "answer": "#### 3"}, text)])[0].outcome in {"right", "wrong"}


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+-*"))
def test_a_step_is_what_python_makes_of_it(a, b, operator):
    """The worked lines of the built-in rows are right."""
    assert eval_step(f"{a}{operator}{b}") == eval(f"{a}{operator}{b}")
