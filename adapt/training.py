"""Train an expert: descend a method's objective on singular values, and keep the state that did best on held-out rows.

`objectives.py` lists the methods. The random choices of a step depend only on the seed and the step's number, so a
stopped training continues from `training_<name>.safetensors` with the same steps. Every `validate_every` steps, and
before the first, the search split is scored like a release; ties keep the earlier state. A loss or gradient that is not
finite makes no step: the step that led to it is undone and counted. Too many in a row end the training, with the last
good state kept.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from .. import storage
from ..errors import HavocError, MeasurementError
from ..model.device import made_on, place_of
from ..model.scorer import TorchScorer
from ..progress import SILENT, Progress
from ..track.metrics_file import Record, record_nothing
from .divergence import compared_rows, mean_kl
from .expected_reward import ExpectedReward
from .expert import Expert
from .next_token import NextToken
from .objectives import Objective, TrainingSettings, method_for
from .optimizer import MuonGrokfast
from .reading import Reader, layer_of
from .reinforce import Reinforce
from .step_figures import StepFigures
from .svf import Basis, attach
from .tasks import sources
from .tasks.evaluation import score
from .training_state import TrainingState, load_state, save_state, save_trace, state_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..model.checkpoint import Base
    from .adapter import Adapter
    from .branches import Branched
    from .tasks.task import Row, Task

_OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "expected-reward": ExpectedReward,
    "reinforce": Reinforce,
    "next-token": NextToken,
}
_NUMBERS_OF_A_STEP = {"reward": "reward {:.3f}", "nats_per_token": "nats {:.3f}", "kl": "kl {:.4f}"}


def train_expert(
    base: Base,
    basis: Basis,
    task: Task,
    *,
    settings: TrainingSettings,
    checkpoint_dir: Path,
    data_dir: Path | None = None,
    online: bool = False,
    progress: Progress = SILENT,
    record: Record = record_nothing,
) -> Expert:
    """Train the expert of `task` and return it; `base.model` is unchanged afterwards.

    `checkpoint_dir` receives `training_<task>.safetensors` (state) and `training_<task>.jsonl` (one line per step).
    `record` gets the metrics of each step before its state is saved, so none is missing after an interruption. The
    expert is trained on the device of `base.model`, and its settings name it (`model.device.made_on`). Raises
    `HavocError` for a method that does not fit the task, and in reinforce if all sampled rewards of the first step are
    equal; `MeasurementError` if losses or gradients stay non-finite.
    """
    method_for(task, settings.method)  # a method that the task cannot have is refused before its rows are read
    source: dict[str, Any] = {"seed": settings.seed, "data_dir": data_dir, "online": online}
    # mbpp has 374
    train_rows = sources.rows(task, "train", settings.num_train_rows, may_be_fewer=True, **source)
    validation_rows = sources.rows(task, "search", settings.num_validation_rows, **source)
    return train_on_rows(
        base,
        basis,
        task,
        train_rows,
        validation_rows,
        settings=settings,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
        record=record,
    )


def train_on_rows(
    base: Base,
    basis: Basis,
    task: Task,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    *,
    settings: TrainingSettings,
    checkpoint_dir: Path,
    progress: Progress = SILENT,
    record: Record = record_nothing,
) -> Expert:
    """As `train_expert`, on rows that are read: gradients from `train_rows`, the choice of the step from the others."""
    part = trained_part(basis, base, settings.trained_layers)
    with attach(base.model, part) as adapter:
        found = train_adapter(
            base,
            adapter,
            basis,
            task,
            train_rows,
            validation_rows,
            settings=settings,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
            record=record,
        )
    return Expert(
        domain=task.name,
        deltas={**_untrained(basis), **found.values},
        base_hash=base.weight_hash,
        basis_hash=basis.hash,
        settings={
            **dataclasses.asdict(found.settings),
            **_prompting(base),
            "made_on": made_on(base.model.device),
            "trace": found.trace,
        },
        seed=settings.seed,
        score={**found.score, "split": "search"},
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The result of a training: the values of the best step, by parameter name.

    `score` has `num_right` and `num_rows` of the validation rows and that `step`; `trace` has one entry per step;
    `settings` name the method that `auto` chose.
    """

    values: dict[str, torch.Tensor]
    score: dict[str, Any]
    trace: list[dict[str, Any]]
    settings: TrainingSettings


