"""The jobs of worker processes: train an expert, answer rows with a mixture, compute a mixture's KL from the base.

A request names the paths of recipe, basis and experts, and the job. A worker keeps base, experts and rows for further
requests of the same recipe. Each request sets the number of threads, so the result does not depend on the number of
workers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapt.tasks import sources
from .adapt.tasks.evaluation import score
from .config import ExpertSettings, Recipe, Rule  # noqa: TC001 - `messages.read` needs them
from .cores import TorchDevice, limit_threads, processes_for, threads_for
from .errors import IdentityError, MeasurementError
from .export.runtime.devices import DEVICE_KINDS
from .messages import plain, read
from .model.device import clear_cache
from .processes import Workers
from .track.metrics_file import MetricsFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .adapt.basis import Basis
    from .adapt.expert import Expert
    from .adapt.objectives import TrainingSettings
    from .adapt.tasks.task import Row, Task
    from .export.candidates import CandidateSessions
    from .export.runtime.session import DecoderSession
    from .model.checkpoint import Base
    from .progress import Progress, Stage

_BYTES_PER_PARAMETER = 4
_COPIES_OF_A_TRAINING = 8  # base, folded weights, factors, and the activations kept for the gradient
_COPIES_OF_A_SCORING = 6  # base, folded, encoded and packed weights, keys and values; and one for each expert


@dataclass(frozen=True)
class Place:
    """The shared files of a run's jobs, and the user's number of threads for each, or None."""

    recipe: Recipe
    out: Path
    experts: Path
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceRequest:
    """Try a device."""

    device: TorchDevice


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Train the expert of one task of the recipe; its metrics go to the `metrics.jsonl` of the folder `metrics`."""

    place: Place
    metrics: Path
    num_threads: int
    task: str


@dataclass(frozen=True, kw_only=True)
class MixedModels:
    """What jobs over mixtures of the same experts have in common: how they are mixed, and the threads of each job."""

    place: Place
    num_threads: int
    rule: Rule


@dataclass(frozen=True, kw_only=True)
class RowRange:
    """The rows `start` to `start + size` of a split; the gate split may have fewer."""

    split: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """Answer rows of the tasks named with one mixture; `structure` is what `Structure.to_fields` gives."""

    mixtures: MixedModels
    rows: RowRange
    tasks: tuple[str, ...]
    alpha: tuple[float, ...]
    structure: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DivergeRequest:
    """Say how far each of some mixtures moved from the base."""

    mixtures: MixedModels
    rows: RowRange
    alphas: tuple[tuple[float, ...], ...]


def training_workers(base: Base, num_jobs: int, *, num_threads: int | None, device: TorchDevice = "cpu") -> Workers:
    """Return workers for this number of trainings of `base`; only one on a card, because one job fills it."""
    return _workers(base, num_jobs, num_copies=_COPIES_OF_A_TRAINING, num_threads=num_threads, device=device)


def scoring_workers(
    base: Base, num_jobs: int, *, num_experts: int, num_threads: int | None, device: TorchDevice = "cpu"
) -> Workers:
    """Return workers for this number of mixtures of experts of `base`; only one on a card."""
    num_copies = _COPIES_OF_A_SCORING + num_experts
    return _workers(base, num_jobs, num_copies=num_copies, num_threads=num_threads, device=device)


def _workers(base: Base, num_jobs: int, *, num_copies: int, num_threads: int | None, device: TorchDevice) -> Workers:
    num_parameters = base.model.num_parameters()
    if device != "cpu":
        return Workers(1, threads_for(num_parameters, num_threads=num_threads))
    threads = threads_for(num_parameters, num_jobs=num_jobs, num_threads=num_threads)
    num_bytes = _BYTES_PER_PARAMETER * num_parameters * num_copies
    return Workers(processes_for(num_jobs, bytes_per_process=num_bytes, num_threads=threads), threads)


