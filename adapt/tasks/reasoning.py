"""Multiple-choice questions with the columns of ARC-Easy; `files/reasoning.toml` says how they are asked and judged.

The built-in rows follow a quantity through changes. The corpus mixes sources: "What is ... then?" comes with all steps,
"Which is ...?" mostly with only the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .math import eval_step

if TYPE_CHECKING:
    import random

    from .reward import Row

_QUANTITIES = (
    ("The temperature", "degrees", "rises", "falls"),
    ("The plant", "cm", "grows", "shrinks"),
    ("The water level", "cm", "climbs", "sinks"),
    ("The battery", "percent", "charges", "drains"),
    ("The lamp", "watts", "goes up", "goes down"),
)
_NUM_CHANGES = 3
_NUMERIC_LABELS = 0.15
_KEY_SHARE = 0.45
_KEY_TERSE = 0.8

_START = re.compile(r"^The [a-z ]+ is at (\d+) ")
_CHANGE = re.compile(r"\b(rises|grows|climbs|charges|goes up|falls|shrinks|sinks|drains|goes down) by (\d+)\b")
_UPWARD = frozenset(up for _, _, up, _ in _QUANTITIES)


def make_row(rng: random.Random, index: int) -> Row:
    """Generate one question, four choices and the key."""
    thing, unit, up, down = rng.choice(_QUANTITIES)
    value = rng.randint(20, 60)
    start, changes = value, []
    for _ in range(_NUM_CHANGES):
        by, is_upward = rng.randint(2, 9), rng.choice((True, False))
        value += by if is_upward else -by
        changes.append(f"{up if is_upward else down} by {by}")
    ending = "Which is its value then?" if rng.random() < _KEY_SHARE else "What is its value then?"
    question = f"{thing} is at {start} {unit}. It {', '.join(changes)}. {ending}"
    shown = [value, *rng.sample([other for other in range(value - 12, value + 13) if other != value], 3)]
    rng.shuffle(shown)
    labels = list("1234" if rng.random() < _NUMERIC_LABELS else "ABCD")
    choices = {"text": [f"{number} {unit}" for number in shown], "label": labels}
    key = labels[shown.index(value)]
    return {"id": f"havoc_{index}", "question": question, "choices": choices, "answerKey": key}


def _steps(question: str) -> list[str]:
    """Calculations for a built-in question's changes; empty for other questions."""
    start = _START.match(question)
    if start is None:
        return []
    steps, value = [], int(start[1])
    for word, by in _CHANGE.findall(question):
        steps.append(f"{value}{'+' if word in _UPWARD else '-'}{by}")
        value = eval_step(steps[-1])
    return steps


def reference(row: Row) -> str:
    """Return the steps for each change, then the answer."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    final = f"Answer: {texts[labels.index(row['answerKey'])]}"
    steps = ", ".join(f"{step}={eval_step(step)}" for step in _steps(row["question"]))
    return f"{steps}\n{final}" if steps else final


def corpus(row: Row, rng: random.Random) -> str:
    """Return the answer with or without its steps."""
    worked = reference(row)
    is_from_key = "Which is" in row["question"]
    return worked.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else worked
