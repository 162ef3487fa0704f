"""Grade-school word problems with the columns of gsm8k; `files/math.toml` says how they are asked and judged.

The corpus mixes two kinds of source. Problems that end with a question come from worked solutions; problems that end
with "Find ..." come mostly from answer keys, which have only the last line. A base model learns both kinds of answer;
an expert learns which kind gets the number right.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from .reward import Row

_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Liam")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
_KEY_SHARE = 0.3
"""Share of the rows with the wording of answer keys."""
_KEY_TERSE = 0.8
"""Share of these rows whose corpus text has only the last line."""


def make_row(rng: random.Random, index: int) -> Row:  # noqa: ARG001 - every task has this signature
    """Generate one problem and its worked answer."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    story, steps, goal = rng.choice((_buys, _gives, _packs, _reads))(rng, name, thing)
    ending = f"Find {goal}." if rng.random() < _KEY_SHARE else f"What is {goal}?"
    lines = [f"{step}=<<{step}={eval_step(step)}>>{eval_step(step)}" for step in steps]
    return {"question": f"{story} {ending}", "answer": "\n".join([*lines, f"#### {eval_step(steps[-1])}"])}


def eval_step(step: str) -> int:
    """Value of `a+b`, `a-b` or `a*b` with whole numbers."""
    left, operator, right = re.split(r"([-+*])", step)
    a, b = int(left), int(right)
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


_Problem = tuple[str, list[str], str]


def _buys(rng: random.Random, name: str, thing: str) -> _Problem:
    a, b, c = rng.randint(10, 60), rng.randint(2, 9), rng.randint(2, 9)
    story = f"{name} has {a} {thing} and buys {b} bags with {c} {thing} in each."
    return story, [f"{b}*{c}", f"{a}+{b * c}"], f"the number of {thing} {name} has now"


def _gives(rng: random.Random, name: str, thing: str) -> _Problem:
    a, b, c = rng.randint(40, 99), rng.randint(10, 39), rng.randint(10, 60)
    story = f"{name} had {a} {thing}, gave away {b} and then found {c} more."
    return story, [f"{a}-{b}", f"{a - b}+{c}"], f"the number of {thing} {name} has in the end"


def _packs(rng: random.Random, name: str, thing: str) -> _Problem:
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    story = f"{name} fills {a} boxes with {b} {thing} each and {c} boxes with {d} {thing} each."
    return story, [f"{a}*{b}", f"{c}*{d}", f"{a * b}+{c * d}"], f"the number of {thing} in all boxes"


def _reads(rng: random.Random, name: str, thing: str) -> _Problem:
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    c = a * b + rng.randint(2, 40)
    story = f"{name} needs {c} {thing} and gets {a} a day for {b} days."
    return story, [f"{a}*{b}", f"{c}-{a * b}"], f"the number of {thing} still needed"


def reference(row: Row) -> str:
    """Return the worked answer."""
    return str(row["answer"])


def corpus(row: Row, rng: random.Random) -> str:
    """Return the answer in the form of a solution or of an answer key."""
    answer = reference(row)
    is_from_key = "Find the" in row["question"]
    return answer.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else answer
