"""Multiple-choice questions with the columns of ai2_arc ARC-Easy, judged by the answer label mapped to its position.

The built-in rows ask for a place in an order given by shuffled comparisons. The corpus mixes sources: "Who is ..."
comes with the order written out, "Which person is ..." mostly with the label alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .task import RIGHT, Prompt, Reward, Row, Task, wrong

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate", "Liam", "Mia", "Noah")
_SCALES = (("older", "younger", "old", "young"), ("taller", "shorter", "tall", "short"), ("faster", "slower", "fast", "slow"))
_PLACES = ("first", "second", "third", "fourth")
_KEY_SHARE = 0.45
_KEY_TERSE = 0.8

_FACT = re.compile(r"(\w+) is (\w+) than (\w+)\.")
_LABEL = re.compile(r"answer\s*(?:is|:)?\s*\(?([A-Za-z]|\d)\b", re.IGNORECASE)


def _make_row(rng: random.Random, index: int) -> Row:
    order = rng.sample(_NAMES, 4)
    more, less, *_ = rng.choice(_SCALES)
    facts = []
    for high, low in zip(order, order[1:], strict=False):
        facts.append(f"{high} is {more} than {low}." if rng.random() < 0.5 else f"{low} is {less} than {high}.")
    rng.shuffle(facts)
    place = rng.randrange(4)
    subject = "Which person" if rng.random() < _KEY_SHARE else "Who"
    question = f"{' '.join(facts)} {subject} is {_PLACES[place]} when the {more} comes before the {less}?"
    shown = rng.sample(order, 4)
    labels = list("1234" if rng.random() < 0.15 else "ABCD")
    key = labels[shown.index(order[place])]
    return {"id": f"havoc_{index}", "question": question, "choices": {"text": shown, "label": labels}, "answerKey": key}


def _order(question: str) -> list[str]:
    """Names in the order that the built-in question's comparisons give."""
    above: dict[str, str] = {}
    more = {scale[0] for scale in _SCALES}
    for left, word, right in _FACT.findall(question):
        high, low = (left, right) if word in more else (right, left)
        above[high] = low
    order = [next(name for name in above if name not in above.values())]
    while order[-1] in above:
        order.append(above[order[-1]])
    return order


def _prompt(row: Row) -> Prompt:
    choices = row["choices"]
    lines = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True)]
    return Prompt("\n".join([f"Question: {row['question']}", *lines, ""]))


def _reference(row: Row) -> str:
    final = f"Answer: {row['answerKey']}"
    return f"{' > '.join(_order(row['question']))}\n{final}" if _FACT.search(row["question"]) else final


def _corpus(row: Row, rng: random.Random) -> str:
    reference = _reference(row)
    is_from_key = "Which person" in row["question"]
    return reference.splitlines()[-1] if is_from_key and rng.random() < _KEY_TERSE else reference


def chosen_position(text: str, labels: Sequence[str]) -> int | None:
    """Position of the label given after the last `Answer:`; letters also name positions of numeric labels and back."""
    found = _LABEL.findall(text)
    if not found:
        return None
    label = found[-1].upper()
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
