"""Multiple-choice questions with the columns of ai2_arc ARC-Easy, judged by the answer label mapped to its position.

The built-in rows follow a thing through swaps. The corpus mixes sources: "Who has ..." comes with its holder after each
swap written out, "Which person has ..." mostly with the label alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .task import RIGHT, Prompt, Reward, Row, Task, wrong

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mia", "Noah")
_THINGS = ("ball", "book", "card", "coin", "cup", "key", "map", "pen")
_NUM_SWAPS = 5
_NUMERIC_LABELS = 0.15
_KEY_SHARE = 0.45
_KEY_TERSE = 0.8

_START = re.compile(r"^(\w+) has the ")
_SWAP = re.compile(r"(\w+) and (\w+) swap\.")
_LABEL = re.compile(r"(?i:answer)\s*(?:is|:)?\s*:?\s*\(?(?:([A-Z]|\d)\b|([a-z])(?=\s*(?:[.)]|$)))", re.MULTILINE)


def _make_row(rng: random.Random, index: int) -> Row:
    people = rng.sample(_NAMES, 4)
    thing = rng.choice(_THINGS)
    swaps = [rng.sample(people, 2) for _ in range(_NUM_SWAPS)]
    subject = "Which person" if rng.random() < _KEY_SHARE else "Who"
    facts = " ".join(f"{left} and {right} swap." for left, right in swaps)
    question = f"{rng.choice(people)} has the {thing}. {facts} {subject} has the {thing} now?"
    shown = rng.sample(people, 4)
    labels = list("1234" if rng.random() < _NUMERIC_LABELS else "ABCD")
    key = labels[shown.index(_holders(question)[-1])]
    return {"id": f"havoc_{index}", "question": question, "choices": {"text": shown, "label": labels}, "answerKey": key}


def _holders(question: str) -> list[str]:
    """Who holds the thing at the start and after each swap of a built-in question; nobody for another question."""
    start = _START.match(question)
    if start is None:
        return []
    holders = [start[1]]
    for left, right in _SWAP.findall(question):
        holder = holders[-1]
        holders.append({left: right, right: left}.get(holder, holder))
    return holders


def _prompt(row: Row) -> Prompt:
    choices = row["choices"]
    lines = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True)]
    return Prompt("\n".join([f"Question: {row['question']}", *lines, ""]))


def _reference(row: Row) -> str:
    final, holders = f"Answer: {row['answerKey']}", _holders(row["question"])
    return f"{', '.join(holders)}\n{final}" if holders else final


def _corpus(row: Row, rng: random.Random) -> str:
    reference = _reference(row)
    is_from_key = "Which person" in row["question"]
    return reference.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else reference


def chosen_position(text: str, labels: Sequence[str]) -> int | None:
    """Position of the label given after the last `Answer:`; letters also name positions of numeric labels and back."""
    found = _LABEL.findall(text)
    if not found:
        return None
    label = "".join(found[-1]).upper()
    if label in labels:
        return labels.index(label)
    position = int(label) - 1 if label.isdigit() else ord(label) - ord("A")
    return position if 0 <= position < len(labels) else None


def _judge(pairs: Sequence[tuple[Row, str]]) -> list[Reward]:
    return [_judge_one(row, completion) for row, completion in pairs]


def _judge_one(row: Row, completion: str) -> Reward:
    labels = list(row["choices"]["label"])
    given = chosen_position(completion, labels)
    if given is None:
        return wrong("no label after Answer:")
    expected = labels.index(row["answerKey"])
    return RIGHT if given == expected else wrong(f"choice {given + 1} is not choice {expected + 1}")


TASK = Task(
    domain="reasoning",
    dataset="allenai/ai2_arc",
    subset="ARC-Easy",
    columns=("id", "question", "choices", "answerKey"),
    make_row=_make_row,
    prompt=_prompt,
    reference=_reference,
    corpus=_corpus,
    judge=_judge,
)
