from __future__ import annotations

import ast
import io
import itertools
import random
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

import havoc_core.adapt.tasks.sources as sources_module
from havoc_core.adapt.tasks import math, sources
from havoc_core.adapt.tasks.names import DOMAINS
from havoc_core.adapt.tasks.sources import (
    SPLITS,
    RowReader,
    assert_disjoint,
    content_hash,
    problem_hash,
    rows,
    rows_hash,
    search_reader,
)
from havoc_core.adapt.tasks.splits import generated_rows
from havoc_core.adapt.tasks.task import load_task
from havoc_core.errors import HavocError
from havoc_core.model.picture import open_picture

CODE, REASONING, VISION = (load_task(name) for name in ("code", "reasoning", "vision"))
NUM_ROWS = {"math": 2000, "code": 600, "reasoning": 2000, "vision": 150}


@pytest.fixture(scope="module")
def some():
    """Rows of every domain and split, made once."""
    return {domain: {split: rows(domain, split, NUM_ROWS[domain]) for split in SPLITS} for domain in DOMAINS}


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_have_the_columns_that_the_task_and_its_public_one_name(some, domain):
    """Every row has what its own file asks for, and what that of the public dataset it stands in for does."""
    asked = {*load_task(domain).columns, *load_task(domain, is_public=True).columns}
    for split in SPLITS:
        assert all(asked <= set(row) for row in some[domain][split])


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_splits_share_no_problem(some, domain):
    """Train, search and gate are disjoint by hash, and no split holds a problem twice."""
    assert_disjoint(some[domain], load_task(domain))


@pytest.mark.parametrize("domain", ["math", "code", "reasoning"])
def test_the_splits_share_no_prompt(some, domain):
    """What the model is shown in one split, it is never shown in another."""
    prompts = {split: {load_task(domain).prompt(row) for row in some[domain][split]} for split in SPLITS}
    assert not prompts["train"] & prompts["gate"]
    assert not prompts["train"] & prompts["search"]
    assert not prompts["search"] & prompts["gate"]


def test_the_splits_stay_disjoint_across_seeds():
    """A split is a property of the problem, so another seed cannot carry a gate problem into training."""
    gate = {problem_hash(row, CODE) for seed in range(3) for row in rows("code", "gate", 300, seed=seed)}
    train = {problem_hash(row, CODE) for seed in range(3, 6) for row in rows("code", "train", 300, seed=seed)}
    assert not gate & train


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_the_same_every_time_and_a_prefix_of_more(some, domain):
    """The same seed gives the same rows, fewer rows are the first of more, and another seed gives others."""
    num_rows = 20
    first = some[domain]["search"][:num_rows]
    assert rows(domain, "search", num_rows) == first
    assert rows(domain, "search", num_rows, seed=1) != first


def test_rows_do_not_depend_on_what_was_drawn_before():
    """The global `random` plays no part and is left alone."""
    random.seed(5)
    before = random.getstate()
    first = rows("math", "train", 5)
    assert random.getstate() == before
    random.seed(6)
    assert rows("math", "train", 5) == first


# Frozen on purpose: other hashes would move rows between splits, so a base trained before may have seen its gate rows.
FROZEN = {
    "math": ({"question": "1+1?", "answer": "#### 2"}, "93d90d66fd057f74"),
    "code": (
        {"task_id": 1, "text": "Add.", "code": "", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]},
        "c4eb5a7fc1321b9a",
    ),
    "reasoning": (
        {"id": "a", "question": "Who?", "choices": {"text": ["B", "A"], "label": ["1", "2"]}},
        "c002142363d79ceb",
    ),
    "vision": ({"question": "what?", "image": Image.new("RGB", (2, 1), (1, 2, 3))}, "70409356ea02b03e"),
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_decides_the_split_is_frozen(domain):
    """The hash of a given problem never changes."""
    row, expected = FROZEN[domain]
    assert problem_hash(row, load_task(domain))[:16] == expected


@pytest.mark.parametrize("domain", DOMAINS)
def test_thousands_of_rows_are_there(domain):
    """The smallest split of every domain gives a thousand rows and more without running dry."""
    num_rows = 300 if domain == "vision" else 2000
    assert len(rows(domain, "gate", num_rows)) == num_rows


def test_the_splits_are_about_70_15_15():
    """Shares of 4,000 problems, within three standard deviations."""
    make_row = load_task("math").make_row
    counts = dict.fromkeys(SPLITS, 0)
    for index in range(4000):
        counts[sources.split_of(problem_hash(make_row(random.Random(index), index), load_task("math")))] += 1
    assert counts["train"] == pytest.approx(2800, abs=90)
    assert counts["search"] == pytest.approx(600, abs=70)
    assert counts["gate"] == pytest.approx(600, abs=70)