def try_device(request: Mapping[str, Any], progress: Progress) -> str:  # noqa: ARG001 - as every job is called
    """Compute on a device (`DeviceRequest`) with torch and with ONNX Runtime; return torch's name for it.

    Raises `IdentityError` if one of them cannot. It runs in a worker, so that the card is free again afterwards.
    """
    from .bench.doctor import provider_problem
    from .model.device import made_on, open_device

    device = open_device(read(DeviceRequest, request).device)
    if (problem := provider_problem(DEVICE_KINDS[device.type].provider)) is not None:
        raise IdentityError(f"device {device.type}: {problem}; ONNX Runtime has to run the candidates on it")
    return str(made_on(device)["name"])


def train(request: Mapping[str, Any], progress: Progress) -> str:
    """Train an expert (`TrainRequest`), or continue its training; return the path of its file."""
    from .adapt.basis import base_basis
    from .adapt.expert import save_expert
    from .adapt.tasks.task import load_task
    from .adapt.training import train_expert
    from .adapt.training_state import forget_training
    from .jobs import training_settings
    from .model.checkpoint import load_base

    asked = read(TrainRequest, request)
    limit_threads(asked.num_threads)
    recipe, folder = asked.place.recipe, asked.place.experts
    directory, online = recipe.data.directory, recipe.data.online
    task = load_task(asked.task, data_dir=directory, online=online)
    base = load_base(recipe.model.base, is_chat=recipe.model.chat, device=recipe.model.device)

    def warn(text: str) -> None:
        with progress.stage("metrics", None) as stage:
            stage.advance(0, text)

    expert = train_expert(
        base,
        base_basis(base, asked.place.out, progress),
        task,
        settings=training_settings(recipe.experts, task),
        checkpoint_dir=folder,
        data_dir=directory,
        online=online,
        progress=progress,
        record=MetricsFile(asked.metrics, warn=warn).log,
    )
    path = save_expert(expert, folder)
    forget_training(folder, task.name)
    return str(path)


def answer(request: Mapping[str, Any], progress: Progress) -> dict[str, str]:
    """Answer rows with a mixture (`AnswerRequest`): for each task a 1 for each row that is right, else a 0.

    A judge that failed on any row is a `MeasurementError`.
    """
    from .model.structure import Structure

    asked = read(AnswerRequest, request)
    contest = _contest(_key(asked.mixtures))
    session = contest.sessions.open(asked.alpha, Structure.from_fields(asked.structure))
    clear_cache(contest.base.model.device)  # the memory of the previous candidate
    answers = {}
    tasks = [task for task in contest.tasks if task.name in asked.tasks]
    with progress.stage("answers", asked.rows.size * len(tasks), unit="rows") as stage:
        for task in tasks:
            right = answers_of(session, task, contest.rows(task, asked.rows), contest.recipe, stage)
            answers[task.name] = "".join("01"[is_right] for is_right in right)
    return answers


def diverge(request: Mapping[str, Any], progress: Progress) -> list[dict[str, float]]:
    """KL(mixture || base) of each mixture of a `DivergeRequest`, by task, on the first of the rows named."""
    from .adapt.divergence import compared_rows, divergences

    asked = read(DivergeRequest, request)
    contest = _contest(_key(asked.mixtures))
    clear_cache(contest.base.model.device)
    rows = {task.name: compared_rows(contest.base, task, contest.rows(task, asked.rows)) for task in contest.tasks}
    with progress.stage("divergence", len(asked.alphas)) as stage:
        found = divergences(contest.base, contest.basis, contest.experts, asked.alphas, rows, rule=asked.mixtures.rule)
        stage.advance(len(found))
    return found


def _key(mixtures: MixedModels) -> str:
    """The key of a worker's cached contest."""
    return json.dumps(plain(mixtures), sort_keys=True)


def answers_of(
    session: DecoderSession, task: Task, rows: Sequence[Row], recipe: Recipe, stage: Stage
) -> tuple[bool, ...]:
    """Whether `session` answers each row right; a judge that failed on any of them is a `MeasurementError`."""
    advance = functools.partial(stage.advance, note=task.name)
    scores = score(session, task, rows, max_new_tokens=recipe.experts.max_new_tokens, advance=advance)
    if scores.failed:
        reason = scores.reasons[scores.failed_rows[0]]
        raise MeasurementError(
            f"{task.name}: the judge failed on {scores.failed} of {len(rows)} rows ({reason}); they say nothing"
        )
    return scores.right


