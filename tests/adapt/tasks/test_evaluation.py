from __future__ import annotations

import math

import pytest

from havoc_core.adapt.tasks import evaluation, sources
from havoc_core.adapt.tasks.evaluation import Accuracy, score
from havoc_core.adapt.tasks.names import DOMAINS
from havoc_core.adapt.tasks.task import load_task
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.model.likelihood import Continuation


@pytest.mark.parametrize(
    ("num_right", "num_rows", "low", "high"),
    [
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
        (20, 20, 0.8316, 1),
    ],
)
def test_intervals_are_clopper_and_pearsons(num_right, num_rows, low, high):
    """The exact intervals that Newcombe (Statistics in Medicine 17, 1998, 857-872, table I) gives."""
    assert Accuracy("math", num_right, num_rows).interval() == pytest.approx((low, high), abs=6e-5)


def test_no_rows_prove_nothing():
    """Without rows the interval is everything and the share an error."""
    assert Accuracy("code", 0, 0).interval() == (0.0, 1.0)
    with pytest.raises(MeasurementError, match="no row was judged"):
        _ = Accuracy("code", 0, 0).share


@pytest.mark.parametrize("counts", [(2, 1), (-1, 3)])
def test_impossible_counts_are_refused(counts):
    """More right rows than rows is a mistake, not a share above one."""
    with pytest.raises(HavocError, match="impossible"):
        Accuracy("code", *counts)


class Writer:
    """Writes what it is told for each prompt, and remembers how it was asked."""

    def __init__(self, write):
        self.write, self.asked = write, []

    def generate_text(self, prompts, *, max_new_tokens, stop=()):
        self.asked.append((len(prompts), max_new_tokens, tuple(stop)))
        return self.write(prompts)


class Chooser:
    """Holds the texts likely that it is told."""

    def __init__(self, log_p):
        self.log_p, self.asked = log_p, []

    def log_likelihoods(self, requests):
        self.asked += [(prompt.text, tuple(texts)) for prompt, texts in requests]
        return [[Continuation(self.log_p(text), 1, is_greedy=False) for text in texts] for _, texts in requests]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_references_score_all_and_silence_scores_none(domain):
    """A model that writes every reference has 100 %, one that writes nothing has 0 %, with a reason for each row."""
    rows, task = sources.rows(domain, "search", 25), load_task(domain)
    perfect = score(Writer(lambda prompts: [task.reference(row) for row in rows]), task, rows)
    assert perfect.accuracy == Accuracy(domain, 25, 25)
    silent = score(Writer(lambda prompts: [""] * len(prompts)), task, rows)
    assert (silent.accuracy.num_right, silent.failed) == (0, 0)
    assert all(silent.reasons)
    assert not any(perfect.reasons)


def test_prompts_reach_the_model_in_the_order_of_the_rows():
    """Row i is judged by completion i."""
    rows, task = sources.rows("math", "search", 10), load_task("math")
    answers = {task.prompt(row).text: task.reference(row) for row in rows[:5]}
    scores = score(Writer(lambda prompts: [answers.get(prompt.text, "####") for prompt in prompts]), task, rows)
    assert scores.right == (True,) * 5 + (False,) * 5


