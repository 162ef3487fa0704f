"""How often the exported artifact is right, task by task, scored in a fresh child on the very files that ship.

    run = run_accuracy(Path("artifact"), num_rows=1000)
    record = add_accuracy(record, run)              # refused when the record is of another artifact

The gate counts a row that the judge could not decide as wrong, so such rows stay in `num_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapt.tasks.names import DOMAINS
from ..adapt.tasks.task import load_tasks
from ..cores import num_physical_cores
from ..errors import HavocError, IdentityError
from ..export.runtime.artifact import asked_alpha
from ..export.runtime.child import run_worker
from ..export.runtime.held import hold
from ..model.config_file import read_config
from ..progress import SILENT
from .device import default_provider
from .judge.schema import DomainAccuracy, row_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..adapt.tasks.evaluation import Scorer, Scores
    from ..adapt.tasks.task import Task
    from ..progress import Progress, Stage
    from .judge.record import Record

_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class AccuracyRun:
    """Accuracy of one artifact: counts for the record, and which rows were right, for paired comparison.

    `files` and `manifest_sha256` are the artifact's hashes; `right[task]` is in the order of the rows that
    `rows_sha256` names; `num_cut[task]` prompts lost their beginning because they were longer than the model's context.
    `alpha` is the mixture that answered, None without experts.
    """

    files: dict[str, str]
    manifest_sha256: str
    tasks: dict[str, DomainAccuracy]
    right: dict[str, tuple[bool, ...]]
    num_cut: dict[str, int] = field(default_factory=dict)
    alpha: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the verdict of each row as a 0 or a 1."""
        return {
            "files": self.files,
            "manifest_sha256": self.manifest_sha256,
            "tasks": {task: counts.model_dump(mode="json") for task, counts in self.tasks.items()},
            "right": {task: "".join("01"[is_right] for is_right in rows) for task, rows in self.right.items()},
            "num_cut": self.num_cut,
            "alpha": self.alpha,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> AccuracyRun:
        """Read what `to_json` or a scoring child gives; anything else is a `KeyError`, `TypeError` or `ValueError`."""
        return cls(
            files=dict(plain["files"]),
            manifest_sha256=str(plain["manifest_sha256"]),
            tasks={
                task: DomainAccuracy.model_validate(counts, strict=False) for task, counts in plain["tasks"].items()
            },
            right={task: tuple(letter == "1" for letter in letters) for task, letters in plain["right"].items()},
            num_cut={task: int(num) for task, num in plain["num_cut"].items()},
            alpha=plain.get("alpha"),
        )


def run_accuracy(
    artifact: Path | str,
    *,
    tasks: Sequence[str] | None = None,
    num_rows: int | None = None,
    split: str = "gate",
    seed: int = 0,
    data_dir: Path | None = None,
    online: bool = False,
    few_shot: int | None = None,
    may_be_fewer: bool = False,
    max_new_tokens: int | None = None,
    is_chat: bool = True,
    alpha: Mapping[str, float] | None = None,
    provider: str | None = None,
    num_threads: int | None = None,
    progress: Progress = SILENT,
) -> AccuracyRun:
    """Score an artifact on `num_rows` rows of a split per task (None: the task's own number).

    `tasks` are names of bundled tasks or paths of TOML files; None takes the four domains that the model can read.
    With `may_be_fewer` a real data set with fewer rows is scored on all of them. `alpha` is the mixture of a live
    artifact, None for the manifest's. Raises `HavocError` for what is no artifact or asks for rows there are not,
    `IdentityError` for a changed artifact, `MeasurementError` when the scoring process dies.
    """
    if num_rows is not None and num_rows < 1:
        raise HavocError(f"{num_rows} rows prove nothing: give at least 1")
    require_text(Path(artifact))
    if provider is None:
        provider = default_provider()
    request = {
        "task": "accuracy",
        "provider": provider,
        "num_threads": num_threads or num_physical_cores(),
        "tasks": None if tasks is None else [_found_from_anywhere(task) for task in tasks],
        "few_shot": few_shot,
        "num_rows": num_rows,
        "split": split,
        "seed": seed,
        "data_dir": None if data_dir is None else str(Path(data_dir).absolute()),
        "online": online,
        "may_be_fewer": may_be_fewer,
        "max_new_tokens": max_new_tokens,
        "is_chat": is_chat,
        "alpha": None if alpha is None else dict(alpha),
    }
    with hold(Path(artifact)) as held:
        request["artifact"] = str(held.place)
        weights = asked_alpha(held.manifest, alpha, where=str(artifact))
        with progress.stage("score", (num_rows or 1000) * len(tasks or DOMAINS), unit="rows") as stage:
            result = run_worker(request, timeout_s=_TIMEOUT_S, listen=_announcer(stage))
        held.require_unchanged()
    found = {"files": held.hashes, "manifest_sha256": held.manifest.sha256, "alpha": weights or None}
    return AccuracyRun.from_json({**found, **result})


def _found_from_anywhere(task: str) -> str:
    """The task's name, or the absolute path of its file."""
    return str(Path(task).absolute()) if task.endswith(".toml") else task


def require_rows(
    artifact: Path,
    num_rows: int | None,
    *,
    tasks: Sequence[str] | None,
    data_dir: Path | None = None,
    online: bool = False,
    few_shot: int | None = None,
) -> None:
    """Refuse what cannot be scored before minutes of measuring: no tokenizer, no data, pictures for a text model."""
    from ..adapt.tasks.sources import rows

    require_text(artifact)
    can_see = read_config(artifact).vision is not None
    for task in tasks_to_score(tasks, can_see=can_see, data_dir=data_dir, online=online, few_shot=few_shot):
        if task.generator is None:
            rows(task, "gate", num_rows or task.num_rows, data_dir=data_dir, online=online, may_be_fewer=True)


def tasks_to_score(
    names: Sequence[str] | None,
    *,
    can_see: bool,
    data_dir: Path | None = None,
    online: bool = False,
    few_shot: int | None = None,
) -> tuple[Task, ...]:
    """Load the tasks named, None: the four domains but those the model cannot see; a picture for no eyes is refused."""
    asked = names or DOMAINS
    tasks = load_tasks(asked, data_dir=data_dir, online=online, few_shot=0)
    unseen = [task.name for task in tasks if task.needs_pictures and not can_see]
    if names and unseen:
        raise HavocError(f"the model reads text only: {', '.join(unseen)} cannot be scored")
    seen = [name for name, task in zip(asked, tasks, strict=True) if task.name not in unseen]
    return load_tasks(seen, data_dir=data_dir, online=online, few_shot=few_shot)


def require_text(artifact: Path) -> None:
    """Refuse an artifact that cannot read text, before anything is measured for its answers."""
    if not (artifact / "tokenizer.json").is_file():
        raise HavocError(
            f"{artifact} has no tokenizer.json (its base had none), so its answers cannot be scored: "
            "export it from a base that has one, or measure without accuracy (--n 0)"
        )


def fewer_rows(num_rows: Mapping[str, int], num_asked: int) -> list[str]:
    """Say of each task whose data set has fewer rows than were asked for how many it has."""
    return [f"{task}: {there} rows, {num_asked} asked" for task, there in num_rows.items() if there < num_asked]


def cut_prompts(num_cut: Mapping[str, int]) -> list[str]:
    """Say of each task with prompts longer than the context how many lost their beginning."""
    return [
        f"{task}: {num} prompts were longer than the model's context and lost their beginning"
        for task, num in num_cut.items()
        if num
    ]


def _announcer(stage: Stage) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        stage.advance(event["num_rows"], note=event["task"])

    return listen


def add_accuracy(record: Record, run: AccuracyRun) -> Record:
    """Return the record with the run's accuracy, sealed anew; `IdentityError` when they are of different artifacts."""
    if (record.subject.files, record.subject.manifest_sha256) != (run.files, run.manifest_sha256):
        raise IdentityError("the accuracy was scored on another artifact than the record was measured on")
    if run.alpha is not None and record.subject.alpha != run.alpha:
        raise IdentityError(f"the accuracy was scored at alpha {run.alpha}, the record measured {record.subject.alpha}")
    scored = {
        name: counts.model_copy(update={"right_rows": row_bits(run.right[name])}) if run.right.get(name) else counts
        for name, counts in run.tasks.items()
    }
    return record.model_copy(update={"accuracy": {**record.accuracy, **scored}}).sealed()


def score_here(request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Do the scoring in this process, which is the child: plain JSON values out."""
    from ..export.runtime.session import DecoderSession

    session = DecoderSession.open(
        request["artifact"],
        provider=request["provider"],
        num_threads=request["num_threads"],
        is_chat=request["is_chat"],
        alpha=request["alpha"],
    )
    data_dir = None if request["data_dir"] is None else Path(request["data_dir"])
    has_template = session.tokenizer is not None and session.tokenizer.chat is not None
    rows_asked = {**request, "data_dir": data_dir, "has_template": has_template}
    found = {}
    for task in tasks_asked(rows_asked, can_see=session.config.vision is not None):

        def advance(num_rows: int, name: str = task.name) -> None:
            emit({"event": "progress", "task": name, "num_rows": num_rows})

        found[task.name] = score_task(session, task, rows_asked, advance)
    return {
        "tasks": {name: counts for name, (counts, _) in found.items()},
        "right": {name: "".join("01"[is_right] for is_right in scores.right) for name, (_, scores) in found.items()},
        "num_cut": {name: scores.num_cut for name, (_, scores) in found.items()},
    }


def source_of(task: Task, split: str, data_dir: Path | None) -> str:
    """What the rows are called: a published data set's name only where its files have the hash that the task pins."""
    is_pinned = split in task.definition.data.data_sha256
    if task.generator is not None or data_dir is None or is_pinned:
        return task.dataset
    return f"{task.dataset} as folder {data_dir.name} has it"


def tasks_asked(asked: dict[str, Any], *, can_see: bool) -> tuple[Task, ...]:
    """Load the tasks of what was asked, see `tasks_to_score`."""
    where = {name: asked[name] for name in ("data_dir", "online", "few_shot")}
    return tasks_to_score(asked["tasks"], can_see=can_see, **where)


def score_task(
    scorer: Scorer, task: Task, asked: dict[str, Any], advance: Callable[[int], None]
) -> tuple[dict[str, Any], Scores]:
    """Score one task on the rows asked: the fields of its `DomainAccuracy`, and the verdict of every row."""
    from ..adapt.tasks.evaluation import score
    from ..adapt.tasks.sources import data_hash, rows, rows_hash

    split, where = asked["split"], {"data_dir": asked["data_dir"], "online": asked["online"]}
    num_rows = asked["num_rows"] or task.num_rows
    some = rows(task, split, num_rows, seed=asked["seed"], may_be_fewer=asked["may_be_fewer"], **where)
    scores = score(scorer, task, some, max_new_tokens=asked["max_new_tokens"], advance=advance)
    counts = {
        "num_right": sum(scores.right),
        "num_rows": len(some),
        "num_failed": scores.failed,
        "split": split,
        "rows_sha256": rows_hash(some),
        "source": source_of(task, split, asked["data_dir"]),
        "seed": asked["seed"],
        "metric": task.metric,
        "metrics": {name: {"num_right": sum(right), "num_rows": len(some)} for name, right in scores.right_by.items()},
        "few_shot": task.num_few_shot,
        "chat": asked["has_template"],
        "task_sha256": task.sha256,
        "data_sha256": data_hash(task, split, **where),
    }
    return counts, scores
