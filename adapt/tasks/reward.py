"""The data between a task and a model: a row, its prompt, and the reward of a completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The model's input: text that ends where the completion begins, and at most one PNG image."""

    text: str
    image_png: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """The judgement of one completion.

    `value` is 1.0 for right and 0.0 otherwise. `outcome` "failed" means that the judge could not decide (a sandbox
    failure): such a completion is neither right nor wrong; it is counted, and left out of gradients and accuracies.
    """

    value: float
    outcome: Literal["right", "wrong", "failed"]
    reason: str = ""


RIGHT = Reward(1.0, "right")


def wrong(reason: str) -> Reward:
    """Reward of a completion that was judged wrong."""
    return Reward(0.0, "wrong", reason)
