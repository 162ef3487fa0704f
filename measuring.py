"""Connect the bench to the search.

`adapt` never imports `bench`; the search gets a `BenchMeasurer`, so its objectives come from the code that writes the
reports.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import onnxruntime

from .adapt.candidate import COST_OBJECTIVES, FORMAT_METRICS, Answers, Candidate, Cost, SearchSettings
from .adapt.tasks.task import load_tasks
from .bench.device import default_provider, identify_cpu, identify_device
from .bench.judge.rules import device_problem
from .bench.judge.schema import Workload
from .bench.judge.targets import load_target
from .bench.measure import measure_cost
from .errors import HavocError, IdentityError
from .export.package import export_artifact
from .export.runtime.artifact import read_manifest
from .export.runtime.devices import DEVICE_KINDS
from .jobs import AnswerRequest, DeviceRequest, DivergeRequest, MixedModels, RowRange, scoring_workers
from .model.device import open_device
from .processes import Workers, results_of
from .storage import scratch_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .adapt.candidate import Evidence
    from .adapt.expert import Expert
    from .adapt.tasks.task import Task
    from .bench.judge.schema import Device
    from .config import Recipe
    from .jobs import Place
    from .model.checkpoint import Base
    from .model.structure import Structure


@dataclass(frozen=True, slots=True)
class Bound:
    """The device that a run measures on, the first target's work, and whether the figures speak for that target.

    `num_threads` None is one thread a physical core.
    """

    device: Device
    provider: str
    evidence: Evidence
    workload: Workload
    num_threads: int | None


def bind(recipe: Recipe) -> Bound:
    """Find the device for measurements: the first target's, or this machine's if the recipe allows it.

    Raises `IdentityError` if this machine is another device than the target and the recipe does not allow it.
    """
    target = load_target(recipe.gate.targets[0])
    work = Workload(**target.workload.model_dump()), target.protocol.num_threads
    own = DEVICE_KINDS[target.device.kind].provider
    try:
        device = identify_device(own)
        problem = device_problem(device, target, this_cpu=identify_cpu())
    except HavocError as error:
        problem = str(error)
    else:
        if problem is None:
            return Bound(device, own, "measured_target", *work)
    if not recipe.search.on_this_machine:
        raise IdentityError(
            f"target {target.name}: {problem}; search on that device, or give --on-this-machine: the costs are then "
            "this machine's, and by them no candidate counts as within the limits"
        )
    provider = default_provider()
    return Bound(identify_device(provider), provider, "measured_other_device", *work)


def require_device(recipe: Recipe) -> None:
    """Refuse a recipe's device that torch or ONNX Runtime cannot use here, before any work; an `IdentityError`."""
    device = recipe.model.device
    open_device(device)
    if device != "cpu":
        with Workers(1) as workers:
            list(results_of(workers.run(".jobs:try_device", [DeviceRequest(device=device)])))


def answered_on(recipe: Recipe) -> dict[str, str]:
    """Kind and name of the device that answers for candidates."""
    device = identify_device(DEVICE_KINDS[recipe.model.device].provider)
    return {"device": device.kind, "name": device.name}


def answered_elsewhere(recipe: Recipe) -> dict[str, Any]:
    """The journal's key for answers that are not from the CPU: answers of two devices never share a journal."""
    return {} if recipe.model.device == "cpu" else {"answered_on": answered_on(recipe)}


def search_settings(recipe: Recipe, base: Base, experts: Sequence[Expert], bound: Bound) -> SearchSettings:
    """Translate the recipe's section into the settings of the search; the first target's limits are its constraints."""
    section, tasks = recipe.search, recipe_tasks(recipe)
    return SearchSettings(
        domains=tuple(task.name for task in tasks),
        seed=section.seed,
        population=section.population,
        generations=section.generations,
        weight_formats=section.weight_formats,
        alpha_bounds=section.alpha_bounds,
        normalize_alpha=section.normalize_alpha,
        num_repeats=section.num_repeats,
        max_kl=recipe.experts.max_kl,
        evidence=bound.evidence,
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
            "target": recipe.gate.targets[0],
            "device": bound.device.model_dump(mode="json"),
            "workload": [bound.workload.model_dump(mode="json"), bound.num_threads],
            "onnxruntime": onnxruntime.__version__,
            **answered_elsewhere(recipe),
        },
    )


def recipe_tasks(recipe: Recipe) -> tuple[Task, ...]:
    """Load the tasks of a recipe, in the order of its experts; real data makes the four domains mean public tasks."""
    return load_tasks(recipe.experts.tasks, data_dir=recipe.data.directory, online=recipe.data.online)


COST_RETRIES, COST_WAIT_S = 2, 20.0
"""How often a disturbed cost is measured again, and the seconds to wait for a quiet machine between."""


