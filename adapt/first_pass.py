"""The first pass of two-pass inference: the likelihood of each expert's name says which expert a text belongs to.

    text, then an instruction that lists the names of the experts      ->  log pi(name | text, instruction) of each name

The model generates nothing, so no answer has to be parsed: every text gets exactly one name. The instruction comes
after the text, because a prompt that is too long for the context loses its beginning. This pass reads text only; it
does not see a picture.

A base prefers some names for any text. With `is_calibrated` the log-likelihood of each name after an empty text is
subtracted (contextual calibration, Zhao et al., arXiv 2102.09690). A trained classifier does not need this.

Two passes: Transformer-Squared, arXiv 2501.06252. There the model writes a text, which is searched for a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import HavocError, MeasurementError
from .tasks.reward import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.prompt import PromptLike
    from .tasks.evaluation import Scorer

INSTRUCTION: Final = "\nWhich domain does the text above belong to: {names}?\nDomain:"
DELIMITER: Final = " "
_FEWEST_NAMES: Final = 2


def asked(text: str, names: Sequence[str]) -> str:
    """Return what the model reads in the first pass: `text`, then the instruction with the names in their order."""
    return text + INSTRUCTION.format(names=", ".join(names))


@dataclass(frozen=True, slots=True)
class FirstPass:
    """Chooses one of `names` for a text."""

    names: tuple[str, ...]
    is_calibrated: bool = False

    def __post_init__(self) -> None:
        """Refuse fewer than two names."""
        if len(self.names) < _FEWEST_NAMES:
            held = ", ".join(self.names) or "none"
            raise HavocError(f"a first pass chooses between at least 2 experts; found {held}")

    def choose(self, scorer: Scorer, prompts: Sequence[PromptLike]) -> list[int]:
        """Return the index of the likeliest name for each prompt; of equally likely names, the first.

        `scorer` is the base, or the base with a classifier's scales. A log-likelihood that is NaN raises
        `MeasurementError`.
        """
        texts = [prompt.text for prompt in prompts]
        scores = self._scores(scorer, [*texts, ""] if self.is_calibrated else texts)
        behind_nothing = scores.pop() if self.is_calibrated else [0.0] * len(self.names)
        scores = [[ours - own for ours, own in zip(row, behind_nothing, strict=True)] for row in scores]
        return [row.index(max(row)) for row in scores]

    def _scores(self, scorer: Scorer, texts: Sequence[str]) -> list[list[float]]:
        """Log-likelihood of every name after every text, in nats."""
        choices = [DELIMITER + name for name in self.names]
        found = scorer.log_likelihoods([(Prompt(asked(text, self.names)), choices) for text in texts])
        scores = [[item.log_likelihood for item in row] for row in found]
        if any(math.isnan(value) for row in scores for value in row):
            raise MeasurementError("the first pass gave a log-likelihood that is not a number")
        return scores