def test_rows_are_asked_in_pieces_and_progress_is_told(monkeypatch):
    """The verdicts are those of all rows at once, and the task's own limits reach the model unless others are given."""
    monkeypatch.setattr(evaluation, "_CHUNK_ROWS", 4)
    rows, task = sources.rows("math", "search", 10), load_task("math")
    answers = {task.prompt(row).text: task.reference(row) for row in rows[::2]}
    writer, told = Writer(lambda prompts: [answers.get(prompt.text, "") for prompt in prompts]), []
    assert score(writer, task, rows, advance=told.append).right == (True, False) * 5
    assert told == [4, 4, 2]
    assert writer.asked == [(num, task.max_new_tokens, task.stop) for num in told]
    score(writer, task, rows[:1], max_new_tokens=3)
    assert writer.asked[-1] == (1, 3, task.stop)
    score(writer, task, rows[:4], max_new_tokens=evaluation._CHUNK_TOKENS // 3)
    assert [num for num, _, _ in writer.asked[-2:]] == [3, 1]


def test_a_failed_judgement_is_left_out_of_the_share_and_reported():
    """A row whose own test is broken is neither right nor wrong."""
    rows = sources.rows("code", "search", 4)
    rows[1] = rows[1] | {"test_list": ["this is no test"]}
    scores = score(Writer(lambda prompts: [row["code"] for row in rows]), load_task("code"), rows)
    assert scores.right == (True, False, True, True)
    assert (scores.failed, scores.failed_rows) == (1, (1,))
    assert scores.accuracy == scores.metrics["pass"] == Accuracy("code", 3, 3)


def test_a_model_that_loses_prompts_is_an_error():
    """Fewer answers than prompts, or than choices, are not paired up by chance."""
    with pytest.raises(MeasurementError, match="3 prompts gave 2"):
        score(Writer(lambda prompts: ["", ""]), load_task("math"), sources.rows("math", "search", 3))
    chooser = Chooser(lambda text: -1.0)
    chooser.log_likelihoods = lambda requests: [[Continuation(-1.0, 1, is_greedy=False)]]
    with pytest.raises(MeasurementError, match="2 prompts gave 1"):
        score(chooser, load_task("arc-easy"), CHOICES[:1])


CHOICES = [
    {"id": "a", "question": "Which?", "choices": {"text": ["abcd", "xy"], "label": ["A", "B"]}, "answerKey": "B"},
    {"id": "b", "question": "And?", "choices": {"text": ["xyz", "abc", "k"], "label": list("123")}, "answerKey": "1"},
]


def test_the_likeliest_choice_is_taken_as_it_is_and_by_its_length():
    """acc by the sum, acc_norm by the sum over the number of characters, the delimiter not counted."""
    task = load_task("arc-easy")
    chooser = Chooser(lambda text: {" abcd": -3.0, " xy": -2.0, " xyz": -3.0, " abc": -2.9, " k": -2.95}[text])
    scores = score(chooser, task, CHOICES)
    assert scores.right_by == {"acc": (True, False), "acc_norm": (False, False)}
    assert scores.metrics == {"acc": Accuracy("arc-easy", 1, 2), "acc_norm": Accuracy("arc-easy", 0, 2)}
    assert (scores.right, scores.completions) == ((True, False), ("xy", "abc"))
    assert scores.reasons == ("", "choice 2 is not choice 1")
    assert chooser.asked[0] == ("Question: Which?\nAnswer:", (" abcd", " xy"))


def test_of_equally_likely_choices_the_first_is_taken():
    """As numpy's argmax, and so lm-evaluation-harness, does."""
    assert score(Chooser(lambda text: -1.0), load_task("arc-easy"), CHOICES).right_by["acc"] == (False, True)


def test_a_log_likelihood_that_is_no_number_is_a_failed_row():
    """A broken model is not wrong by the choice that happens to stand first."""
    chooser = Chooser(lambda text: math.nan if text == " abcd" else -1.0)
    scores = score(chooser, load_task("arc-easy"), CHOICES)
    assert (scores.failed_rows, scores.right) == ((0,), (False, True))
    assert "not a number" in scores.reasons[0]


def test_prompts_that_lost_their_beginning_are_counted():
    """A row counts once, however many of its choices were cut."""
    chooser = Chooser(lambda text: -1.0)
    chooser.log_likelihoods = lambda requests: [
        [Continuation(-1.0, 1, is_greedy=False, num_dropped=len(prompt.text) % 2) for _ in texts]
        for prompt, texts in requests
    ]
    expected = sum(len(load_task("arc-easy").prompt(row).text) % 2 for row in CHOICES)
    assert score(chooser, load_task("arc-easy"), CHOICES).num_cut == expected