def limits_of(target_name: str, tasks: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return a target's limits on the quantities of the search; memory of any kind is its `peak_bytes`.

    The cost of a format in answers is measured on the base in that format.
    """
    measured = {*COST_OBJECTIVES, *FORMAT_METRICS, *(f"accuracy/{task}" for task in tasks)}
    limits = {}
    for limit in load_target(target_name).limits:
        metric = "peak_bytes" if limit.metric in {"peak_rss_bytes", "peak_vram_bytes"} else limit.metric
        if metric in measured:
            limits[metric] = (limit.sign, limit.value)
    return limits


class BenchMeasurer:
    """Measures candidates for the search; use it in `with`, it keeps the exported structures in a temporary folder.

    Costs are measured one at a time; worker processes give the answers, and sleep during measurements. The samples of
    the search split are disjoint, and all are disjoint from the rows for the validation of experts. `bound` names the
    device that must be measured, which may be simulated.
    """

    def __init__(self, place: Place, base: Base, *, num_experts: int, bound: Bound) -> None:
        self._place, self._base, self._bound = place, base, bound
        self._tasks = [task.name for task in recipe_tasks(place.recipe)]
        self._is_disturbed = False
        population = place.recipe.search.population
        device = place.recipe.model.device
        self._workers = scoring_workers(
            base, population, num_experts=num_experts, num_threads=place.num_threads, device=device
        )

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self._folder = self._open.enter_context(scratch_directory("havoc-search-"))
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.end()
        self._open.close()

    def costs(self, structures: Sequence[Structure]) -> Iterator[Cost | HavocError]:
        """Export the base in each structure and measure it in a fresh process; every alpha costs the same.

        A measurement that something disturbed is repeated; if all were, the last is given with what disturbed it. The
        search then ranks no candidate by speed, so no later cost is worth a wait or a repetition.
        """
        failures: dict[Structure, HavocError] = {}
        for structure in structures:
            try:
                yield failures.get(structure) or self._cost(structure)
            except HavocError as error:
                failures[structure] = error
                yield error

    def _cost(self, structure: Structure) -> Cost:
        if self._place.recipe.model.device != "cpu":
            self._workers.end()  # they hold memory of a card, which may be the one that is measured
        artifact = self._folder / str(structure)
        if not artifact.exists():
            export_artifact(self._base, artifact, structure=structure)
        cost = measure_cost(
            artifact,
            provider=self._bound.provider,
            num_threads=self._bound.num_threads,
            workload=self._bound.workload,
            device=self._bound.device,
            num_retries=0 if self._is_disturbed else COST_RETRIES,
            wait_s=COST_WAIT_S,
        )
        self._is_disturbed |= bool(cost.disturbance)
        format_cost = read_manifest(artifact).format_cost or {}
        values = {metric: float(getattr(cost, metric)) for metric in COST_OBJECTIVES}
        values |= {metric: float(format_cost[metric]) for metric in FORMAT_METRICS}
        return Cost(values, cost.disturbance)

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterator[Answers | HavocError]:
        """Answer one sample of the search split, greedily, with each candidate's folded and encoded weights."""
        mixtures, rows = self._mixtures(), search_rows(self._place.recipe, sample)
        requests = [
            AnswerRequest(
                mixtures=mixtures,
                rows=rows,
                tasks=tuple(self._tasks),
                alpha=tuple(candidate.alpha),
                structure=candidate.structure.to_fields(),
            )
            for candidate in candidates
        ]
        for outcome in self._workers.run(".jobs:answer", requests):
            yield outcome if isinstance(outcome, HavocError) else right_rows(outcome)

    def divergences(self, alphas: Sequence[Sequence[float]]) -> Iterator[dict[str, float] | HavocError]:
        """KL(mixture || base) of each alpha by task, on the first rows of the search's first sample."""
        yield from divergences_of(self._workers, self._mixtures(), search_rows(self._place.recipe, 0), alphas)

    def _mixtures(self) -> MixedModels:
        rule = self._place.recipe.search.rule
        return MixedModels(place=self._place, num_threads=self._workers.num_threads, rule=rule)


def search_rows(recipe: Recipe, sample: int) -> RowRange:
    """Sample number `sample` of the search split: after the rows for the validation of experts, and disjoint."""
    size = recipe.search.num_rows
    return RowRange(split="search", start=recipe.experts.num_validation_rows + sample * size, size=size)


def divergences_of(
    workers: Workers, mixtures: MixedModels, rows: RowRange, alphas: Sequence[Sequence[float]]
) -> Iterator[dict[str, float] | HavocError]:
    """KL(mixture || base) of each alpha by task, in their order; the workers share them, each reads the base once."""
    num_parts = min(workers.num_processes, len(alphas))
    requests = [
        DivergeRequest(mixtures=mixtures, rows=rows, alphas=tuple(tuple(alpha) for alpha in alphas[first::num_parts]))
        for first in range(num_parts)
    ]
    outcomes = list(workers.run(".jobs:diverge", requests))
    for number in range(len(alphas)):
        outcome = outcomes[number % num_parts]
        yield outcome if isinstance(outcome, HavocError) else outcome[number // num_parts]


def right_rows(answers: Mapping[str, str]) -> Answers:
    """Read what `jobs.answer` gives: for each task whether each row is right."""
    return {task: tuple(mark == "1" for mark in marks) for task, marks in answers.items()}
