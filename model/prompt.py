"""What every part that reads prompts asks of one: a text, and at most one picture."""

from __future__ import annotations

from typing import Protocol


class PromptLike(Protocol):
    """A text, and the PNG bytes of its image or None."""

    @property
    def text(self) -> str:
        """What the model is asked."""

    @property
    def image_png(self) -> bytes | None:
        """What it is shown."""
