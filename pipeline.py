"""The whole story on one screen: base -> experts -> mixture -> artifact -> record -> verdict -> report -> handoff.

Each stage reads the results of earlier stages from the output folder and writes its own result there, complete or not
at all. So the same command continues a stopped run: it finds the finished stages and does the rest.

    recipe.toml                         the recipe of this folder
    basis.safetensors experts/          singular-value basis, one z vector file per expert
    search/journal.jsonl front.json     every evaluation; the front and the choice
    artifact/ pt/                       the artifact for deployment; experts and folded model as .pt, if asked for
    gate.jsonl scores.json record.json  answers and accuracy on the gate split; the measurement
    report.html report.md ...           the same for people
    phase6.json handoff.json            from the phase before, if it handed over a model; for the next phase
    metrics.jsonl                       every metric of the run, step by step; trackers get its content
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import run_stages as stages
from . import storage
from .config import Recipe, load_recipe, recipe_toml
from .cores import limit_threads, threads_for
from .errors import HavocError, IdentityError, NothingLearnedError
from .run_stages import StagedProgress
from .track.metrics_file import record_nothing
from .track.tracker import require_trackers
from .tracking import log_final, log_search, open_tracking, without_trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .adapt.expert import Expert
    from .adapt.search import SearchResult
    from .adapt.svf import Basis
    from .adapt.tasks.task import Task
    from .bench.judge.gate import Judgement
    from .bench.judge.targets import Target
    from .bench.report.phase6 import HandedOver
    from .cluster.fleet import Fleet
    from .cluster.measurer import FleetMeasurer
    from .jobs import Place
    from .measuring import Bound
    from .model.checkpoint import Base
    from .progress import Progress
    from .track.metrics_file import Record
    from .track.tracker import Tracking


def run(
    recipe: Recipe,
    out: Path,
    *,
    handed: HandedOver | None = None,
    command: str = "havoc run",
    num_threads: int | None = None,
    fleet: Fleet | None = None,
    progress: Progress,
) -> list[tuple[str, Judgement]]:
    """Carry `recipe` out in the folder `out`; return each target's name and judgement.

    `num_threads` is the number of threads of each job (None: chosen by the size of the model); `handed` is the handoff
    of phase 6, whose model is then the base. The workers of a `fleet` train the experts and do the work of the search;
    this machine proves and measures the artifact.
    """
    from .bench.report import phase6
    from .bench.report.folder import write_report
    from .export.runtime.dialects import DIALECTS
    from .jobs import Place
    from .measuring import answered_on, bind, require_device
    from .model.checkpoint import load_base

    recipe = recipe if handed is None else with_base(recipe, handed)
    require_inputs(recipe)
    if not (out / "record.json").exists():
        require_device(recipe)
        bind(recipe)
        searched_on(recipe, out, fleet)
        require_rows(recipe)
    base = load_base(recipe.model.base, is_chat=recipe.model.chat)
    DIALECTS[recipe.export.dialect].require_heads(base.config.attention.head_dim)
    _ = base.tokenizer  # a base that cannot read text is refused before any work
    require_eyes(recipe, base)
    limit_threads(threads_for(base.model.num_parameters(), num_threads=num_threads))
    with storage.only_writer(out):
        claim_folder(recipe, out)
        if handed is not None:
            phase6.keep(handed, out)
        with open_tracking(recipe, out, job="run") as tracking:
            place = Place(recipe, out, out / "experts", num_threads)
            forget_undone(place, tracking)
            progress = StagedProgress(progress, recipe, out)
            basis, experts = train_experts(place, base, progress, follow=tracking.follow, fleet=fleet)
            require_change(experts, progress)
            progress.enter(stages.SEARCH)
            bound = searched_on(recipe, out, fleet)
            result = search_mixture(place, base, experts, progress, bound=bound, fleet=fleet, record=tracking.log)
            log_search(tracking, result, [expert.domain for expert in experts])
            progress.enter(stages.ARTIFACT)
            artifact = export_mixture(recipe, base, basis, experts, result, out, progress)
            write_torch_files(place, base, basis, experts, result, progress)
            answered = {**result.to_json(), "answered_on": answered_on(recipe)}
            storage.write_json(out / "front.json", linked(answered, artifact))
            measure_artifact(place, base, experts, result, artifact, progress, enter=progress.enter)
            _, judgements = write_report(out, targets=recipe.gate.targets, command=command, artifact=artifact)
            write_handoff(place, experts, result, artifact, judgements)
            by_target = {judgement.target: judgement for judgement in judgements}
            log_final(tracking, out, result, by_target, artifact=artifact)
    return list(zip(recipe.gate.targets, judgements, strict=True))


def with_base(recipe: Recipe, handed: HandedOver) -> Recipe:
    """Return the recipe with the model of the phase 6 handoff as its base; a recipe with another base is refused."""
    named = recipe.model.base if "base" in recipe.model.model_fields_set else None
    if named is not None and Path(named).resolve() != handed.model:
        raise HavocError(
            f"the recipe adapts {named!r}, but {handed.path} hands over {str(handed.model)!r}: leave model.base out of "
            "the recipe, or correct one of them"
        )
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(handed.model)})})


def require_inputs(recipe: Recipe) -> None:
    """Refuse targets and data that cannot be read before minutes of work and before anything is written."""
    from .bench.judge.targets import load_target, require_known_tasks

    require_trackers(recipe.track.to)
    text = recipe.export.calibration
    if text is not None and not Path(text).is_file():
        raise HavocError(f"{text!r}: no such text file; correct export.calibration or leave it out")
    data = recipe.data.directory
    if data is not None and not data.is_dir():
        raise HavocError(f'{str(data)!r}: no such directory of data sets; correct data.source or leave it "builtin"')
    from .measuring import recipe_tasks

    tasks = recipe_tasks(recipe)
    for target in map(load_target, recipe.gate.targets):
        require_known_tasks(target, [task.name for task in tasks])
        require_pinned_data(recipe, target, tasks)


def require_pinned_data(recipe: Recipe, target: Target, tasks: Sequence[Task]) -> None:
    """Refuse data or a task file that differs from a target's pin, before hours of work on a record it would refuse."""
    from .adapt.tasks.sources import data_hash

    for task in tasks:
        limit = next((limit for limit in target.limits if limit.metric == f"accuracy/{task.name}"), None)
        if limit is None:
            continue
        if limit.task_sha256 not in {None, task.sha256}:
            raise HavocError(
                f"target {target.name}: accuracy/{task.name} is pinned to another task file ({limit.task_sha256})"
            )
        if limit.data_sha256 is None:
            continue
        found = data_hash(task, "gate", data_dir=recipe.data.directory, online=recipe.data.online)
        if found != limit.data_sha256:
            raise HavocError(
                f"target {target.name}: accuracy/{task.name} is pinned to data {limit.data_sha256}, this is {found}"
            )


