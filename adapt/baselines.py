"""Compare SVF with other ways of adapting: the same rows, number of prompts and seeds, scored on the same gate rows.

    svf-reward        all singular-value scales, by reward: reinforce, or expected-reward for a task of choices
    svf-next-token    the same scales, from right answers
    lora-reward       LoRA on the same matrices, by reward
    lora-next-token   LoRA on the same matrices, from right answers
    kind-next-token   the scales of one kind of matrix only, from right answers

`training.train_adapter` trains every arm, with the same train rows, loss, optimizer, KL term and validation. A learning
rate that suits scales does not suit LoRA's factors, so every arm tries the same number of rates. For each seed the
search rows choose the rate and the step. Gate rows choose nothing.

    asked.json                          the settings and rows that the folder belongs to
    trained/ARM/seed-S/rate-R/          states of training, then `trained.safetensors` and the seconds of every step
    arms/ARM-seed-S.json base.json      which gate rows were right; one file for each finished arm and seed
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from .. import storage
from ..bounds import TWO_SIDED, share_ends
from ..errors import HavocError
from ..model.scorer import TorchScorer
from ..progress import SILENT
from .basis import TARGETS, Basis, is_target
from .lora import attach_lora, require_peft
from .objectives import method_for
from .paired import paired_over_seeds
from .svf import attach
from .tasks import sources
from .tasks.evaluation import score
from .tasks.names import ARMS
from .tasks.sources import rows_hash
from .tensor_file import read_tensor_file, write_tensor_file
from .training import train_adapter
from .training_state import forget_training

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ..model.checkpoint import Base
    from ..progress import Progress
    from .adapter import Adapter
    from .objectives import TrainingSettings
    from .tasks.names import Method
    from .tasks.task import Task

FORMAT: Final = "havoc-baselines/1"
_TRAINED_FORMAT = "havoc-trained/1"
_TIMES = ("step_s", "cpu_s", "involuntary_switches")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineSettings:
    """The arms of a comparison and their budget.

    `training` has the settings that all arms share; each arm has its own method, seed and learning rate. Scales try
    `rates` and LoRA tries `lora_rates`; both must have the same length. `kind` is one of `basis.TARGETS`. `data_seed`
    makes the built-in rows, which are the same for every seed of training.
    """

    training: TrainingSettings
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    lora_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    rank: int = 16
    kind: str = "down_proj"
    num_gate_rows: int = 500
    data_seed: int = 0
    data_dir: Path | None = None
    online: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that compare nothing or compare unfairly."""
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or not self.arms:
            raise HavocError(f"unknown arm {', '.join(unknown) or '(none)'}: choose from {', '.join(ARMS)}")
        if self.kind not in TARGETS:
            raise HavocError(f"unknown kind of matrix {self.kind!r}: choose from {', '.join(TARGETS)}")
        if len(self.rates) != len(self.lora_rates):
            raise HavocError(
                f"{len(self.rates)} learning rates for scales and {len(self.lora_rates)} for LoRA: "
                "give the same number to both, or one side is tuned better than the other"
            )
        for name, values in (("seeds", self.seeds), ("rates", self.rates), ("LoRA's rates", self.lora_rates)):
            if not values or len(set(values)) < len(values):
                raise HavocError(f"{name}: give at least one, and each only once")
        if any(arm.startswith("lora") for arm in self.arms):
            require_peft()


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of adapting: what is trained, by which method, on which matrices. `rank` None means scales."""

    name: str
    method: Method
    matrices: tuple[str, ...]
    rank: int | None
    rates: tuple[float, ...]

    @property
    def title(self) -> str:
        """The name for readers: "LoRA r = 16, next-token"."""
        what = f"LoRA r = {self.rank}" if self.rank else "SVF" if self.matrices == TARGETS else self.matrices[0]
        return f"{what}, {self.method}"


def arms_of(task: Task, settings: BaselineSettings) -> list[Arm]:
    """Return the chosen arms in the order of `ARMS`."""
    by_reward = method_for(task, "expected-reward" if task.kind == "choice" else "reinforce")
    found = []
    for name in (arm for arm in ARMS if arm in settings.arms):
        what, _, how = name.partition("-")
        is_lora = what == "lora"
        found.append(
            Arm(
                name=name,
                method=by_reward if how == "reward" else method_for(task, "next-token"),
                matrices=(settings.kind,) if what == "kind" else TARGETS,
                rank=settings.rank if is_lora else None,
                rates=settings.lora_rates if is_lora else settings.rates,
            )
        )
    return found


def run_baselines(
    base: Base,
    basis: Basis,
    task: Task,
    settings: BaselineSettings,
    out: Path,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train and score every arm that is not in `out` yet, and return the comparison as plain JSON values.

    A stopped run continues inside the training that was interrupted. Raises `HavocError` if the folder belongs to
    another comparison, and the errors of a training.
    """
    return _Comparison(base, basis, task, settings, out, progress).document()