def test_a_generator_that_runs_dry_says_how_many_rows_it_has(monkeypatch):
    """Asking a generator of 40 problems for more ends with the number, not with repeated rows or for ever."""
    monkeypatch.setattr(math, "make_row", lambda rng, index: {"question": f"{rng.randrange(40)}?", "answer": "#### 1"})
    small = load_task("math")
    found = []
    with pytest.raises(HavocError, match=r"\d+ different rows for the train split"):
        found.extend(generated_rows(small, "train", 0))
    num_there = len(list(itertools.islice(generated_rows(small, "train", 0), 20)))
    assert num_there == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maths", "train", 1), "unknown task 'maths': did you mean math?"),
        (("math", "test", 1), "unknown split 'test': choose from train, search, gate"),
        (("math", "train", -1), "give 0 or more"),
    ],
)
def test_wrong_names_and_numbers_are_one_line(arguments, message):
    """A wrong domain, split or count says what is allowed."""
    with pytest.raises(HavocError, match=message) as caught:
        rows(*arguments)
    assert "\n" not in str(caught.value)


def test_no_rows_are_no_rows():
    """Zero is a number of rows."""
    assert rows("math", "gate", 0) == []


# Hashes


def test_a_hash_ignores_ids_and_nothing_else():
    """Another id leaves the content hash as it is; another answer changes it but not which problem it is."""
    row = rows("reasoning", "train", 1)[0]
    assert content_hash(row | {"id": "other"}) == content_hash(row)
    other_key = row | {"answerKey": "?"}
    assert content_hash(other_key) != content_hash(row)
    assert problem_hash(other_key, REASONING) == problem_hash(row, REASONING)


def test_shuffled_choices_are_the_same_problem():
    """An option list in another order does not make a new problem."""
    row = rows("reasoning", "train", 1)[0]
    choices = row["choices"] | {"text": row["choices"]["text"][::-1]}
    assert problem_hash(row | {"choices": choices}, REASONING) == problem_hash(row, REASONING)


def rewritten(png):
    """The same pixels in a file with other compression and metadata."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", "another one")
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).save(file, "PNG", pnginfo=note, compress_level=0)
    return file.getvalue()


def test_a_picture_counts_by_its_pixels():
    """Metadata and compression of the PNG change no hash; one pixel does."""
    row = rows("vision", "train", 1)[0]
    same = row | {"image": rewritten(row["image"])}
    assert same["image"] != row["image"]
    assert content_hash(same) == content_hash(row)
    assert problem_hash(same, VISION) == problem_hash(row, VISION)
    image = Image.open(io.BytesIO(row["image"]))
    image.putpixel((0, 0), (255, 255, 255))
    assert problem_hash(row | {"image": image}, VISION) != problem_hash(row, VISION)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_picture_is_one_line(data):
    """Bytes that are no picture raise `HavocError`."""
    with pytest.raises(HavocError, match="a picture cannot be decoded"):
        open_picture(data)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    """A header that announces more than 50 million pixels is enough to refuse."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    assert len(file.getvalue()) < 20_000
    with pytest.raises(HavocError, match="9000 x 9000 pixels is larger"):
        open_picture(file.getvalue())


def test_rows_hash_names_rows_and_their_order():
    """The same rows have the same hash, in another order another."""
    some_rows = rows("math", "gate", 3)
    assert rows_hash(some_rows) == rows_hash(rows("math", "gate", 3))
    assert rows_hash(some_rows[::-1]) != rows_hash(some_rows)


def test_overlap_is_found_whatever_the_ids_say():
    """A gate problem under another id in the training rows is an error that names both splits."""
    train, gate = rows("code", "train", 5), rows("code", "gate", 5)
    assert_disjoint({"train": train, "gate": gate}, CODE)
    leaked = gate[2] | {"task_id": 999_999, "code": "pass"}
    with pytest.raises(HavocError, match="train and gate splits share"):
        assert_disjoint({"train": [*train, leaked], "gate": gate}, CODE)
    with pytest.raises(HavocError, match="train split .* 2 times"):
        assert_disjoint({"train": [*train, train[0]]}, CODE)


# The search's reader


def test_the_searchs_reader_cannot_open_the_gate():
    """It gives train and search rows as `rows` does, and refuses the gate split."""
    reader = search_reader(seed=3)
    assert reader.rows("math", "search", 4) == rows("math", "search", 4, seed=3)
    assert reader.rows("math", "train", 4) == rows("math", "train", 4, seed=3)
    with pytest.raises(HavocError, match="not the gate split"):
        reader.rows("math", "gate", 1)


def test_a_reader_cannot_be_widened():
    """Its splits cannot be changed after it was handed out."""
    reader = search_reader()
    with pytest.raises(AttributeError):
        reader.splits = SPLITS
    with pytest.raises((AttributeError, TypeError)):
        reader.extra = 1
    assert isinstance(reader, RowReader)


def test_the_search_holds_no_other_key_to_the_rows():
    """Search, training and pretraining never ask for rows of the gate split by name."""
    room = Path(sources_module.__file__).parent.parent
    for name in ("search.py", "training.py", "objectives.py", "reinforce.py", "expected_reward.py", "pretrain.py"):
        tree = ast.parse((room / name).read_text())
        asked = [
            argument.value
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
            if isinstance(argument, ast.Constant)
        ]
        assert "gate" not in asked, name
