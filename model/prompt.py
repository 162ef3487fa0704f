"""What every part that reads prompts asks of one: a text, and at most one picture."""

from __future__ import annotations

from typing import Protocol


class PromptLike(Protocol):
    """A text, and the PNG bytes of its image or None."""

    @property
    def text(self) -> str:
        """The text of the prompt."""

    @property
    def image_png(self) -> bytes | None:
        """The picture of the prompt."""
