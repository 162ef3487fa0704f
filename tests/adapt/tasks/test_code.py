from __future__ import annotations

import random
import sys

import pytest

from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.code import python2
from havoc_core.adapt.tasks.task import load_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="model-written code is confined on Linux only")

TASK = load_task("code")

ROW = {
    "task_id": 601,
    "text": "Write a function to double each number.",
    "code": "def double(xs):\r\n    return [x * 2 for x in xs]",
    "test_list": ["assert double([1, 2]) == [2, 4]", "assert double([]) == []", "assert double([3]) == [6]"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def outcome(completion, **changes):
    return TASK.judge([(ROW | changes, completion)])[0].outcome


@pytest.mark.parametrize(
    "completion",
    [
        ROW["code"],
        "def double(xs): return [x + x for x in xs]",
        "import itertools\ndef double(xs):\n    return list(itertools.chain(x * 2 for x in xs))",
        "def helper(x): return 2 * x\ndef double(xs):\n    print('working')\n    return list(map(helper, xs))",
        "```python\ndef double(xs): return [x * 2 for x in xs]\n```",
        "Here it is:\n\n```\ndef double(xs): return [x * 2 for x in xs]\n```\nIt doubles.\n```python\nfoo(\n```",
        "def double(xs): return [x * 2 for x in xs]\n```\n\nThis function doubles.",
        "def double(xs):\n    return [x * 2 for x in xs]\n\nThis function doubles each number of a list.",
        "def double(xs): return [x * 2 for x in xs]\nWrite a function to halve each number.\ndef double(xs): return xs",
        "double = lambda xs: [2 * x for x in xs]\nif __name__ == '__main__':\n    1 / 0",
    ],
)
def test_any_function_that_passes_the_tests_is_right(completion):
    """It is the values that count, not the text."""
    assert outcome(completion) == "right"


@pytest.mark.parametrize(
    "completion",
    [
        "def double(xs): return [2, 4]",
        "def double(xs): return map(lambda x: x * 2, xs)",
        "def double(xs): return tuple(x * 2 for x in xs)",
        "def Double(xs): return [x * 2 for x in xs]",
        "def double(xs):\nreturn [x * 2 for x in xs]",
        "class A(list):\n    def __eq__(self, o): return True\ndef double(xs): return A()",
        "import sys\ndef double(xs): sys.exit(0)",
        "import os\ndef double(xs): os._exit(0)",
        "print 'hello'",
    ],
)
def test_anything_else_is_wrong(completion):
    """Passing one test, another type, another name, broken syntax, cheats."""
    assert outcome(completion) == "wrong"


def test_setup_code_of_the_row_is_run():
    """`test_setup_code` prepares what the tests use."""
    changes = {"test_setup_code": "data = [5]", "test_list": ["assert double(data) == [10]"]}
    assert outcome(ROW["code"], **changes) == "right"


@pytest.mark.parametrize(
    "text",
    [
        "def f(",
        "```",
        "```python",
        "x" * 50_000,
        "(" * 5000,
        "\0",
        "```python\ndef f(:\n```",
        "def f():\n" + "  pass\n" * 3000,
    ],
)
def test_the_code_in_any_text_is_found_without_an_error(text):
    """What is no code is judged as it stands."""
    assert outcome(text) == "wrong"


def test_no_set_up_is_empty_set_up():
    """A null in `test_setup_code` prepares nothing."""
    assert outcome(ROW["code"], test_setup_code=None) == "right"


def test_a_test_that_no_code_can_be_judged_by_is_nobodys_fault():
    """A broken row gives "failed": it must not push the policy anywhere."""
    reward = TASK.judge([(ROW | {"test_list": ["double([1])"]}, ROW["code"])])[0]
    assert (reward.outcome, reward.value) == ("failed", 0.0)


def test_the_built_in_tests_tell_right_from_wrong():
    """Every built-in row has three tests that its code passes and that a constant does not."""
    rows = sources.rows("code", "train", 60, seed=2)
    assert all(len(row["test_list"]) == 3 for row in rows)
    constant = [(row, f"def {row['code'].split('(')[0][4:]}(xs): return 0") for row in rows]
    assert sum(reward.value for reward in TASK.judge(constant)) < 0.1 * len(rows)


def test_old_pages_write_python_2():
    """What `python2` writes differs from the reference, and today's interpreter turns most of it down."""
    rows = [row for row in sources.rows("code", "train", 200, seed=2) if python2(row["code"]) != row["code"]]
    assert len(rows) > 100
    rewards = TASK.judge([(row, python2(row["code"])) for row in rows])
    assert sum(reward.value for reward in rewards) < 0.4 * len(rows)
    assert {reward.outcome for reward in rewards} <= {"right", "wrong"}


def test_only_pages_that_say_python_hold_python_2():
    """A row phrased "Write a function to ..." has the reference in the corpus, always."""
    rng = random.Random(0)
    rows = [row for row in sources.rows("code", "train", 200, seed=2) if row["text"].startswith("Write a function")]
    assert rows
    assert all(TASK.corpus(row, rng) == row["code"] for row in rows)
