from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.choices import chosen_position
from havoc_core.adapt.tasks.task import load_task

TASK = load_task("reasoning")
LETTERS, NUMBERS = list("ABCD"), list("1234")


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("Answer: B", 1),
        ("answer: (c)", 2),
        ("The answer is D.", 3),
        ("Answer:\nB", 1),
        ("Answer: B. Because it is.", 1),
        ("Answer: A\nNo.\nAnswer: C", 2),
        ("Ann, Ben, Cara\nAnswer: A", 0),
    ],
)
def test_the_label_after_the_last_answer_counts(text, position):
    """Case, brackets, a line break and a reason do not matter."""
    assert chosen_position(text, LETTERS) == position


@pytest.mark.parametrize(
    "text", ["", "B", "Answer:", "Answer: E", "Answer: 0", "Answer: 12", "Answer: Ben", "It is B."]
)
def test_what_names_no_choice_is_no_answer(text):
    """Nothing is guessed: neither a name nor a label that does not exist counts."""
    assert chosen_position(text, LETTERS) is None


def row(labels, key):
    return {
        "id": "x",
        "question": "?",
        "choices": {"text": list("vwxyz")[-len(labels) :], "label": labels},
        "answerKey": key,
    }


@pytest.mark.parametrize(
    ("labels", "key", "text", "is_right"),
    [
        (LETTERS, "B", "Answer: B", True),
        (NUMBERS, "2", "Answer: 2", True),
        (NUMBERS, "2", "Answer: B", True),
        (LETTERS, "B", "Answer: 2", True),
        (NUMBERS, "2", "Answer: 1", False),
        (NUMBERS, "1", "Answer: 2", False),
        (list("ABCDE"), "E", "Answer: E", True),
        (list("ABC"), "A", "Answer: D", False),
        (list("BCDA"), "B", "Answer: B", True),
        (list("BCDA"), "A", "Answer: A", True),
    ],
)
def test_labels_are_mapped_by_position(labels, key, text, is_right):
    """ARC has rows keyed "1" to "4": they can be answered, and a label that the row has means its own place."""
    assert (TASK.judge([(row(labels, key), text)])[0].outcome == "right") is is_right


@given(st.text())
def test_any_text_is_a_choice_or_none(text):
    """No completion makes the judge raise."""
    for labels in (LETTERS, NUMBERS, ["A"]):
        position = chosen_position(text, labels)
        assert position is None or 0 <= position < len(labels)


def test_built_in_rows_have_one_right_choice_among_different_ones():
    """Choices are distinct, the key is one of the labels, and both kinds of label occur."""
    rows = sources.rows("reasoning", "train", 300)
    for one in rows:
        choices = one["choices"]
        assert len(set(choices["text"])) == len(choices["text"]) == len(choices["label"])
        assert one["answerKey"] in choices["label"]
    assert {one["choices"]["label"][0] for one in rows} == {"A", "1"}


def test_right_choices_stand_everywhere():
    """No position is right much more often than another, so position says nothing."""
    rows = sources.rows("reasoning", "train", 1000)
    places = [one["choices"]["label"].index(one["answerKey"]) for one in rows]
    assert all(200 < places.count(place) < 300 for place in range(4))


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("Answer: **B**", 1),
        ("**Answer:** B", 1),
        ("Answer: $B$", 1),
        ("Answer: \\boxed{B}", 1),
        ("The answer is `C`.", 2),
        ("Answer: A dog pants to cool itself.", 2),
        ("Answer: a dog pants to cool itself", 2),
        ("Answer: C. A dog pants to cool itself.", 2),
        ("Answer: none of the above", 3),
        ('Answer: "None of the above."', 3),
        ("Answer: A", 0),
        ("Answer: A dog", None),
        ("Answer: A dog barks.", None),
        ("Answer: I think so", None),
        ("Answer: Because", None),
    ],
)
def test_a_text_comes_before_a_letter_and_a_letter_only_alone(text, position):
    """An article is no label; emphasis, quotes and a full stop on either side change nothing."""
    texts = ["A dog has spots.", "A dog is named Rex.", "A dog pants to cool itself.", "None of the above"]
    assert chosen_position(text, LETTERS, texts) == position


def test_the_text_after_the_answer_does_not_count():
    """A model that goes on with the next question is judged by its own."""
    one = row(LETTERS, "B")
    said = "Answer: B\n\nQuestion: Which is cold?\nA. fire\nAnswer: C"
    assert TASK.judge([(one, said)])[0].outcome == "right"


def test_a_real_question_has_its_key_as_reference():
    """A row that is not built in has no working to show."""
    assert TASK.reference(row(LETTERS, "C")) == "Answer: y"


@pytest.mark.parametrize(
    ("text", "position"),
    [("Answer: 41 cm", 1), ("answer is 41 CM.", 1), ("Answer: 41", None), ("Answer: 4 cm", 2), ("Answer: B", 1)],
)
def test_the_whole_text_of_a_choice_names_it(text, position):
    """A choice may be named by its text, whole and alone; a part of one is no answer."""
    assert chosen_position(text, LETTERS, ["45 cm", "41 cm", "4 cm", "29 cm"]) == position


def test_text_that_looks_like_a_label_is_text_first():
    """Where a choice reads "B", saying "B" means that choice."""
    assert chosen_position("Answer: B", LETTERS, ["B", "x", "y", "z"]) == 0
