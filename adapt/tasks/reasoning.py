"""Multiple-choice questions with the columns of ai2_arc ARC-Easy, judged by the answer label mapped to its position.

The built-in rows ask for a place in an order that is given by its first and by shuffled comparisons of neighbours. The
corpus mixes sources: "Who is ..." comes with the order written out, "Which person is ..." mostly with the answer alone.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from .task import RIGHT, Prompt, Reward, Row, Task, wrong

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mia", "Noah")
_SCALES = (("older", "oldest"), ("younger", "youngest"), ("taller", "tallest"), ("faster", "fastest"))
_PLACES = {2: "third", 3: "fourth", 4: "fifth"}
_NUMERIC_LABELS = 0.15
_KEY_SHARE = 0.45
_KEY_TERSE = 0.8

_FIRST = re.compile(r"^(\w+) is the ")
_FACT = re.compile(r"(\w+) is \w+ than (\w+)\.")
_LABEL = re.compile(
    r"(?i:answer)\s*(?:is|:)?\s*:?\s*(?:[^\n()]*\(([A-Za-z]|\d)\)|([A-Z]|\d)\b|([a-z])(?=\s*(?:[.)]|$)))", re.MULTILINE
)
"""After "Answer:", the label alone or in brackets behind the choice's text."""


def _make_row(rng: random.Random, index: int) -> Row:
    order = rng.sample(_NAMES, 5)
    more, most = rng.choice(_SCALES)
    facts = [f"{high} is {more} than {low}." for high, low in itertools.pairwise(order)]
    rng.shuffle(facts)
    place = rng.choice(list(_PLACES))
    subject = "Which person" if rng.random() < _KEY_SHARE else "Who"
    question = f"{order[0]} is the {most}. {' '.join(facts)} {subject} is the {_PLACES[place]} {most}?"
    others = [name for name in order if name != order[place]]
    shown = [order[place], *rng.sample(others, 3)]
    rng.shuffle(shown)
    labels = list("1234" if rng.random() < _NUMERIC_LABELS else "ABCD")
    key = labels[shown.index(order[place])]
    return {"id": f"havoc_{index}", "question": question, "choices": {"text": shown, "label": labels}, "answerKey": key}


def _order(question: str) -> list[str]:
    """Names in the order that a built-in question gives; none for another question."""
    first, below = _FIRST.match(question), dict(_FACT.findall(question))
    if first is None or not below:
        return []
    order = [first[1]]
    while order[-1] in below and len(order) <= len(below):
        order.append(below[order[-1]])
    return order


def _prompt(row: Row) -> Prompt:
    choices = row["choices"]
    lines = [f"{text} ({label})" for label, text in zip(choices["label"], choices["text"], strict=True)]
    return Prompt("\n".join([f"Question: {row['question']}", *lines, ""]))


def _reference(row: Row) -> str:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    final = f"Answer: {texts[labels.index(row['answerKey'])]} ({row['answerKey']})"
    order = _order(row["question"])
    return f"{' > '.join(order)}\n{final}" if order else final


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