class _Comparison:
    """One comparison in its folder: the rows, which are read once, and the arms."""

    def __init__(
        self, base: Base, basis: Basis, task: Task, settings: BaselineSettings, out: Path, progress: Progress
    ) -> None:
        self._base, self._basis, self._task = base, basis, task
        self._settings, self._out, self._progress = settings, out, progress
        self._arms = arms_of(task, settings)
        where: dict[str, Any] = {
            "seed": settings.data_seed,
            "data_dir": settings.data_dir,
            "online": settings.online,
        }
        training = settings.training
        self._train = sources.rows(task, "train", training.num_train_rows, may_be_fewer=True, **where)
        self._validation = sources.rows(task, "search", training.num_validation_rows, may_be_fewer=True, **where)
        self._gate = sources.rows(task, "gate", settings.num_gate_rows, may_be_fewer=True, **where)
        self._asked = self._facts()
        self._bind()

    def _facts(self) -> dict[str, Any]:
        """All settings that the folder's numbers depend on; arms and seeds are not among them, they may be added."""
        settings, training = self._settings, self._settings.training
        common = {name: value for name, value in dataclasses.asdict(training).items() if name not in {"method", "seed"}}
        common["optimizer"].pop("fallback_lr")
        return {
            "format": FORMAT,
            "task": {"name": self._task.name, "sha256": self._task.sha256, "metric": self._task.metric},
            "base": {"weight_hash": self._base.weight_hash, "num_parameters": self._base.model.num_parameters()},
            "is_chat": self._base.tokenizer.chat is not None,
            "data_seed": settings.data_seed,
            "training": common,
            "rates": list(settings.rates),
            "lora_rates": list(settings.lora_rates),
            "rank": settings.rank,
            "kind": settings.kind,
            "rows": {
                split: {"num_rows": len(rows), "sha256": rows_hash(rows)}
                for split, rows in (("train", self._train), ("search", self._validation), ("gate", self._gate))
            },
        }

    def _bind(self) -> None:
        path = self._out / "asked.json"
        asked = json.loads(storage.canonical_json(self._asked))
        if not path.exists():
            storage.write_json(path, asked)
            return
        theirs = storage.read_json(path)
        changed = [name for name in asked if not isinstance(theirs, dict) or theirs.get(name) != asked[name]]
        if changed:
            raise HavocError(
                f"{self._out} holds a comparison that differs in {', '.join(changed)}: "
                "choose another --out, or remove that folder"
            )

    def document(self) -> dict[str, Any]:
        settings = self._settings
        places = [(arm, seed) for arm in self._arms for seed in settings.seeds]
        with self._progress.stage("baselines", 1 + len(places), unit="arms") as stage:
            base = self._base_marks()
            stage.advance(note="base")
            found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in self._arms}
            for arm, seed in places:
                stage.advance(0, note=f"{arm.title}, seed {seed}")
                found[arm.name].append(self._finished(arm, seed))
                stage.advance(note=f"{arm.title}, seed {seed}")
        right = _bools(base["right"])
        by_arm = {name: [_bools(one["right"]) for one in runs] for name, runs in found.items()}
        sizes = {arm.name: found[arm.name][0]["num_parameters"] for arm in self._arms}
        return {
            **self._asked,
            "seeds": list(settings.seeds),
            "num_training_prompts": settings.training.num_steps * settings.training.prompts_per_step,
            "base": {**self._asked["base"], **base},
            "arms": [
                {
                    "name": arm.name,
                    "title": arm.title,
                    "method": arm.method,
                    "matrices": list(arm.matrices),
                    "rank": arm.rank,
                    "num_parameters": sizes[arm.name],
                    "mean": statistics.fmean(one["num_right"] / one["num_rows"] for one in found[arm.name]),
                    "difference": paired_over_seeds(by_arm[arm.name], [right] * len(settings.seeds)),
                    "runs": found[arm.name],
                }
                for arm in self._arms
            ],
            "pairs": [
                {"ours": ours, "theirs": theirs, **paired_over_seeds(by_arm[ours], by_arm[theirs])}
                for ours, theirs in combinations(by_arm, 2)
            ],
            "lora_over_svf": _ratio(sizes),
        }

    def _base_marks(self) -> dict[str, Any]:
        path = self._out / "arms" / "base.json"
        if not path.exists():
            storage.write_json(path, self._scored("base"))
        return _read_result(path, len(self._gate))

    def _finished(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the content of an arm's file; if it is missing, train at every rate and score the best result."""
        path = self._out / "arms" / f"{arm.name}-seed-{seed}.json"
        if not path.exists():
            storage.write_json(path, self._trained_and_scored(arm, seed))
        return _read_result(path, len(self._gate))

    def _trained_and_scored(self, arm: Arm, seed: int) -> dict[str, Any]:
        trainings = [self._trained(arm, seed, rate) for rate in arm.rates]
        # ties go to the smaller rate
        best = max(range(len(trainings)), key=lambda place: (trainings[place].score["num_right"], -place))
        chosen, rate = trainings[best], arm.rates[best]
        with self._attached(arm, seed) as adapter:
            adapter.load(chosen.values)
            scored = self._scored(f"{arm.title}, seed {seed}")
        return {
            "arm": arm.name,
            "seed": seed,
            **scored,
            "num_parameters": sum(value.numel() for value in chosen.values.values()),
            "rate": rate,
            "validation": chosen.score,
            "validation_by_rate": [
                [rate, found.score["num_right"]] for rate, found in zip(arm.rates, trainings, strict=True)
            ],
            **chosen.seconds,
        }

    @contextlib.contextmanager
    def _attached(self, arm: Arm, seed: int) -> Iterator[Adapter]:
        matrices = {name: one for name, one in self._basis.matrices.items() if is_target(name, arm.matrices)}
        if arm.rank is None:
            with attach(self._base.model, dataclasses.replace(self._basis, matrices=matrices)) as scales:
                yield scales
            return
        with attach_lora(self._base.model, list(matrices), rank=arm.rank, seed=seed) as factors:
            yield factors

    def _trained(self, arm: Arm, seed: int, rate: float) -> _Training:
        """Read the result of a finished training, or train."""
        folder = self._out / "trained" / arm.name / f"seed-{seed}" / f"rate-{rate:g}"
        path = folder / "trained.safetensors"
        if not path.exists():
            training = self._settings.training
            own = dataclasses.replace(
                training,
                method=arm.method,
                seed=seed,
                optimizer=dataclasses.replace(training.optimizer, fallback_lr=rate),
            )
            times = _StepTimes(folder)
            with self._attached(arm, seed) as adapter:
                found = train_adapter(
                    self._base,
                    adapter,
                    self._basis,
                    self._task,
                    self._train,
                    self._validation,
                    settings=own,
                    checkpoint_dir=folder,
                    progress=self._progress,
                    record=times.record,
                )
            metadata = {"format": _TRAINED_FORMAT, "score": json.dumps(found.score), "seconds": times.text()}
            write_tensor_file(path, found.values, metadata=metadata)
            forget_training(folder, self._task.name)
        values, metadata = read_tensor_file(path, format_name=_TRAINED_FORMAT)
        return _Training(values, json.loads(metadata["score"]), json.loads(metadata["seconds"]))

    def _scored(self, name: str) -> dict[str, Any]:
        """Score the current model on every gate row; a row whose judge failed counts as wrong, and in `num_failed`."""
        scorer = TorchScorer(self._base.model, self._base.tokenizer)
        with self._progress.stage(f"gate rows, {name}", len(self._gate), unit="rows") as stage:
            scores = score(
                scorer,
                self._task,
                self._gate,
                max_new_tokens=self._settings.training.max_new_tokens,
                advance=stage.advance,
            )
        num_right, num_rows = sum(scores.right), len(scores.right)
        low, high = share_ends(num_right, num_rows, confidence=TWO_SIDED)
        return {
            "num_right": num_right,
            "num_rows": num_rows,
            "num_failed": scores.failed,
            "low": low,
            "high": high,
            "right": "".join("01"[is_right] for is_right in scores.right),
        }


@dataclass(frozen=True, slots=True)
class _Training:
    values: Mapping[str, Tensor]
    score: dict[str, Any]
    seconds: dict[str, Any]


class _StepTimes:
    """Seconds of every step, in a journal, so an interruption loses none; a repeated step counts once."""

    def __init__(self, folder: Path) -> None:
        self._journal = storage.Journal(folder / "times.jsonl")

    def record(self, _axis: str, step: int, values: Mapping[str, float | None]) -> None:
        """Record a step; a training calls this as its `record`."""
        named = {name.rpartition("/")[2]: value for name, value in values.items()}
        entry = {"step": step, "is_validated": "kl_to_base" in named}
        self._journal.append({**entry, **{name: named.get(name) for name in _TIMES}})

    def text(self) -> str:
        """JSON: seconds of all steps, how often the process was put aside, and the median step without validation."""
        steps = {entry["step"]: entry for entry in self._journal.entries if entry["step"]}
        bare = [entry["cpu_s"] for entry in steps.values() if not entry["is_validated"]]
        sums = {f"train_{name}": sum(entry[name] or 0 for entry in steps.values()) for name in _TIMES}
        return json.dumps({**sums, "bare_step_cpu_s": statistics.median(bare) if bare else None})


def _ratio(sizes: Mapping[str, int]) -> float | None:
    """Trained values of LoRA divided by those of SVF on the same matrices; None if one of them is missing."""
    scales = [size for name, size in sizes.items() if name.startswith("svf")]
    factors = [size for name, size in sizes.items() if name.startswith("lora")]
    return factors[0] / scales[0] if scales and factors else None


def _bools(marks: str) -> tuple[bool, ...]:
    return tuple(mark == "1" for mark in marks)


def _read_result(path: Path, num_rows: int) -> dict[str, Any]:
    """Read an arm's file; a file without the verdict of every gate row is a `HavocError`."""
    found = storage.read_json(path)
    marks = found.get("right") if isinstance(found, dict) else None
    is_whole = isinstance(marks, str) and len(marks) == num_rows and set(marks) <= {"0", "1"}
    if not is_whole or not isinstance(found, dict) or found.get("num_right") != str(marks).count("1"):
        raise HavocError(f"{path}: does not hold the verdicts of {num_rows} gate rows; remove it to score again")
    return found
