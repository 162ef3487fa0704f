"""Measures candidates on the workers of a cluster: any worker scores, workers with the target's device also measure.

The search gets the same results, and writes the same journal, as with `measuring.BenchMeasurer` on one machine. All
costs come from devices of one model: the same processor, driver, memory and limits (`device_model`). The host's CPU
must be the same too, because it feeds the card. A `Sentinel` watches each worker that measures.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..adapt.candidate import FORMAT_METRICS, Answers, Candidate, Cost
from ..adapt.expert import expert_path
from ..adapt.ledger import NUM_COST_REPEATS
from ..bench.judge.rules import device_problem
from ..bench.judge.schema import Workload
from ..bench.judge.targets import load_target
from ..errors import HavocError
from ..export.package import export_artifact
from ..export.runtime.artifact import read_manifest
from ..export.runtime.devices import DEVICE_KINDS
from ..jobs import AnswerRequest, DivergeRequest, MixedModels, Place
from ..measuring import COST_RETRIES, COST_WAIT_S, Bound, recipe_tasks, right_rows, search_rows
from ..messages import read
from ..model.structure import Structure
from ..storage import Journal, read_journal, scratch_directory, sha256_json
from .fleet import Fleet, FleetJob, Worker, WorkerLostError
from .sentinel import Sentinel
from .store import tree_of
from .worker_requests import MeasuredOnce, MeasureTree, ScoreTree, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..bench.judge.schema import Device, GpuWitness
    from ..config import Recipe
    from ..model.checkpoint import Base

Sent = tuple[Tree, dict[str, Path]]


def device_model(device: Device) -> Device:
    """The device without its individual marks (such as a UUID): two devices of one model become equal."""
    gpu = device.gpu
    if gpu is not None:
        witnesses = {"nvml": _nameless(gpu.nvml), "cuda": _nameless(gpu.cuda)}
        gpu = gpu.model_copy(update={**witnesses, "vbios": None, "persistence_mode": None, "accounting_mode": None})
    plain = device.model_copy(update={"gpu": gpu})
    fingerprint = sha256_json(plain.model_dump(mode="json", exclude={"fingerprint"}))
    return plain.model_copy(update={"fingerprint": fingerprint})


def _nameless(witness: GpuWitness | None) -> GpuWitness | None:
    return None if witness is None else witness.model_copy(update={"uuid_sha256": None})


def bind_fleet(fleet: Fleet, recipe: Recipe, journal: Path | None = None) -> Bound:
    """Choose the device that the workers measure on: the target's, or another one if the recipe allows it.

    If the workers offer several models, choose the one of the search in `journal`, where that file exists.
    Raises `HavocError` at once if no worker offers a device that fits.
    """
    target = load_target(recipe.gate.targets[0])
    offered = [worker.offer.device for worker in fleet.workers.values() if worker.offer.device is not None]
    problems = {device.name: device_problem(device, target, this_cpu=device.cpu) for device in offered}
    fitting = [device for device in offered if problems[device.name] is None]
    devices = fitting or (offered if recipe.search.on_this_machine else [])
    if not devices:
        found = "; ".join(f"{name}: {problem}" for name, problem in problems.items()) or "no worker measures"
        raise HavocError(
            f"target {target.name}: none of the {len(fleet.workers)} workers may measure for it ({found}); start "
            f"`havoc worker {fleet.address.text} --measures` on such a device"
        )
    models = sorted(map(device_model, devices), key=lambda model: model.fingerprint)
    begun = _device_of(journal) if journal is not None and journal.exists() else None
    model = next((model for model in models if model.model_dump(mode="json") == begun), models[0])
    return Bound(
        model,
        DEVICE_KINDS[model.kind].provider,
        "measured_target" if fitting else "measured_other_device",
        Workload(**target.workload.model_dump()),
        target.protocol.num_threads,
    )


def _device_of(journal: Path) -> object:
    """The device, as JSON, that the costs in a journal were measured on; None if it holds no costs yet."""
    entries = read_journal(journal)
    settings = entries[0].get("plain", {}) if entries else {}
    return settings.get("measured", {}).get("device") if isinstance(settings, dict) else None


class FleetMeasurer:
    """Measures candidates for the search on a fleet's workers; a context manager. See `adapt.ledger.Measurer`."""

    def __init__(self, fleet: Fleet, place: Place, base: Base, *, bound: Bound) -> None:
        self._fleet, self._place, self._base, self._bound = fleet, place, base, bound
        self._sentinels: dict[str, Sentinel] = {}
        self._first: Sentinel | None = None
        self._one_opens = threading.Lock()
        self._is_disturbed = False

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self._folder = self._open.enter_context(scratch_directory("havoc-search-"))
        self._fleet.noted = Journal(self._place.out / "search" / "cluster.jsonl").append
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def costs(self, structures: Sequence[Structure]) -> Iterator[Cost | HavocError]:
        """Measure structures in their order; one worker measures equal neighbours, which are repeats."""
        groups = [(structure, len(list(same))) for structure, same in groupby(structures)]
        artifacts: dict[Structure, Sent] = {}
        sentinel = Structure.named(self._place.recipe.search.weight_formats[0])
        failures: dict[int, HavocError] = {}
        jobs = []
        for number, (structure, num_repeats) in enumerate(groups):
            try:
                for needed in (sentinel, structure):
                    artifacts[needed] = artifacts.get(needed) or tree_of({".": self._artifact(needed)})
            except HavocError as error:
                failures[number] = error
                continue
            do = functools.partial(self._measured, artifacts[sentinel], artifacts[structure], num_repeats)
            jobs.append(FleetJob(fits=self._may_measure, do=do, needs=f"measures on {self._bound.device.name}"))
        outcomes = self._fleet.run(jobs)
        for number, (structure, num_repeats) in enumerate(groups):
            outcome = failures[number] if number in failures else next(outcomes)
            if isinstance(outcome, HavocError):
                yield from [outcome] * num_repeats
                continue
            format_cost = read_manifest(self._artifact(structure)).format_cost or {}
            extra = {metric: float(format_cost[metric]) for metric in FORMAT_METRICS}
            for one in outcome:
                yield Cost(one.values | extra, one.disturbance)

    def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterator[Answers | HavocError]:
        """Answer one sample of the search split with each candidate, on any worker that scores."""
        rows, tasks = search_rows(self._place.recipe, sample), tuple(task.name for task in self._tasks)
        requests = [
            AnswerRequest(
                mixtures=self._mixtures,
                rows=rows,
                tasks=tasks,
                alpha=tuple(candidate.alpha),
                structure=candidate.structure.to_fields(),
            )
            for candidate in candidates
        ]
        for outcome in self._fleet.run([self._scored(answer=request) for request in requests]):
            yield outcome if isinstance(outcome, HavocError) else right_rows(outcome)

    def divergences(self, alphas: Sequence[Sequence[float]]) -> Iterator[dict[str, float] | HavocError]:
        """KL(mixture || base) of each alpha by task, in the order of the alphas; the scoring workers share them."""
        num_parts = max(1, min(len(alphas), sum(worker.offer.scores for worker in self._fleet.workers.values())))
        rows = search_rows(self._place.recipe, 0)
        requests = [
            DivergeRequest(mixtures=self._mixtures, rows=rows, alphas=tuple(map(tuple, alphas[first::num_parts])))
            for first in range(num_parts)
        ]
        outcomes = list(self._fleet.run([self._scored(diverge=request) for request in requests]))
        for number in range(len(alphas)):
            outcome = outcomes[number % num_parts]
            yield outcome if isinstance(outcome, HavocError) else outcome[number // num_parts]

    @functools.cached_property
    def _tasks(self) -> Any:  # noqa: ANN401 - tuple of tasks, loaded once
        return recipe_tasks(self._place.recipe)

    @functools.cached_property
    def _shipped(self) -> tuple[Sent, Recipe]:
        """What a scoring worker needs, and the recipe that names it by its paths there."""
        place = self._place
        return shipped(place, self._base, experts=[expert_path(place.experts, task.name) for task in self._tasks])

    @functools.cached_property
    def _mixtures(self) -> MixedModels:
        """One thread a job by default: the number changes rounding, so it must not depend on the worker."""
        recipe, num_threads = self._shipped[1], self._place.num_threads or 1
        place = Place(recipe, Path(), Path("experts"), num_threads)
        return MixedModels(place=place, num_threads=num_threads, rule=recipe.search.rule)

    def _scored(self, **asked: Any) -> FleetJob:  # noqa: ANN401 - `answer` or `diverge`
        tree, sources = self._shipped[0]

        def do(worker: Worker) -> Any:  # noqa: ANN401 - what `jobs` gives
            self._fleet.send(worker, tree, sources)
            return self._fleet.ask(worker, ScoreTree(tree=tree, **asked))

        return FleetJob(fits=lambda worker: worker.offer.scores, do=do, needs="scores (an installation with [lab])")

    def _artifact(self, structure: Structure) -> Path:
        artifact = self._folder / str(structure)
        if not artifact.exists():
            export_artifact(self._base, artifact, structure=structure)
        return artifact

    def _may_measure(self, worker: Worker) -> bool:
        device = worker.offer.device
        return not worker.quarantine and device is not None and device_model(device) == self._bound.device

    def _measured(self, sentinel: Sent, artifact: Sent, num_repeats: int, worker: Worker) -> Sequence[MeasuredOnce]:
        """Measure one structure on a worker, then its sentinel, to check that the worker kept its speed."""
        for tree, sources in (sentinel, artifact):
            self._fleet.send(worker, tree, sources)
        watch = self._sentinels.get(worker.offer.token)
        if watch is None:
            opening = [self._once(sentinel[0], worker) for _ in range(NUM_COST_REPEATS)]
            watch = self._opened(worker, opening)
            if artifact is sentinel:
                return self._believed(worker, watch, artifact[0], opening[:num_repeats])
        found = [self._once(artifact[0], worker) for _ in range(num_repeats)]
        if watch.moved(self._once(sentinel[0], worker).values):
            words = watch.moved(self._once(sentinel[0], worker).values)
            self._quarantine(worker, words)
        return self._believed(worker, watch, artifact[0], found)

    def _opened(self, worker: Worker, opening: Sequence[MeasuredOnce]) -> Sentinel:
        """Start to watch a worker; exclude it if it differs from the first worker of its model."""
        values = [one.values for one in opening]
        watch = Sentinel.of(values)
        with self._one_opens:
            self._first = self._first or Sentinel.of(values)
            self._first.learn(values)
            words = self._first.moved(watch.normal)
        self._quarantine(worker, words and f"unlike the first device of its model, {words}")
        self._sentinels[worker.offer.token] = watch
        return watch

    def _believed(
        self, worker: Worker, watch: Sentinel, tree: Tree, found: Sequence[MeasuredOnce]
    ) -> Sequence[MeasuredOnce]:
        """Record what was measured on which worker, and update the worker's noise."""
        watch.learn([one.values for one in found])
        device = worker.offer.device
        self._fleet.say(
            "",
            worker=worker.name,
            device=device.fingerprint if device else None,
            artifact=tree.hash,
            measured=[one.values for one in found],
        )
        return found

    def _quarantine(self, worker: Worker, words: str) -> None:
        """Exclude a worker from measuring if `words` say why; its job goes to another worker. "" does nothing."""
        if words:
            worker.quarantine = words
            self._fleet.say(f"worker {worker.name} measures no more: {words}", quarantined=worker.name, why=words)
            raise WorkerLostError("its last measurement is discarded")

    def _once(self, tree: Tree, worker: Worker) -> MeasuredOnce:
        device = worker.offer.device
        assert device is not None  # noqa: S101 - `_may_measure`
        request = MeasureTree(
            tree=tree,
            fingerprint=device.fingerprint,
            provider=self._bound.provider,
            num_threads=self._bound.num_threads,
            workload=self._bound.workload,
            num_retries=0 if self._is_disturbed else COST_RETRIES,
            wait_s=COST_WAIT_S,
        )
        found = read(MeasuredOnce, self._fleet.ask(worker, request))
        self._is_disturbed |= bool(found.disturbance)  # see `BenchMeasurer.costs`
        return found


def shipped(place: Place, base: Base, *, experts: Sequence[Path] = ()) -> tuple[Sent, Recipe]:
    """Return all files that jobs read (base, basis, `experts`, the tasks' files) as one tree, and the recipe for it.

    Bundled bases and tasks are not sent. A recipe with rows from the hub is a `HavocError`: workers do not download.
    """
    recipe = place.recipe
    if recipe.data.online:
        raise HavocError(
            "workers download nothing from the hub: download the data sets and give --data DIR, without --online"
        )
    parts = {"basis.safetensors": place.out / "basis.safetensors"}
    model, data = recipe.model, recipe.data
    if base.directory is not None and model.base != "nano":
        name = f"base{Path(model.base).suffix}" if Path(model.base).is_file() else "base"
        parts[name] = Path(model.base)
        model = model.model_copy(update={"base": name})
    parts |= {f"experts/{file.name}": file for file in experts}
    names = []
    for number, (name, task) in enumerate(zip(recipe.experts.tasks, recipe_tasks(recipe), strict=True)):
        is_own = name.endswith(".toml")
        names.append(f"tasks/{number}/{Path(name).name}" if is_own else name)
        if is_own:
            parts[names[-1]] = Path(name)
        path = task.definition.data.path
        for root, inside in ((data.directory, "data"), (task.folder, f"tasks/{number}")):
            if path is not None and root is not None and (root / path).exists():
                parts[f"{inside}/{path}"] = root / path
                break
    if data.directory is not None:
        data = data.model_copy(update={"source": "data"})
    section = recipe.experts.model_copy(update={"tasks": tuple(names)})
    return tree_of(parts), recipe.model_copy(update={"model": model, "data": data, "experts": section})