@dataclass
class _Contest:
    """What mixtures of one recipe share in a worker."""

    recipe: Recipe
    tasks: Sequence[Task]
    base: Base
    basis: Basis
    experts: Sequence[Expert]
    sessions: CandidateSessions
    _rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)

    def rows(self, task: Task, asked: RowRange) -> list[Row]:
        """Return the rows, read once: a longer reading begins with the shorter ones."""
        known, end = self._rows.get((task.name, asked.split), []), asked.start + asked.size
        if len(known) < end:
            known = self._rows[task.name, asked.split] = self._read(task, asked.split, end)
        return known[asked.start : end]

    def _read(self, task: Task, split: str, num_rows: int) -> list[Row]:
        data = self.recipe.data
        seed, directory, online = data.seed, data.directory, data.online
        if split != "gate":
            reader = sources.search_reader(seed=seed, data_dir=directory, online=online)
            return reader.rows(task, split, num_rows)
        return sources.rows(task, split, num_rows, seed=seed, data_dir=directory, online=online, may_be_fewer=True)


@functools.lru_cache(maxsize=1)
def _contest(key: str) -> _Contest:
    from .adapt.basis import Basis
    from .adapt.expert import expert_path, load_expert
    from .adapt.tasks.task import load_tasks
    from .export.candidates import CandidateSessions
    from .model.checkpoint import load_base

    mixtures = read(MixedModels, json.loads(key))
    place, recipe = mixtures.place, mixtures.place.recipe
    limit_threads(mixtures.num_threads)
    base = load_base(recipe.model.base, is_chat=recipe.model.chat, device=recipe.model.device)
    basis = Basis.load(place.out / "basis.safetensors")
    tasks = load_tasks(recipe.experts.tasks, data_dir=recipe.data.directory, online=recipe.data.online)
    paths = [expert_path(place.experts, task.name) for task in tasks]
    experts = [load_expert(path, base_hash=base.weight_hash, basis_hash=basis.hash) for path in paths]
    sessions = CandidateSessions(
        base,
        basis,
        experts,
        rule=mixtures.rule,
        provider=DEVICE_KINDS[recipe.model.device].provider,
        num_threads=mixtures.num_threads,
    )
    return _Contest(recipe, tasks, base, basis, experts, sessions)


def training_settings(experts: ExpertSettings, task: Task) -> TrainingSettings:
    """Translate a recipe's section into the trainer's settings; missing keys get the method's defaults."""
    from .adapt.objectives import METHOD_DEFAULTS, TrainingSettings, method_for
    from .adapt.optimizer import MuGrokConfig

    method = method_for(task, experts.method)
    own = METHOD_DEFAULTS[method]
    optimizer = dataclasses.replace(
        MuGrokConfig.from_phase(7),
        fallback_lr=experts.learning_rate or own.learning_rate,
        fallback_type=experts.fallback_type,
        enable_grokfast=experts.enable_grokfast,
        grokfast_lambda=experts.grokfast_lambda,
        use_qk_clip=experts.use_qk_clip,
        kl_coefficient=experts.kl_coefficient,
    )
    prompts_per_step = experts.prompts_per_step or own.prompts_per_step
    return TrainingSettings(
        method=method,
        trained_layers=experts.trained_layers,
        seed=experts.seed,
        num_steps=experts.num_steps or own.num_steps,
        prompts_per_step=prompts_per_step,
        samples_per_prompt=experts.samples_per_prompt,
        signal_prompts=min(experts.signal_prompts, prompts_per_step),
        max_draws=experts.max_draws,
        max_new_tokens=experts.max_new_tokens or task.max_new_tokens,
        num_train_rows=experts.num_train_rows,
        num_validation_rows=experts.num_validation_rows,
        validate_every=experts.validate_every or own.validate_every,
        max_kl=experts.max_kl,
        optimizer=optimizer,
    )
