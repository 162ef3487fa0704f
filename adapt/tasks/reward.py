"""What passes between a task and a model: a row, the prompt it becomes, and the reward of what was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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
