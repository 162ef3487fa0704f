"""A base that answers with any mixture of its experts, one after another, in the memory of one adapted model.

    with Mixtures(base, basis, experts) as mixtures:
        scorer = mixtures.scorer((0.0, 1.0, 0.0))      # the base's model, folded with the second expert

Every call names its scales, so nothing remains of an earlier call; alpha = 0 is the base, bit for bit. Mixing follows
the rule delta of `mixture.py`: z = 1 + sum_k alpha_k (z_k - 1).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from ..model.scorer import TorchScorer
from .mixture import mix
from .svf import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base
    from .alpha_search import Alpha
    from .basis import Basis
    from .expert import Expert
    from .svf import SingularValueAdapter


class Mixtures:
    """Guards the one model that all mixtures share: which scales are folded into it now.

    `fold_s` is the total time of changing the scales in seconds, `num_folds` the number of changes.
    """

    def __init__(self, base: Base, basis: Basis, experts: Sequence[Expert]) -> None:
        """Take over `base.model` until `close`; the experts must belong to the basis."""
        self.base, self.experts = base, tuple(experts)
        self.fold_s, self.num_folds = 0.0, 0
        self._adapter: SingularValueAdapter = attach(base.model, basis)
        self._held: tuple[str, Alpha] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts' tasks, in the order of alpha."""
        return tuple(expert.domain for expert in self.experts)

    def only(self, place: int | None) -> Alpha:
        """Return the alpha of one expert alone, by its index; None is the base."""
        return tuple(float(place == one) for one in range(len(self.experts)))

    def scorer(self, alpha: Alpha) -> TorchScorer:
        """The model with the mixture `alpha`; scorers of earlier calls share the model and answer with `alpha` too."""
        return self._with(("alpha", alpha), self.experts, alpha)

    def expert_scorer(self, expert: Expert) -> TorchScorer:
        """The model with an expert that is not one of the mixed ones, such as the classifier."""
        return self._with((expert.hash, (1.0,)), (expert,), (1.0,))

    def _with(self, wanted: tuple[str, Alpha], experts: Sequence[Expert], alpha: Alpha) -> TorchScorer:
        if self._held != wanted:
            started = time.perf_counter()
            self._held = None  # if folding fails, the model is not taken for either mixture
            self._adapter.load(mix(experts, alpha) if any(alpha) else {})
            self._held = wanted
            self.fold_s += time.perf_counter() - started
            self.num_folds += 1
        return TorchScorer(self.base.model, self.base.tokenizer)

    def close(self) -> None:
        """Restore the base."""
        self._adapter.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