def train_adapter(
    base: Base,
    adapter: Adapter,
    basis: Basis,
    task: Task,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    *,
    settings: TrainingSettings,
    checkpoint_dir: Path,
    progress: Progress = SILENT,
    record: Record = record_nothing,
) -> Trained:
    """As `train_on_rows`, for any adapter attached to `base.model`; the adapter keeps the state of the last step."""
    method = method_for(task, settings.method)
    settings = dataclasses.replace(settings, method=method)
    with storage.only_one(checkpoint_dir, f"training_{task.name}"):
        objective = _OBJECTIVES[method](base, adapter, task, train_rows, settings)
        run = _Run(base, adapter, task, objective, settings, checkpoint_dir, basis, record)
        with progress.stage(f"train {task.name}", settings.num_steps) as stage:
            stage.advance(run.num_done, run.summary())
            if run.num_done == 0:
                run.validate(validation_rows)
                run.record()
                stage.advance(0, run.summary())
            while run.num_done < settings.num_steps:
                run.step()
                if run.num_done % settings.validate_every == 0 or run.num_done == settings.num_steps:
                    run.validate(validation_rows)
                run.record()
                run.save()
                stage.advance(note=run.summary())
        return run.trained()


def trained_part(basis: Basis, base: Base, trained_layers: int | None) -> Basis:
    """Return the part of the basis that belongs to the last `trained_layers` layers; None: all of it."""
    if trained_layers is None:
        return basis
    first = base.config.num_layers - trained_layers
    if first < 0:
        raise HavocError(f"trained_layers is {trained_layers}, but the base has {base.config.num_layers} layers")
    return dataclasses.replace(
        basis, matrices={name: matrix for name, matrix in basis.matrices.items() if layer_of(name) >= first}
    )


