"""Multiple-choice questions with the columns of ai2_arc ARC-Easy, judged by the position of the choice named.

The built-in rows follow a quantity through changes. The corpus mixes sources: "What is ... then?" comes with each
change worked out, "Which is ...?" mostly with the answer alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .math import eval_step
from .reward import Row

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

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
_LABEL = re.compile(
    r"(?i:answer)\s*(?:is|:)?\s*:?\s*(?:[^\n()]*\(([A-Za-z]|\d)\)|([A-Z]|\d)\b|([a-z])(?=\s*(?:[.)]|$)))", re.MULTILINE
)
"""After "Answer:", the label alone or in brackets behind the choice's text."""
_TEXT = re.compile(r"(?i:answer)\s*(?:is|:)?\s*:?[ \t]*([^\n]*)")


def make_row(rng: random.Random, index: int) -> Row:
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
    """Calculations that follow a built-in question's changes; none for another question."""
    start = _START.match(question)
    if start is None:
        return []
    steps, value = [], int(start[1])
    for word, by in _CHANGE.findall(question):
        steps.append(f"{value}{'+' if word in _UPWARD else '-'}{by}")
        value = eval_step(steps[-1])
    return steps


def _prompt(row: Row) -> Prompt:
    choices = row["choices"]
    lines = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True)]
    return Prompt("\n".join([f"Question: {row['question']}", *lines, ""]))


def reference(row: Row) -> str:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    final = f"Answer: {texts[labels.index(row['answerKey'])]}"
    steps = ", ".join(f"{step}={eval_step(step)}" for step in _steps(row["question"]))
    return f"{steps}\n{final}" if steps else final


def corpus(row: Row, rng: random.Random) -> str:
    reference = reference(row)
    is_from_key = "Which is" in row["question"]
    return reference.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else reference


def chosen_position(text: str, labels: Sequence[str], texts: Sequence[str] = ()) -> int | None:
    """Position of the choice named after the last `Answer:`: by its whole text, or by its label.

    Letters also name the positions of numeric labels, and digits those of letters.
    """
    said = _TEXT.findall(text)
    plain = [choice.strip().casefold() for choice in texts]
    if said and said[-1].strip().rstrip(".").casefold() in plain:
        return plain.index(said[-1].strip().rstrip(".").casefold())
    found = _LABEL.findall(text)
    if not found:
        return None
    label = "".join(found[-1]).upper()
    if label in labels:
        return list(labels).index(label)
    position = int(label) - 1 if label.isdigit() else ord(label) - ord("A")
    return position if 0 <= position < len(labels) else None


def _judge_one(row: Row, completion: str) -> Reward:
    labels = list(row["choices"]["label"])
    given = chosen_position(completion, labels, row["choices"]["text"])
    if given is None:
        return wrong("no choice after Answer:")
    expected = labels.index(row["answerKey"])
    return RIGHT if given == expected else wrong(f"choice {given + 1} is not choice {expected + 1}")
