"""Promises that every task keeps, whatever its rows look like."""

from __future__ import annotations

import io
import json
import random
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.names import DOMAINS
from havoc_core.adapt.tasks.task import Prompt, Reward, load_task
from havoc_core.errors import HavocError

NUM_ROWS = 120


@pytest.fixture(scope="module", params=DOMAINS)
def task(request):
    return load_task(request.param)


@pytest.fixture(scope="module")
def rows(task):
    return sources.rows(task.name, "train", NUM_ROWS, seed=7)


def test_a_task_knows_where_its_rows_come_from(task):
    """Rows of its own, and the name of the hub where they are public."""
    known = {
        "math": "openai/gsm8k/main",
        "code": "google-research-datasets/mbpp/full",
        "reasoning": "allenai/ai2_arc/ARC-Easy",
        "vision": "lmms-lab/textvqa",
    }
    assert task.dataset == f"built-in {task.name}"
    public = load_task(task.name, is_public=True)
    assert (public.name, public.dataset) == (task.name, known[task.name])


def test_the_domains_are_in_the_order_of_alpha():
    """A mixture's weights follow this order wherever they are written."""
    assert DOMAINS == ("math", "code", "reasoning", "vision")


def test_an_unknown_domain_is_one_line():
    """Another name says which there are."""
    with pytest.raises(HavocError, match="'poetry': .*math, code, reasoning, .*arc-easy"):
        load_task("poetry")


def test_the_reference_is_right(task, rows):
    """What the row itself calls right is judged right, with full reward."""
    rewards = task.judge([(row, task.reference(row)) for row in rows])
    assert {(reward.value, reward.outcome) for reward in rewards} == {(1.0, "right")}


def test_nonsense_is_wrong_and_says_why(task, rows):
    """Empty, unfinished and unrelated text is wrong, never failed, and has a reason."""
    texts = ("", "I do not know.", "####", "Answer:", "Answer: ", "def", "\0", "####" * 500)
    rewards = task.judge([(row, text) for row in rows[:20] for text in texts])
    assert {(reward.value, reward.outcome) for reward in rewards} == {(0.0, "wrong")}
    assert all(reward.reason for reward in rewards)


def test_the_answer_to_another_row_is_seldom_right(task, rows):
    """References shifted by one row score no more than chance does where there are four choices."""
    shifted = [task.reference(row) for row in rows[1:] + rows[:1]]
    num_right = sum(reward.value for reward in task.judge(list(zip(rows, shifted, strict=True))))
    assert num_right < 0.45 * NUM_ROWS


def test_the_judgement_of_a_pair_does_not_depend_on_its_neighbours(task, rows):
    """One by one, together and in another order: the same rewards."""
    some = [(row, task.reference(row)) for row in rows[:6]] + [(row, "nothing") for row in rows[:6]]
    together = task.judge(some)
    assert task.judge(some[::-1])[::-1] == together
    assert [task.judge([pair])[0] for pair in some] == together
    assert task.judge([]) == []


def test_a_prompt_is_the_same_every_time_and_ends_where_the_answer_begins(task, rows):
    """Prompts are pure functions of the row and end with a line break; only vision shows a picture."""
    for row in rows[:30]:
        prompt = task.prompt(row)
        assert prompt == task.prompt(row)
        assert prompt.text.endswith("\n")
        assert (prompt.image_png is not None) == (task.name == "vision")


def test_a_prompt_does_not_give_the_answer_away(task, rows):
    """The reference's working is not in what the model is shown."""
    for row in rows[:30]:
        assert task.reference(row) not in task.prompt(row).text


def test_the_corpus_holds_what_a_base_learns_from(task, rows):
    """Most of the corpus is right, some of it is not the reference: that is the room an expert has."""
    rng = random.Random(1)
    written = [task.corpus(row, rng) for row in rows]
    num_right = sum(reward.value for reward in task.judge(list(zip(rows, written, strict=True))))
    assert num_right > 0.5 * NUM_ROWS
    assert any(text != task.reference(row) for row, text in zip(rows, written, strict=True))
    assert all(written)


def test_the_corpus_is_decided_by_its_random_source(task, rows):
    """The same seed writes the same corpus."""
    first, second = ([task.corpus(row, rng) for row in rows] for rng in (random.Random(4), random.Random(4)))
    assert first == second


def test_a_row_is_decided_by_its_random_source(task):
    """The same random source and index give the same row, and nothing else is drawn from."""
    assert task.make_row(random.Random(3), 11) == task.make_row(random.Random(3), 11)


def test_a_row_is_plain_data(task, rows):
    """Rows hold only what parquet can: JSON values, and PNG bytes in `image`."""
    for row in rows[:20]:
        rest = {name: value for name, value in row.items() if name != "image"}
        assert json.loads(json.dumps(rest)) == rest
        if "image" in row:
            assert Image.open(io.BytesIO(row["image"])).format == "PNG"


def test_reward_and_prompt_are_values():
    """They cannot be changed after they were given."""
    with pytest.raises(AttributeError):
        Reward(1.0, "right").value = 0.0
    with pytest.raises(AttributeError):
        Prompt("text").text = ""
    assert set(get_args(get_type_hints(Reward)["outcome"])) == {"right", "wrong", "failed"}
