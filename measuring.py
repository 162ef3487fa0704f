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
from .adapt.tasks import sources
from .adapt.tasks.evaluation import Accuracy, score
from .adapt.tasks.task import load_tasks
from .bench.device import identify_cpu
from .bench.measure import measure_cost
from .bench.targets import load_target
from .errors import MeasurementError
from .export.candidates import CandidateSessions
from .export.package import export_artifact
from .model.structure import Structure
from .storage import scratch_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .adapt.expert import Expert
    from .adapt.svf import Basis
    from .adapt.tasks.task import Row, Task
    from .config import Recipe
    from .export.session import DecoderSession
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

    Sample 0 and sample 1 of the search split are disjoint, and both are disjoint from the rows that experts were
    validated on.
    """

    def __init__(self, recipe: Recipe, base: Base, basis: Basis, experts: Sequence[Expert]) -> None:
        self._recipe, self._base, self._tasks = recipe, base, recipe_tasks(recipe)
        self._sessions = CandidateSessions(base, basis, experts, rule=recipe.search.rule)
        self._reader = sources.search_reader(
            seed=recipe.data.seed, data_dir=recipe.data.directory, online=recipe.data.online
        )
        self._rows: dict[str, list[Row]] = {}

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self._folder = self._open.enter_context(scratch_directory("havoc-search-"))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def cost(self, structure: Structure) -> Mapping[str, float]:
        """Export the base in `structure` and measure it in a fresh process; every alpha costs the same."""
        artifact = self._folder / str(structure)
        if not artifact.exists():
            export_artifact(self._base, artifact, structure=structure)
        cost = measure_cost(artifact)
        return {metric: float(getattr(cost, metric)) for metric in COST_OBJECTIVES}

    def answers(self, candidate: Candidate, *, sample: int) -> Answers:
        """Answer one sample of the search split, greedily, with the candidate's folded and encoded weights."""
        session = self._sessions.open(candidate.alpha, candidate.structure)
        return {task.name: answers_of(session, task, self._sample(task, sample), self._recipe) for task in self._tasks}

    def _sample(self, task: Task, sample: int) -> list[Row]:
        size, num_validation = self._recipe.search.num_rows, self._recipe.experts.num_validation_rows
        if task.name not in self._rows:
            self._rows[task.name] = self._reader.rows(task, "search", num_validation + 2 * size)
        start = num_validation + sample * size
        return self._rows[task.name][start : start + size]


def answers_of(session: DecoderSession, task: Task, rows: Sequence[Row], recipe: Recipe) -> tuple[bool, ...]:
    """Whether `session` answers each row right; a judge that failed on any of them is a `MeasurementError`."""
    scores = score(session, task, rows, max_new_tokens=recipe.experts.max_new_tokens)
    if scores.failed:
        reason = scores.reasons[scores.failed_rows[0]]
        msg = f"{task.name}: the judge failed on {scores.failed} of {len(rows)} rows ({reason}); they say nothing"
        raise MeasurementError(msg)
    return scores.right


def score_table(
    recipe: Recipe,
    base: Base,
    basis: Basis,
    experts: Sequence[Expert],
    mixture: Answers,
    progress: Progress,
) -> dict[str, Any]:
    """Open the gate split for base and experts, and put the artifact's answers, `mixture`, beside them.

    All answer the same rows. `margin` is the mixture's mean over the tasks less the other's, with a 95 % interval
    of the paired differences; `is_proven` says that it lies above 0.
    """
    tasks = recipe_tasks(recipe)
    rows = {task.name: _gate_rows(recipe, task) for task in tasks}
    answers: dict[str, Answers] = {}
    with progress.stage("base and experts on the gate split", (len(experts) + 1) * len(tasks)) as stage:
        for name, session in _contestants(base, basis, experts):
            right: dict[str, Sequence[bool]] = {}
            for task in tasks:
                right[task.name] = answers_of(session, task, rows[task.name], recipe)
                stage.advance(note=f"{name} on {task.name}")
            answers[name] = right
    return {
        "split": "gate",
        "rows": [_table_row(name, right) for name, right in {**answers, "mixture": mixture}.items()],
        "paired": [{"against": name, **paired_margin(mixture, right)} for name, right in answers.items()],
    }


def _gate_rows(recipe: Recipe, task: Task) -> list[Row]:
    return sources.rows(
        task,
        "gate",
        recipe.gate.num_rows,
        may_be_fewer=True,
        seed=recipe.data.seed,
        data_dir=recipe.data.directory,
        online=recipe.data.online,
    )


def _contestants(base: Base, basis: Basis, experts: Sequence[Expert]) -> Iterator[tuple[str, DecoderSession]]:
    sessions = CandidateSessions(base, basis, experts)
    exact = Structure()
    yield "base", sessions.open([0.0] * len(experts), exact)
    for place, expert in enumerate(experts):
        yield expert.domain, sessions.open([float(place == other) for other in range(len(experts))], exact)


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