def require_eyes(recipe: Recipe, base: Base) -> None:
    """Refuse a task of pictures for a base that reads text only, or that cannot hold them, before hours of training."""
    from .adapt.tasks.sight import require_fitting_pictures
    from .measuring import recipe_tasks

    unseen = [task.name for task in recipe_tasks(recipe) if task.needs_pictures]
    if unseen and base.config.vision is None:
        names = [name for name in recipe.experts.tasks if name not in unseen]
        raise HavocError(
            f"{recipe.model.base} reads text only, but the tasks {', '.join(unseen)} show pictures: write "
            f"tasks = {json.dumps(names)} in [experts] of the recipe"
        )
    for task in recipe_tasks(recipe):
        require_fitting_pictures(task, base.config)


def require_rows(recipe: Recipe) -> None:
    """Refuse real data sets that lack rows, before training; the gate uses the rows that exist, up to its number."""
    from .adapt.tasks.sources import rows
    from .measuring import recipe_tasks

    data, num_validation = recipe.data.directory, recipe.experts.num_validation_rows
    num_searched = (recipe.search.num_repeats + 1) * recipe.search.num_rows
    needed = {"train": 1, "search": num_validation + num_searched, "gate": recipe.gate.num_rows}
    for task in recipe_tasks(recipe):
        for split, num_rows in needed.items() if task.generator is None else ():
            rows(task, split, num_rows, data_dir=data, online=recipe.data.online, may_be_fewer=split == "gate")


