"""Few-shot dispatch: find the alpha that best answers a few solved examples of a new task.

    examples    k rows of the task's train split, or of a file of the user's; never rows of the gate split
    fitness     share of the examples that the mixture answers right; the references' log-likelihood breaks ties
    search      the cross-entropy method over alpha (`alpha_search.py`)

Answers are generated and judged as for a release. The log-likelihood is that of a right answer's tokens, in nats per
token, averaged over the examples. It separates mixtures that answer all of the few examples right, or all wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from ..errors import HavocError
from .alpha_search import CrossEntropySettings, FoundAlpha, cross_entropy_search
from .branches import batches, hidden_at_places, lay_out, log_likelihoods, log_probabilities
from .expected_reward import MAX_TOKENS_OF_A_PASS
from .next_token import reference_of
from .tasks.evaluation import score
from .tasks.sources import gate_rows_among, rows_of_file, search_reader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.checkpoint import Base
    from .alpha_search import Alpha, Fitness
    from .branches import Branched
    from .mixtures import Mixtures
    from .tasks.reward import Row
    from .tasks.task import Task

NUM_EXAMPLES: Final = 5
"""The number of examples by default."""


def solved_examples(
    task: Task,
    num_rows: int,
    *,
    path: Path | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
) -> list[Row]:
    """Return the first `num_rows` solved rows of `task`, from the file `path` or from the train split.

    Raises `HavocError` for a file that cannot be read, has fewer rows, or contains a row of the gate split (a leak).
    """
    if path is None:
        return search_reader(seed=seed, data_dir=data_dir, online=online).rows(task, "train", num_rows)
    found = rows_of_file(task, path)
    num_leaked = gate_rows_among(task, found, data_dir=data_dir, online=online)
    if num_leaked:
        raise HavocError(
            f"{path}: {num_leaked} of {len(found)} rows are rows of {task.name}'s gate split (a leak): "
            "a mixture chosen on them would be scored on them; give other rows"
        )
    if len(found) < num_rows:
        raise HavocError(f"{path}: holds {len(found)} rows, but --examples asks for {num_rows}: ask for fewer")
    return found[:num_rows]


def find_alpha(
    mixtures: Mixtures,
    task: Task,
    examples: Sequence[Row],
    *,
    settings: CrossEntropySettings,
    max_new_tokens: int | None = None,
) -> FoundAlpha:
    """Search for the alpha whose mixture answers `examples` best; `max_new_tokens` None uses the task's number."""
    references = [reference_of(mixtures.base, task, row) for row in examples]

    def fitness(alpha: Alpha) -> Fitness:
        scores = score(mixtures.scorer(alpha), task, examples, max_new_tokens=max_new_tokens)
        return sum(scores.right) / len(scores.right), mean_log_likelihood(mixtures.base, references)

    return cross_entropy_search(fitness, num_experts=len(mixtures.experts), settings=settings)


@torch.inference_mode()
def mean_log_likelihood(base: Base, references: Sequence[Branched]) -> float:
    """Mean log-likelihood of the references with the model's current weights, in nats per token."""
    found: list[float] = []
    for indices in batches(references, max_tokens=MAX_TOKENS_OF_A_PASS):
        layout = lay_out([references[index] for index in indices], pad_id=base.tokenizer.pad_id).to(base.model.device)
        log_p_PV = log_probabilities(base.model, hidden_at_places(base.model, layout))
        found += (log_likelihoods(log_p_PV, layout) / layout.length_C).tolist()
    return sum(found) / len(found)
