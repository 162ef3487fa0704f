"""An artifact ready for text: it continues prompts and gives the likelihood of texts. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .completion import generate_text
from .decoder import Decoder
from .likelihood import log_likelihoods

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...model.likelihood import Continuation
    from ...model.prompt import PromptLike


class DecoderSession(Decoder):
    """An open artifact (or a graph with weights in memory), ready for prefill, single steps, text and likelihoods."""

    def log_likelihoods(self, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> list[list[Continuation]]:
        """The likelihood of each text of each request after the request's prompt, in order; see `likelihood`."""
        return log_likelihoods(self, requests)

    def generate_text(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int,
        batch_size: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Complete prompts, greedily at temperature 0: the new text of each, in the order given; see `completion`."""
        return generate_text(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            seed=seed,
            stop=stop,
        )


open_artifact = DecoderSession.open
"""Open an artifact folder; see `Decoder.open`."""
