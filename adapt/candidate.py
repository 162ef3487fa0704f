"""A search's candidates, settings and evaluations.

A candidate is alpha (one weight per expert, inside the bounds) and a structure. The cost depends on the structure only:
a folded mixture costs the same for any alpha.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .. import storage
from ..errors import HavocError
from ..model.structure import ActivationDtype, Structure

if TYPE_CHECKING:
    from typing import Final

COST_OBJECTIVES: Final = ("prefill_ms", "peak_bytes", "decode_tok_per_s")
SPEED_OBJECTIVES: Final = ("prefill_ms", "decode_tok_per_s")
"""Those that other work on the machine makes worse."""
FORMAT_METRICS: Final = ("kl_mean", "top1_share")
"""The cost of a structure's rounding in answers; these are not objectives, because a target limits them."""
LOWEST_ALPHA, HIGHEST_ALPHA = -10.0, 10.0
_SMALLEST_POPULATION = 4

Answers = Mapping[str, Sequence[bool]]
"""For each domain, whether each row of the sample was answered right."""
Evidence = Literal["measured_target", "measured_other_device"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate: alpha in the order of the experts, and the structure."""

    alpha: tuple[float, ...]
    structure: Structure

    def key(self) -> str:
        """Name the candidate in the journal."""
        return storage.sha256_json({"alpha": self.alpha, "structure": self.structure.to_fields()})[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The origin of a candidate: its generation, how it was made, and its parents.

    `kind` is "seeded" for a fixed starting point (`label` says which), "random", or "bred" by selection, crossover and
    mutation. `is_repaired` says that it was moved into the bounds or scaled to a sum of 1.
    """

    kind: Literal["seeded", "random", "bred"]
    generation: int
    label: str = ""
    parents: tuple[str, ...] = ()
    is_repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as the journal and `front.json` write them."""
        return {**dataclasses.asdict(self), "parents": list(self.parents)}


@dataclass(frozen=True, slots=True)
class Cost:
    """`COST_OBJECTIVES` of a structure, and `FORMAT_METRICS` if they are known.

    `disturbance` says why its figures of speed are not reliable; "" if they are.
    """

    values: Mapping[str, float]
    disturbance: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measured candidate; `reason` says why it failed, and then it has neither answers nor cost.

    `kl_to_base` is KL(mixture || base) by domain in nats per predicted token; empty if there is no limit on it.
    """

    candidate: Candidate
    answers: Answers
    cost: Mapping[str, float]
    reason: str = ""
    kl_to_base: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """Share right by domain."""
        return {domain: sum(right) / len(right) for domain, right in self.answers.items()}

    @property
    def mean_accuracy(self) -> float:
        """Mean of the domains' shares."""
        accuracy = self.accuracy
        return sum(accuracy.values()) / len(accuracy) if accuracy else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """All settings that a search's result depends on. `limits` are the constraints: metric to (comparison, value).

    Their defaults are in the recipe: `measuring.search_settings` makes these settings from its section `[search]`.
    `alpha_bounds` hold for every weight; `normalize_alpha` scales each alpha to a sum of 1, as seed 003 asks. A
    candidate answers `num_repeats` samples of rows, and its accuracy is the share over all of them. `max_kl` limits the
    KL divergence of a mixture from the base in each domain (None: no limit). `evidence` says whether the costs are of
    the target's device; limits are not applied to costs of another device. `measured` names what is measured and on
    what (base, experts, rule, rows, device), as plain JSON values: a journal with other values is refused.
    """

    domains: tuple[str, ...]
    seed: int
    population: int
    generations: int
    weight_formats: tuple[str, ...]
    activation_dtype: ActivationDtype = "fp32"
    alpha_bounds: tuple[float, float]
    normalize_alpha: bool
    num_repeats: int
    num_finalists: int = 3
    max_kl: float | None = None
    limits: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    evidence: Evidence = "measured_target"
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a search that cannot run."""
        if self.population < _SMALLEST_POPULATION or self.generations < 1:
            raise HavocError(
                f"population {self.population} and generations {self.generations}: at least 4 and 1 are needed"
            )
        for name in self.weight_formats:
            if Structure.named(name, self.activation_dtype).weight_format == "keep":
                raise HavocError(
                    "keep stores the blocks of a GGUF file, but a mixture has none: leave keep out of the search"
                )
        require_bounds(*self.alpha_bounds, is_normalized=self.normalize_alpha)


def require_bounds(low: float, high: float, *, is_normalized: bool) -> None:
    """Refuse bounds of alpha that leave nothing to search, or that a sum of 1 cannot keep, by `HavocError`."""
    if not (math.isfinite(low) and math.isfinite(high) and LOWEST_ALPHA <= low < high <= HIGHEST_ALPHA):
        raise HavocError(f"alpha_bounds [{low:g}, {high:g}]: expected low < high between {LOWEST_ALPHA:g} and 10")
    if is_normalized and not (low >= 0 and high >= 1):
        raise HavocError(
            f"alpha_bounds [{low:g}, {high:g}] with normalize_alpha: weights that sum to 1 need a low of at least 0 "
            "and a high of at least 1"
        )