def require_experts(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder that lacks an expert of the recipe, before the minutes that a basis takes."""
    from .adapt.expert import expert_path
    from .measuring import recipe_tasks

    paths = {task.name: expert_path(folder, task.name) for task in recipe_tasks(recipe)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise HavocError(
            f"{folder} holds no expert for {', '.join(missing)} ({paths[missing[0]].name}): train it, or name in "
            "[experts] tasks of --recipe those that are there"
        )


def claim_folder(recipe: Recipe, out: Path) -> None:
    """Bind `out` to `recipe`: a folder of another recipe is refused, so results of two recipes never mix."""
    marker = out / "recipe.toml"
    if not marker.exists():
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise HavocError(
                f"{out} holds files but is not the result of a run (no {marker.name} in it); choose another --out"
            )
        storage.write_text(marker, recipe_toml(recipe))
    elif without_trackers(load_recipe(marker)) != without_trackers(recipe):
        raise HavocError(f"{out} is the result of another recipe (see {marker}); choose another --out or remove it")


def forget_undone(place: Place, tracking: Tracking) -> None:
    """Remove the metrics of work that will start again, because the folder holds no results of it."""
    from .adapt.expert import expert_path
    from .adapt.training_state import state_path
    from .measuring import recipe_tasks

    for name in (task.name for task in recipe_tasks(place.recipe)):
        if not expert_path(place.experts, name).exists() and not state_path(place.experts, name).exists():
            tracking.forget(f"svf/{name}/")
    for path, prefix in ((journal_path(place.out), "adas/"), (place.out / "record.json", "bench/")):
        if not path.exists():
            tracking.forget(prefix)


def journal_path(out: Path) -> Path:
    """The path of a search's journal, with every evaluation."""
    return out / "search" / "journal.jsonl"


def train_experts(
    place: Place,
    base: Base,
    progress: Progress,
    *,
    follow: Callable[[], None] = lambda: None,
    fleet: Fleet | None = None,
) -> tuple[Basis, list[Expert]]:
    """Compute the basis and train one expert per task; experts with a file are read instead."""
    from .adapt.basis import base_basis
    from .adapt.expert import expert_path
    from .measuring import recipe_tasks

    recipe = place.recipe
    basis = base_basis(base, place.out, progress)
    pairs = zip(recipe.experts.tasks, recipe_tasks(recipe), strict=True)
    missing = {name: task for name, task in pairs if not expert_path(place.experts, task.name).exists()}
    if missing:
        train_tasks(place, base, missing, progress, follow=follow, fleet=fleet)
    return basis, read_experts(recipe, place.experts, base, basis)


def train_tasks(
    place: Place,
    base: Base,
    tasks: Mapping[str, Task],
    progress: Progress,
    *,
    follow: Callable[[], None],
    fleet: Fleet | None,
) -> None:
    """Train the experts of tasks, by their names in the recipe, in processes of this machine or on a fleet's workers.

    `follow` is called after each step.
    """
    from .jobs import TrainRequest, training_settings, training_workers
    from .processes import results_of

    num_steps = sum(training_settings(place.recipe.experts, task).num_steps for task in tasks.values())
    domains = [task.name for task in tasks.values()]
    with progress.stage(f"train {', '.join(domains)}", num_steps, unit="steps") as stage:

        def listen(n: int, note: str) -> None:
            stage.advance(n, note)
            follow()

        if fleet is not None:
            from .cluster.trainer import train_on_workers

            train_on_workers(fleet, place, base, domains, listen=listen)
            return
        num_threads, device = place.num_threads, place.recipe.model.device
        with training_workers(base, len(tasks), num_threads=num_threads, device=device) as workers:
            requests = [
                TrainRequest(place=place, metrics=place.out, num_threads=workers.num_threads, task=name)
                for name in tasks
            ]
            for _ in results_of(workers.run(".jobs:train", requests, listen=listen)):
                pass


def read_experts(recipe: Recipe, folder: Path, base: Base, basis: Basis) -> list[Expert]:
    """Read the recipe's experts from a folder; one of another base is refused."""
    from .adapt.expert import expert_path, load_expert
    from .measuring import recipe_tasks

    return [
        load_expert(expert_path(folder, task.name), base_hash=base.weight_hash, basis_hash=basis.hash)
        for task in recipe_tasks(recipe)
    ]


def require_change(experts: Sequence[Expert], progress: Progress) -> None:
    """Name the experts that are equal to their base; if all are, raise `NothingLearnedError` with their scores."""
    still = [expert.domain for expert in experts if expert.is_base]
    if len(still) < len(experts):
        with progress.stage("experts", len(experts)) as stage:
            stage.advance(len(experts), f"{', '.join(still)}: no step beat the base" if still else "")
        return
    names = ", ".join(expert.domain for expert in experts)
    scores = [
        f"{expert.domain} {expert.score['num_right']} of {expert.score['num_rows']}"
        for expert in experts
        if expert.score
    ]
    seen = f" (right on the search split: {', '.join(scores)})" if scores else ""
    raise NothingLearnedError(
        f"training changed nothing: no state of {names} was better than the base{seen}; "
        "try another method, rate or number of steps in [experts], or easier rows"
    )


def searched_on(recipe: Recipe, out: Path, fleet: Fleet | None) -> Bound:
    """Find the device that the search measures on: this machine's, or one that the fleet's workers offer.

    Raises what `measuring.bind` and `cluster.measurer.bind_fleet` raise when there is none.
    """
    if fleet is None:
        from .measuring import bind

        return bind(recipe)
    from .cluster.measurer import bind_fleet

    return bind_fleet(fleet, recipe, journal_path(out))


def search_mixture(
    place: Place,
    base: Base,
    experts: Sequence[Expert],
    progress: Progress,
    *,
    bound: Bound,
    fleet: Fleet | None = None,
    record: Record = record_nothing,
) -> SearchResult:
    """Search alpha and structure against the bench, here or on a fleet; leave the journal and `front.json`."""
    from .adapt.search import search
    from .measuring import BenchMeasurer, answered_on, search_settings

    with contextlib.ExitStack() as opened:
        measurer: BenchMeasurer | FleetMeasurer
        if fleet is None:
            measurer = opened.enter_context(BenchMeasurer(place, base, num_experts=len(experts), bound=bound))
        else:
            from .cluster.measurer import FleetMeasurer

            measurer = opened.enter_context(FleetMeasurer(fleet, place, base, bound=bound))
        result = search(
            measurer,
            settings=search_settings(place.recipe, base, experts, bound),
            journal_path=journal_path(place.out),
            progress=progress,
            record=record,
        )
    storage.write_json(place.out / "front.json", {**result.to_json(), "answered_on": answered_on(place.recipe)})
    return result


def export_mixture(
    recipe: Recipe,
    base: Base,
    basis: Basis,
    experts: Sequence[Expert],
    result: SearchResult,
    out: Path,
    progress: Progress,
) -> Path:
    """Fold the chosen mixture and write the artifact, unless it is there already."""
    from .export.package import export_artifact
    from .export.runtime.options import GraphOptions
    from .model.structure import Structure

    artifact = out / "artifact"
    candidate = result.chosen.candidate
    if (artifact / "manifest.json").exists():
        require_mixture(artifact, base, experts, candidate.alpha)
        return artifact
    structure = candidate.structure
    if recipe.export.weights is not None:
        structure = Structure.named(recipe.export.weights, structure.activation_dtype)
    if recipe.export.compute != "auto":
        structure = replace(structure, compute=recipe.export.compute)
    return export_artifact(
        base,
        artifact,
        experts=experts,
        alpha=candidate.alpha,
        rule=recipe.search.rule,
        structure=structure,
        options=GraphOptions(dialect=recipe.export.dialect),
        calibration=None if recipe.export.calibration is None else Path(recipe.export.calibration),
        basis=basis,
        progress=progress,
    )


def write_torch_files(
    place: Place, base: Base, basis: Basis, experts: Sequence[Expert], result: SearchResult, progress: Progress
) -> None:
    """Write experts and folded model as `.pt` if the recipe asks for it and they do not exist yet."""
    from .export.torch_files import export_torch

    folder, recipe = place.out / "pt", place.recipe
    if recipe.export.pt and not folder.exists():  # a folder appears whole, and a run's choice does not change
        export_torch(
            base,
            folder,
            experts=experts,
            alpha=result.chosen.candidate.alpha,
            rule=recipe.search.rule,
            basis=basis,
            progress=progress,
        )


def require_mixture(artifact: Path, base: Base, experts: Sequence[Expert], alpha: Sequence[float]) -> None:
    """Refuse an existing artifact that was not made from the search's choice."""
    from .export.runtime.artifact import read_manifest

    manifest = read_manifest(artifact)
    weights = {expert.domain: float(weight) for expert, weight in zip(experts, alpha, strict=True)}
    hashes = {expert.domain: expert.hash for expert in experts}
    if (manifest.base_hash, manifest.alpha, manifest.expert_hashes) != (base.weight_hash, weights, hashes):
        raise IdentityError(f"{artifact}: not the mixture that this search chose; remove it to write the chosen one")


def linked(document: dict[str, Any], artifact: Path) -> dict[str, Any]:
    """Add the artifact's hash to a document, so that no report shows it with the record of another artifact."""
    from .bench.report.search_files import artifact_hash
    from .export.runtime.artifact import read_manifest

    files = {name: file.sha256 for name, file in read_manifest(artifact).files.items()}
    return {**document, "artifact_sha256": artifact_hash(files)}


_WAIT_S = 30.0


def measure_artifact(
    place: Place,
    base: Base,
    experts: Sequence[Expert],
    result: SearchResult,
    artifact: Path,
    progress: Progress,
    *,
    enter: Callable[[int], None] = lambda _: None,
) -> None:
    """Measure the artifact with the first target's workload, in fresh processes, and use the gate split once.

    `enter` is called with the number of each stage that begins here. The results are `gate.jsonl`, `scores.json` and
    `record.json`. It waits a while for other work on the machine to end. The record is written last: it shows that the
    other files are complete.
    """
    from .bench.accuracy import add_accuracy
    from .bench.measure import measure
    from .gate_split import GateJournal, score_artifact, score_rows
    from .measuring import bind

    recipe, out = place.recipe, place.out
    if (out / "record.json").exists():
        require_measured(artifact, out / "record.json")
        return
    journal = GateJournal(place, base, experts)
    enter(stages.GATE_ARTIFACT)
    scored = score_artifact(place, base, artifact, journal, progress)
    alpha = result.chosen.candidate.alpha
    enter(stages.GATE_OTHERS)
    scores = score_rows(place, base, experts, alpha=alpha, mixture=scored.right, journal=journal, progress=progress)
    storage.write_json(out / "scores.json", linked(scores, artifact))
    bound = bind(recipe)
    enter(stages.MEASUREMENT)
    record = measure(
        artifact,
        profile=recipe.bench.profile,
        provider=bound.provider,
        num_threads=bound.num_threads,
        workload=bound.workload,
        wait_s=_WAIT_S,
        progress=progress,
    )
    add_accuracy(record, scored).save(out / "record.json")


def require_measured(artifact: Path, path: Path) -> None:
    """Refuse a finished folder if its artifact is no longer the one of its record."""
    from .bench.judge.gate import hash_artifact
    from .bench.judge.identity import artifact_problem
    from .bench.judge.record import load_record

    problem = artifact_problem(load_record(path).subject, hash_artifact(artifact))
    if problem is not None:
        raise IdentityError(f"{artifact}: {problem}; put the measured artifact back, or remove {path} to measure this")


def write_handoff(
    place: Place, experts: Sequence[Expert], result: SearchResult, artifact: Path, judgements: Sequence[Judgement]
) -> None:
    """Write `handoff.json`, the form seed 003 hands to the next phase."""
    from .adapt.expert import expert_path
    from .bench.judge.record import load_record
    from .bench.report.handoff import build_handoff
    from .bench.report.phase6 import read_kept
    from .export.torch_files import MODEL, expert_file
    from .measuring import recipe_tasks

    out = place.out
    files, model = (
        {expert.domain: str(expert_path(Path("experts"), expert.domain)) for expert in experts},
        artifact.name,
    )
    if place.recipe.export.pt:
        files = {expert.domain: str(Path("pt") / expert_file(expert.domain)) for expert in experts}
        model = str(Path("pt") / MODEL)
    mixture = json.loads((artifact / "mixture.json").read_text())
    handoff = build_handoff(
        load_record(out / "record.json"),
        judgements,
        scores=storage.read_json(out / "scores.json"),
        is_converged=result.convergence.is_converged,
        max_kl=place.recipe.experts.max_kl,
        above={task.name: share for task in recipe_tasks(place.recipe) if (share := task.definition.limits.above)},
        experts=files,
        best_mixture=[expert["alpha"] for expert in mixture["experts"]],
        adapted_model=model,
        artifact=artifact.name,
        handed=read_kept(out),
    )
    storage.write_json(out / "handoff.json", handoff)
