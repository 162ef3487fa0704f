"""What a task is: rows with a public dataset's columns, a prompt, a reference and a verifiable reward.

A built-in task makes rows procedurally with exactly the columns of the public dataset it stands in for, so the same
code reads the real one. Its corpus is what a base model was pretrained on: like real web text it is a mixture of
sources, some of which show their working and some of which do not (see each domain's module for what "not" means
there).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import HavocError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

DOMAINS = ("math", "code", "reasoning", "vision")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is shown: text that ends where the completion begins, and at most one PNG image."""

    text: str
    image_png: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """The judgement of one completion.

    `value` is 1.0 for right and 0.0 otherwise. `outcome` "failed" means the judge itself could not decide (a sandbox
    failure): such a completion is neither right nor wrong and is left out of gradients and accuracies, and counted.
    """

    value: float
    outcome: Literal["right", "wrong", "failed"]
    reason: str = ""


RIGHT = Reward(1.0, "right")


def wrong(reason: str) -> Reward:
    """Reward of a completion that was judged and is not right."""
    return Reward(0.0, "wrong", reason)


@dataclass(frozen=True, slots=True)
class Task:
    """One domain: where its rows come from and how a completion is judged.

    `dataset` and `subset` name the public dataset whose `columns` every row has. `make_row(rng, index)` makes a
    built-in row. `reference(row)` is a right completion with its working; `corpus(row, rng)` is one as a pretraining
    source would have it, right or not. `judge` takes (row, completion) pairs together because running code is cheaper
    in batches.
    """

    domain: str
    dataset: str
    subset: str | None
    columns: tuple[str, ...]
    make_row: Callable[[random.Random, int], Row]
    prompt: Callable[[Row], Prompt]
    reference: Callable[[Row], str]
    corpus: Callable[[Row, random.Random], str]
    judge: Callable[[Sequence[tuple[Row, str]]], list[Reward]]


def one_by_one(
    judge_one: Callable[[Row, str], Reward],
) -> Callable[[Sequence[tuple[Row, str]]], list[Reward]]:
    """A judge of many completions that asks `judge_one` about each: for tasks where batches save nothing."""

    def judge(pairs: Sequence[tuple[Row, str]]) -> list[Reward]:
        return [judge_one(row, completion) for row, completion in pairs]

    return judge


def task_for(domain: str) -> Task:
    """Return the task of one of `DOMAINS`; another name is a `HavocError`."""
    if domain not in DOMAINS:
        msg = f"unknown domain {domain!r}: choose from {', '.join(DOMAINS)}"
        raise HavocError(msg)
    module = importlib.import_module(f".{domain}", __package__)
    task: Task = module.TASK
    return task


def load_task(name: str, *, is_public: bool = False):  # interim
    from ..interim import load_task as load

    return load(name, is_public=is_public)
