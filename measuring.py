"""What the pipeline hands from room to room: the bench to the search, and the gate split to the score table.

`adapt` never imports `bench`; the search is given a `BenchMeasurer`, so its objectives come from the code that writes
the reports. The gate split is opened in one place, `score_table`, after every choice has been made.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Self

import onnxruntime

from .adapt.search import COST_OBJECTIVES, Answers, Candidate, SearchSettings
from .adapt.tasks.evaluation import Accuracy
from .adapt.tasks.task import load_tasks
from .bench.device import identify_cpu
from .bench.measure import measure_cost
from .bench.targets import load_target
from .errors import HavocError
from .export.package import export_artifact
from .jobs import scoring_workers
from .model.structure import Structure
from .processes import results_of
from .storage import scratch_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .adapt.expert import Expert
    from .adapt.tasks.task import Task
    from .config import Recipe
    from .jobs import Place
    from .model.checkpoint import Base
    from .progress import Progress

_NORMAL_95 = 1.959964


def search_settings(recipe: Recipe, base: Base, experts: Sequence[Expert]) -> SearchSettings:
    """Translate the recipe's section into the settings of the search; the first target's limits are its constraints."""
    section, tasks = recipe.search, recipe_tasks(recipe)
    return SearchSettings(
        domains=tuple(task.name for task in tasks),
        seed=section.seed,
        population=section.population,
        generations=section.generations,
        weight_formats=section.weight_formats,
        limits=limits_of(recipe.gate.targets[0], [task.name for task in tasks]),
        measured={
            "base": base.weight_hash,
            "experts": {expert.domain: expert.hash for expert in experts},
            "rule": section.rule,
            "num_rows": section.num_rows,
            "num_validation_rows": recipe.experts.num_validation_rows,
            "max_new_tokens": recipe.experts.max_new_tokens,
            "tasks": {task.name: task.sha256 for task in tasks},
            "chat": recipe.model.chat,
            "data": recipe.data.model_dump(mode="json"),
            "device": identify_cpu().model_dump(mode="json"),
            "onnxruntime": onnxruntime.__version__,
        },
    )


def recipe_tasks(recipe: Recipe) -> tuple[Task, ...]:
    """Load the tasks of a recipe, in the order of its experts; real data makes the four domains mean public tasks."""
    return load_tasks(recipe.experts.tasks, data_dir=recipe.data.directory, online=recipe.data.online)


def limits_of(target_name: str, tasks: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return a target's limits on what the search measures; memory of any kind is its `peak_bytes`."""
    measured = {*COST_OBJECTIVES, *(f"accuracy/{task}" for task in tasks)}
    limits = {}
    for limit in load_target(target_name).limits:
        metric = "peak_bytes" if limit.metric in {"peak_rss_bytes", "peak_vram_bytes"} else limit.metric
        if metric in measured:
            limits[metric] = (limit.sign, limit.value)
    return limits


class BenchMeasurer:
    """Measures candidates for the search; use it in `with`, it keeps the exported structures in a temporary folder.

    Costs are measured one at a time, answers are given by worker processes, which sleep meanwhile. Sample 0 and sample
    1 of the search split are disjoint, and both are disjoint from the rows that experts were validated on.
    """

    def __init__(self, place: Place, base: Base, *, num_experts: int) -> None:
        self._place, self._base = place, base
        self._tasks = [task.name for task in recipe_tasks(place.recipe)]
        population = place.recipe.search.population
        self._workers = scoring_workers(base, population, num_experts=num_experts, num_threads=place.num_threads)

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self._folder = self._open.enter_context(scratch_directory("havoc-search-"))
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.end()
        self._open.close()

    def cost(self, structure: Structure) -> Mapping[str, float]:
        """Export the base in `structure` and measure it in a fresh process; every alpha costs the same."""
        artifact = self._folder / str(structure)
        if not artifact.exists():
            export_artifact(self._base, artifact, structure=structure)
        cost = measure_cost(artifact)
        return {metric: float(getattr(cost, metric)) for metric in COST_OBJECTIVES}

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterator[Answers | HavocError]:
        """Answer one sample of the search split, greedily, with each candidate's folded and encoded weights."""
        recipe = self._place.recipe
        size = recipe.search.num_rows
        about = {
            "rule": recipe.search.rule,
            "tasks": list(self._tasks),
            "split": "search",
            "start": recipe.experts.num_validation_rows + sample * size,
            "size": size,
        }
        requests = [
            self._place.request(
                num_threads=self._workers.num_threads,
                alpha=list(candidate.alpha),
                structure=candidate.structure.to_fields(),
                **about,
            )
            for candidate in candidates
        ]
        for outcome in self._workers.run(".jobs:answer", requests):
            yield outcome if isinstance(outcome, HavocError) else _right(outcome)


