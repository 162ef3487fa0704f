"""Where an answer ends before the model says so: at the first of some strings, however they are cut. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .tokenizer import Tokenizer

_MORE_TOKENS = 4  # a token may begin before the string, and some write nothing


class StopStrings:
    """The strings that end an answer, searched in the text of the last tokens.

    A string that is a special token (`<|im_end|>`) is written only by that token: `token_ids` end an answer too.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        """An empty string is a `HavocError`: it would end every answer at once."""
        if "" in stop:
            raise HavocError("a stop string is empty and would end every answer at once; leave it out")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._num_tokens = max((len(text.encode()) for text in stop), default=0) + _MORE_TOKENS
        added = tokenizer.backend.get_added_tokens_decoder().items() if stop else ()
        self.token_ids = tuple(sorted(token_id for token_id, token in added if token.content in self._stop))

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._stop)

    def are_reached(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """For each row of new ids, whether its last tokens hold one of the strings."""
        tails = self._tokenizer.decode_batch([row[-self._num_tokens :] for row in rows])
        return [any(text in tail for text in self._stop) for tail in tails]

    def cut(self, text: str) -> str:
        """`text` up to the first of the strings."""
        return cut(text, self._stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    return text[: min((place for word in stop if (place := text.find(word)) >= 0), default=len(text))]
