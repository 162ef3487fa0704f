from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.answers import words
from havoc_core.adapt.tasks.task import load_task

TASK = load_task("vision")


@pytest.fixture(scope="module")
def rows():
    return sources.rows("vision", "train", 150)


@pytest.mark.parametrize(
    ("given_answer", "same"),
    [("Stop!", "stop"), ("the  Stop", "stop"), ("A dog.", "dog"), ("3.5", "3.5"), ("35.", "35"), (" yes\n", "Yes")],
)
def test_answers_are_compared_without_case_articles_and_punctuation(given_answer, same):
    """As VQA's metric prescribes; decimal points stay."""
    assert words(given_answer) == words(same)


@pytest.mark.parametrize(("one", "other"), [("3.5", "35"), ("-5", "5"), ("stop", "stop sign"), ("1", "one")])
def test_different_answers_stay_different(one, other):
    """A decimal point and a minus sign inside a number carry meaning."""
    assert words(one) != words(other)


def real(answers, question="what does the sign say?"):
    return {"question": question, "answers": answers, "image_classes": ["Sign"], "ocr_tokens": ["STOP", "NOW"]}


@pytest.mark.parametrize(("num_agreeing", "is_right"), [(10, True), (3, True), (0, False)])
def test_three_of_ten_annotators_make_an_answer_right(num_agreeing, is_right):
    """TextVQA's rule for full credit; fewer give none."""
    row = real(["Stop"] * num_agreeing + [f"other {n}" for n in range(10 - num_agreeing)])
    assert (TASK.judge([(row, "Answer: stop.")])[0].outcome == "right") is is_right


def test_no_answer_of_three_people_leaves_the_most_given_one():
    """Where nobody agrees with two others, what most of them said is right: every row can be answered."""
    row = real(["Stop", "stop!", *[f"other {n}" for n in range(8)]])
    assert TASK.judge([(row, "Answer: stop")])[0].outcome == "right"
    assert TASK.judge([(row, "Answer: other 1")])[0].outcome == "wrong"
    assert TASK.judge([(real(["..."] * 10), "Answer: ...")])[0].outcome == "right"


def test_only_what_follows_the_last_answer_counts():
    """Working before it may say anything."""
    row = real(["25"] * 10)
    assert TASK.judge([(row, "red 2, blue 5\nAnswer: 25")])[0].outcome == "right"
    assert TASK.judge([(row, "Answer: 25\nAnswer: 26")])[0].outcome == "wrong"
    assert TASK.judge([(row, "Answer: 25, or 26, or 27")])[0].outcome == "wrong"


@given(st.text())
def test_any_text_is_judged(text):
    """No completion makes the judge raise."""
    assert TASK.judge([(real(["x"] * 10), text)])[0].outcome in {"right", "wrong"}


def test_a_real_row_has_the_most_given_answer_as_reference():
    """A row that is not built in has no working to show."""
    assert TASK.reference(real(["a"] * 2 + ["stop"] * 8)).endswith("Answer: stop")


def test_pictures_are_real_png_of_one_size(rows):
    """RGB PNG bytes that an image library opens, of the size that the row names, a multiple of the patch."""
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        image.load()
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert image.size == (row["image_width"], row["image_height"])
        assert image.width % 8 == 0
        assert image.height % 8 == 0


def test_the_prompt_shows_the_picture(rows):
    """Text and the row's own PNG."""
    prompt = TASK.prompt(rows[0])
    assert prompt.image_png == rows[0]["image"]
    assert rows[0]["question"] in prompt.text


def test_the_question_cannot_be_answered_without_the_picture(rows):
    """Equal questions have many answers; the commonest answer is a small share."""
    answers = [row["answers"][0] for row in rows]
    assert max(answers.count(answer) for answer in set(answers)) < 0.3 * len(rows)


def test_ten_annotators_as_in_the_real_data(rows):
    """Ten answers a row, and the lists are lists of strings."""
    for row in rows[:20]:
        assert len(row["answers"]) == 10
        assert all(type(word) is str for name in ("answers", "ocr_tokens", "question_tokens") for word in row[name])
