"""Judge what a model wrote: find the answer by a metric's rule and compare it with the row's gold answer.

Training, search and scoring use the same rules. If a rule cannot read a row's own reference (a gold of `1/2` where only
whole numbers are searched), it is not used on that row: the numbers are then compared by value.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from typing import TYPE_CHECKING

from .choices import chosen_position
from .numbers import last_number, read_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .definition import TaskMetric

_MAX_CODE_LINES = 400
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*$", re.MULTILINE)


def found_answer(metric: TaskMetric, text: str) -> str | None:
    """Return the part of `text` that is the answer by the metric's rule; None if there is none."""
    if metric.extract is None:
        return text.strip()
    found = re.findall(metric.extract, text)
    if not found:
        return text.strip() if metric.is_whole_without else None
    chosen = found[0 if metric.which == "first" else -1]
    groups = chosen if isinstance(chosen, tuple) else (chosen,)
    return next((group.strip() for group in groups if group), None)


def comparable(metric: TaskMetric, answer: str) -> str:
    """Return `answer` without what the metric ignores; applied to both sides of a comparison."""
    for pattern in metric.ignore:
        answer = re.sub(pattern, "", answer)
    return answer.lower() if metric.ignore_case else answer


def why_text_is_wrong(metric: TaskMetric, text: str, gold: str, reference: str) -> str:
    """Why `text` is not right by a metric that compares text; empty when it is."""
    expected = comparable(metric, gold).strip()
    if not _reads(metric, reference, expected) and (number := read_number(expected)) is not None:
        return _why_number_is_wrong(metric, text, number)
    answer = found_answer(metric, text)
    if not answer:
        return "no answer found"
    given = comparable(metric, answer)
    return "" if given == expected else f"{given[:80]!r} is not {expected[:80]!r}"


def _reads(metric: TaskMetric, reference: str, expected: str) -> bool:
    answer = found_answer(metric, reference)
    return answer is not None and comparable(metric, answer) == expected


def _why_number_is_wrong(metric: TaskMetric, text: str, expected: object) -> str:
    tail = text
    for pattern in metric.ignore:
        tail = re.sub(pattern, "", tail)
    given = read_number(tail)
    if given is None and metric.which == "last":
        given = last_number(text)
    if given is None:
        return "no number found"
    return "" if given == expected else f"{given} is not {expected}"


def why_number_is_wrong(metric: TaskMetric, text: str, gold: str) -> str:
    """Why `text` is not right by a metric that compares numbers; empty when it is."""
    answer, expected = found_answer(metric, text), read_number(gold)
    given = read_number(answer) if answer else None
    if given is None:
        return "no number found"
    return "" if given == expected else f"{given} is not {expected}"


def why_choice_is_wrong(
    text: str, right: int, labels: Sequence[str], texts: Sequence[str], *, needs_cue: bool = True
) -> str:
    """Why `text` does not name the right choice; empty when it does."""
    given = chosen_position(text, labels, texts, needs_cue=needs_cue)
    if given is None:
        return "no choice after Answer:" if needs_cue else "no choice is named"
    return "" if given == right or texts[given] == texts[right] else f"choice {given + 1} is not choice {right + 1}"


def why_words_are_wrong(metric: TaskMetric, text: str, golds: Sequence[str]) -> str:
    """Why too few gold answers have the words of `text`; empty if enough have them."""
    given = words(found_answer(metric, text) or "")
    if not given:
        return "empty answer"
    counts = Counter(words(gold) for gold in golds)
    needed = min(metric.agreeing, max(counts.values()))
    return "" if counts[given] >= needed else f"{given[:80]!r} was given by {counts[given]} of {len(golds)}"


def most_agreed(golds: Sequence[str]) -> str:
    """Return the gold answer whose words are the most frequent, as first written."""
    counts = Counter(words(gold) for gold in golds)
    most = max(counts, key=lambda gold: counts[gold])
    return next(gold for gold in golds if words(gold) == most)


def words(answer: str) -> str:
    """Lower case, no punctuation except decimal points and minus signs in numbers, no articles, single spaces.

    If nothing would be left, the answer stays as it is.
    """
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.\-]", " ", answer.lower())
    kept = " ".join(word for word in text.split() if word not in {"a", "an", "the"})
    return kept or " ".join(answer.lower().split())


def program(text: str) -> str:
    """Return the code in an answer: its first ``` block, or without one the lines before the first that is not code.

    A closing fence without an opening one (the prompt had the opening one) ends the code. Text after the code is left
    out if the lines before it are a program.
    """
    fences = list(_FENCE.finditer(text))
    if fences:
        first = fences[0]
        before = text[: first.start()]
        if not first[1] and _is_code(before):
            return before
        end = fences[1].start() if len(fences) > 1 else len(text)
        return _code_in_front(text[first.end() : end].lstrip("\n"))
    return _code_in_front(text)


def _code_in_front(text: str) -> str:
    if _parses(text):
        return text
    lines = text.splitlines(keepends=True)[:_MAX_CODE_LINES]
    fronts = ("".join(lines[:num]) for num in range(len(lines) - 1, 0, -1))
    return next((front for front in fronts if _is_code(front)), text)


def _is_code(text: str) -> bool:
    """Whether `text` parses and defines something."""
    tree = _parses(text)
    return tree is not None and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)


def _parses(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