def _right(answers: Mapping[str, str]) -> Answers:
    return {task: tuple(mark == "1" for mark in marks) for task, marks in answers.items()}


def score_table(
    place: Place, base: Base, experts: Sequence[Expert], mixture: Answers, progress: Progress
) -> dict[str, Any]:
    """Open the gate split for base and experts, and put the artifact's answers, `mixture`, beside them.

    All answer the same rows. `margin` is the mixture's mean over the tasks less the other's, with a 95 % interval
    of the paired differences; `is_proven` says that it lies above 0.
    """
    num, tasks = len(experts), [task.name for task in recipe_tasks(place.recipe)]
    contestants = {"base": [0.0] * num}
    contestants |= {
        expert.domain: [float(position == other) for other in range(num)] for position, expert in enumerate(experts)
    }
    jobs = [(name, task) for task in tasks for name in contestants]
    with scoring_workers(base, len(jobs), num_experts=num, num_threads=place.num_threads) as workers:
        requests = [
            place.request(
                alpha=contestants[name],
                tasks=[task],
                rule="delta",
                structure=Structure().to_fields(),
                split="gate",
                start=0,
                size=place.recipe.gate.num_rows,
                num_threads=workers.num_threads,
            )
            for name, task in jobs
        ]
        answers: dict[str, Answers] = {name: {} for name in contestants}
        with progress.stage("base and experts on the gate split", len(jobs)) as stage:
            found = results_of(workers.run(".jobs:answer", requests, listen=stage.advance))
            for (name, _), given in zip(jobs, found, strict=True):
                answers[name] = {**answers[name], **_right(given)}
    return {
        "split": "gate",
        "rows": [_table_row(name, right) for name, right in {**answers, "mixture": mixture}.items()],
        "paired": [{"against": name, **paired_margin(mixture, right)} for name, right in answers.items()],
    }


def _table_row(name: str, answers: Answers) -> dict[str, Any]:
    kind = name if name in {"base", "mixture"} else "expert"
    accuracy = {}
    for task, right in answers.items():
        counted = Accuracy(task, sum(right), len(right))
        low, high = counted.interval()
        accuracy[task] = {"num_right": counted.num_right, "num_rows": counted.num_rows, "low": low, "high": high}
    return {"name": name, "kind": kind, "accuracy": accuracy}


def paired_margin(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Mean over the tasks of the paired difference in share right, with its 95 % normal interval.

    Each task weighs the same; the variance is the sum of the tasks' variances of the mean, over the tasks
    squared.
    """
    means, variances = [], []
    for task, right in ours.items():
        differences = [int(a) - int(b) for a, b in zip(right, theirs[task], strict=True)]
        mean = sum(differences) / len(differences)
        means.append(mean)
        variances.append(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    margin = sum(means) / len(means)
    half_width = _NORMAL_95 * math.sqrt(sum(variances)) / len(variances)
    low, high = margin - half_width, margin + half_width
    return {"margin": margin, "low": low, "high": high, "is_proven": low > 0}
