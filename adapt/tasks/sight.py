"""Check that a model can read the pictures of a task: its patches divide them, and its context holds them. No torch.

A picture takes one token per patch. The rest of the context is for the question and the answer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import HavocError

if TYPE_CHECKING:
    from ...model.checkpoint import Base
    from ...model.config import HavocConfig
    from .asked import Task

_QUESTION_TOKENS = 32
"""Tokens for the question, which is one sentence; the check of the prompt itself finds longer ones."""


def require_fitting_pictures(task: Task, config: HavocConfig) -> None:
    """Refuse, before any work, pictures that the model's patches do not divide or that its context cannot hold."""
    if config.vision is None or not task.needs_pictures:
        return
    side, patch = task.image_side, config.vision.patch_size
    room = max(config.max_seq_len - task.max_new_tokens - _QUESTION_TOKENS, 0)
    num_tokens = (side // patch) ** 2
    if side % patch:
        problem = f"are not a multiple of the model's patches of {patch} x {patch}"
    elif num_tokens > room:
        problem = (
            f"take {num_tokens:,} tokens, but with question and answer the model's context has room for only {room:,}"
        )
    else:
        return
    raise HavocError(f"{task.name}: pictures of {side} x {side} pixels {problem}; {_advice(task, patch, room)}")


def _advice(task: Task, patch: int, room: int) -> str:
    largest = min(math.isqrt(room), max(task.image_side // patch, 1)) * patch
    if largest == 0 or task.generator is not None:
        return "take another base"
    return f"write image_side = {largest} under [prompt] in a copy of the task's file, and use the copy as the task"


def require_sight(task: Task, base: Base) -> None:
    """Refuse a task with pictures if the base is text-only, or if the pictures do not fit it."""
    if task.needs_pictures and base.config.vision is None:
        raise HavocError(f"the base reads text only, but the task {task.name} shows pictures: choose another --task")
    require_fitting_pictures(task, base.config)