class _Run:
    """The state of one training: deltas, optimizer, best validation, and the trace of every step."""

    def __init__(
        self,
        base: Base,
        adapter: Adapter,
        task: Task,
        objective: Objective,
        settings: TrainingSettings,
        checkpoint_dir: Path,
        basis: Basis,
        record: Record,
    ) -> None:
        self._base, self._adapter, self._task, self._objective = base, adapter, task, objective
        self._settings, self._directory = settings, checkpoint_dir
        self._optimizer = MuonGrokfast(adapter.parameters(), settings.optimizer)
        self._key = storage.sha256_json(
            {
                "base": base.weight_hash,
                "basis": basis.hash,
                "task": [task.name, task.sha256],
                "settings": {**dataclasses.asdict(settings), **_prompting(base)},
            }
        )
        self.num_done = 0
        self._num_skipped = 0
        self._best = adapter.snapshot()
        self._best_score: dict[str, Any] = {"num_right": -1, "num_rows": 0, "step": 0}
        self._trace: list[dict[str, Any]] = []
        self._compared: tuple[Reader, list[Branched]] | None = None
        scales = {name: value for name, value in adapter.deltas.items() if name in basis.matrices}
        self._figures = StepFigures(task.name, basis, scales, record)
        self._resume()

    def summary(self) -> str:
        """Return the few numbers that the progress bar shows."""
        last = self._trace[-1] if self._trace else {}
        words = [text.format(last[name]) for name, text in _NUMBERS_OF_A_STEP.items() if last.get(name) is not None]
        if self._best_score["num_rows"]:
            share = self._best_score["num_right"] / self._best_score["num_rows"]
            words.append(f"best {share:.1%} at step {self._best_score['step']}")
        return " ".join(words)

    def validate(self, rows: Sequence[Row]) -> None:
        """Score the validation rows; keep the deltas if they are the best so far and near enough to the base."""
        scorer = TorchScorer(self._base.model, self._base.tokenizer)
        scores = score(scorer, self._task, rows, max_new_tokens=self._settings.max_new_tokens)
        right, kl_to_base = scores.right, self._kl_to_base(rows)
        if self._trace:
            self._trace[-1] |= {"validation": sum(right) / len(right), "kl_to_base": kl_to_base}
        if sum(right) > self._best_score["num_right"] and kl_to_base < self._settings.max_kl:
            self._best = self._adapter.snapshot()
            self._best_score = {"num_right": sum(right), "num_rows": len(right), "step": self.num_done}
        self._figures.note_validation(scores, kl_to_base, best=self._best_score)

    def _kl_to_base(self, rows: Sequence[Row]) -> float:
        """KL(policy || base) on the first of the validation rows, nats a predicted token."""
        if self._compared is None:
            reader = Reader(self._base.model, self._adapter, pad_id=self._base.tokenizer.pad_id)
            self._compared = reader, compared_rows(self._base, self._task, rows)
        return mean_kl(*self._compared)

    def step(self) -> None:
        """Let the objective accumulate gradients, and take one optimizer step."""
        self._optimizer.zero_grad(set_to_none=True)
        descent = self._objective.descend(self.num_done)
        is_finite = descent.is_finite and self._has_finite_gradients()
        self._count_skip(is_finite=is_finite)
        if not is_finite and self._optimizer.restore_last_good():
            self._adapter.refold()
        if descent.loss is not None and is_finite:
            longest = self._settings.max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(self._adapter.parameters(), longest)
            self._figures.note_gradient(norm.item(), longest)
            self._optimizer.step()
            self._adapter.refold()
        self.num_done += 1
        figures = descent.figures if is_finite else {**descent.figures, "kl": None}
        self._trace.append({"step": self.num_done, **figures, "loss": descent.loss if is_finite else None})

    def record(self) -> None:
        """Hand the metrics of the last step on; before the first they are the base's."""
        self._figures.record(self.num_done, self._trace[-1] if self._trace else {}, num_skipped=self._num_skipped)

    def _has_finite_gradients(self) -> bool:
        gradients = [parameter.grad for parameter in self._adapter.parameters() if parameter.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _count_skip(self, *, is_finite: bool) -> None:
        """Never step on NaN or Inf: count such losses, and stop after too many in a row with the deltas as they are."""
        self._num_skipped = 0 if is_finite else self._num_skipped + 1
        if self._num_skipped >= self._settings.optimizer.max_consecutive_skips:
            raise MeasurementError(
                f"the loss was not finite {self._num_skipped} times in a row: lower the learning rate; "
                "the last good state is kept"
            )

    def trained(self) -> Trained:
        """Return the best state, and list the steps in the folder."""
        save_trace(self._trace, self._directory, self._task.name)
        return Trained(values=self._best, score=self._best_score, trace=self._trace, settings=self._settings)

    def save(self) -> None:
        """Write the state of training."""
        state = TrainingState(
            num_done=self.num_done,
            deltas=self._adapter.snapshot(),
            best=self._best,
            best_score=self._best_score,
            trace=self._trace,
            optimizer=self._optimizer.state_dict(),
        )
        save_state(state, self._directory, self._task.name, key=self._key, place=place_of(self._base.model.device))

    def _resume(self) -> None:
        place = place_of(self._base.model.device)
        state = load_state(self._directory, self._task.name, key=self._key, place=place)
        if state is None:
            return
        try:
            self._take(state)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            path = state_path(self._directory, self._task.name)
            raise HavocError(
                f"{path}: not a state of this training ({type(error).__name__}); remove it to start again"
            ) from error

    def _take(self, state: TrainingState) -> None:
        ours = {name: value.shape for name, value in self._adapter.snapshot().items()}
        if any({name: value.shape for name, value in theirs.items()} != ours for theirs in (state.deltas, state.best)):
            raise ValueError
        self.num_done, self._best_score, self._trace = state.num_done, state.best_score, state.trace
        self._adapter.load(state.deltas)
        self._best = dict(state.best)
        self._optimizer.load_state_dict(state.optimizer)


def _untrained(basis: Basis) -> dict[str, torch.Tensor]:
    """Deltas of an expert that is the base: 0 in every direction."""
    return {name: torch.zeros(matrix.num_directions) for name, matrix in basis.matrices.items()}


def _prompting(base: Base) -> dict[str, Any]:
    """The expert's settings about prompts, if they used the base's chat template."""
    return {} if base.tokenizer.chat is None else {"chat": True}
