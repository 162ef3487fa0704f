"""The gate split, opened after every choice has been made: answers of the artifact, the base and the experts.

`gate.jsonl` holds the answers, a part of the rows in each line, so a stopped run asks only the other rows. A line is
valid for the base, experts, tasks and data that answered it; a line of the artifact is valid for the same files only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from . import storage
from .adapt.paired import paired_margin
from .adapt.tasks.evaluation import Accuracy, Scoring
from .adapt.tasks.sources import data_hash
from .bench.accuracy import AccuracyRun, run_accuracy
from .cores import threads_for
from .errors import HavocError
from .jobs import AnswerRequest, MixedModels, RowRange, scoring_workers
from .measuring import answered_elsewhere, divergences_of, recipe_tasks, right_rows
from .model.structure import Structure
from .processes import results_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .adapt.candidate import Answers
    from .adapt.expert import Expert
    from .jobs import Place
    from .model.checkpoint import Base
    from .progress import Progress

PART_ROWS: Final = 256
"""Rows of one task that one contestant answers between two lines of the journal."""


class GateJournal:
    """The answers on the gate split of one base, its experts and the artifact of a run."""

    def __init__(self, place: Place, base: Base, experts: Sequence[Expert]) -> None:
        """Open `gate.jsonl` of the run's folder, or begin it; one of other experts, tasks or data is a `HavocError`."""
        path, recipe = place.out / "gate.jsonl", place.recipe
        data_dir, online = recipe.data.directory, recipe.data.online
        tasks = recipe_tasks(recipe)
        asked = {
            "base": base.weight_hash,
            "experts": [expert.hash for expert in experts],
            "tasks": {task.name: task.sha256 for task in tasks},
            "data": {task.name: data_hash(task, "gate", data_dir=data_dir, online=online) for task in tasks},
            "recipe": recipe.model_dump(mode="json"),
            **answered_elsewhere(recipe),
        }
        self._journal = storage.Journal(path)
        opening = {"kind": "gate", "asked": storage.sha256_json(asked)}
        if not self._journal.entries:
            self._journal.append(opening)
        if self._journal.entries[0] != opening:
            raise HavocError(
                f"{path} holds answers of another base, other experts, tasks or data; remove it to score again"
            )
        try:
            self._parts = {
                (str(entry["name"]), str(entry["task"]), int(entry["start"])): _marks(entry["right"])
                for entry in self._journal.entries
                if entry["kind"] == "part"
            }
            self._runs = [_run(entry["run"]) for entry in self._journal.entries if entry["kind"] == "artifact"]
        except (KeyError, TypeError, ValueError) as error:
            raise HavocError(
                f"{path} holds a line that HAVOC did not write; restore the file, or remove it to score again"
            ) from error

    def part(self, name: str, task: str, start: int, size: int) -> str | None:
        """The marks of one part of a contestant's rows, 1 for each right row; None if it was not answered."""
        marks = self._parts.get((name, task, start))
        return marks if marks is not None and len(marks) == size else None

    def keep(self, name: str, task: str, start: int, right: str) -> None:
        """Write down one part; it is on disk when this returns."""
        self._journal.append({"kind": "part", "name": name, "task": task, "start": start, "right": right})
        self._parts[name, task, start] = right

    def run_of(self, files: Mapping[str, str], manifest_sha256: str) -> AccuracyRun | None:
        """The answers of the artifact with exactly these files; None if it was not scored."""
        same = [run for run in self._runs if (run.files, run.manifest_sha256) == (files, manifest_sha256)]
        return same[-1] if same else None

    def keep_run(self, run: AccuracyRun) -> None:
        """Write down the artifact's answers."""
        self._journal.append({"kind": "artifact", "run": run.to_json()})
        self._runs.append(run)


def _marks(text: str) -> str:
    if not text or not set(text) <= {"0", "1"}:
        raise ValueError(text)
    return text


def _run(plain: Mapping[str, Any]) -> AccuracyRun:
    run = AccuracyRun.from_json(plain)
    if {task: len(rows) for task, rows in run.right.items()} != {task: c.num_rows for task, c in run.tasks.items()}:
        raise ValueError(plain)
    return run


def score_artifact(place: Place, base: Base, artifact: Path, journal: GateJournal, progress: Progress) -> AccuracyRun:
    """Score the artifact on the gate split, unless the journal holds the answers of these very files."""
    from .bench.judge.gate import hash_artifact
    from .export.runtime.artifact import MANIFEST

    files = hash_artifact(artifact)
    known = journal.run_of(files, files.pop(MANIFEST))
    if known is not None:
        return known
    recipe = place.recipe
    run = run_accuracy(
        artifact,
        Scoring(
            tasks=recipe.experts.tasks,
            num_rows=recipe.gate.num_rows,
            may_be_fewer=True,
            seed=recipe.data.seed,
            data_dir=recipe.data.directory,
            online=recipe.data.online,
            max_new_tokens=recipe.experts.max_new_tokens,
            is_chat=recipe.model.chat,
        ),
        num_threads=threads_for(base.model.num_parameters(), num_threads=place.num_threads),
        progress=progress,
    )
    journal.keep_run(run)
    return run


def score_rows(
    place: Place,
    base: Base,
    experts: Sequence[Expert],
    *,
    alpha: Sequence[float],
    mixture: Answers,
    journal: GateJournal,
    progress: Progress,
) -> dict[str, Any]:
    """Let base and experts answer the gate split, and compare them with the artifact's answers, `mixture` of `alpha`.

    All answer the same rows; an expert that changes nothing answers like the base and is not asked. `margin` is the
    mixture's mean over the tasks minus the other's, with a 95 % interval of the paired differences; `is_proven` says
    that the interval is above 0. `gains` compare each expert with the base on its own task in the same way.
    `kl_to_base` is KL(adapted || base) by task, in nats per predicted token.
    """
    tasks = [task.name for task in recipe_tasks(place.recipe)]
    alphas = {expert.domain: [float(expert is other) for other in experts] for expert in experts}
    contestants = {"base": [0.0] * len(experts)}
    contestants |= {expert.domain: alphas[expert.domain] for expert in experts if not expert.is_base}
    num_jobs = len(tasks) * len(contestants)
    rows = RowRange(split="gate", start=0, size=place.recipe.gate.num_rows)
    with scoring_workers(
        base, num_jobs, num_experts=len(experts), num_threads=place.num_threads, device=place.recipe.model.device
    ) as workers:
        sizes = {
            (name, task, start): min(PART_ROWS, len(mixture[task]) - start)
            for task in tasks
            for name in contestants
            for start in range(0, len(mixture[task]), PART_ROWS)
        }
        missing = [part for part, size in sizes.items() if journal.part(*part, size) is None]
        alone = MixedModels(place=place, num_threads=workers.num_threads, rule="delta")
        requests = [
            AnswerRequest(
                mixtures=alone,
                rows=RowRange(split="gate", start=start, size=sizes[name, task, start]),
                tasks=(task,),
                alpha=tuple(contestants[name]),
                structure=Structure().to_fields(),
            )
            for name, task, start in missing
        ]
        with progress.stage("base and experts on the gate split", sum(sizes.values()), unit="rows") as stage:
            stage.advance(sum(sizes.values()) - sum(sizes[part] for part in missing))
            given = results_of(workers.run(".jobs:answer", requests, listen=stage.advance))
            for part, right in zip(missing, given, strict=True):
                journal.keep(*part, right[part[1]])
        moved = results_of(divergences_of(workers, alone, rows, list(alphas.values())))
        kls = {"base": dict.fromkeys(tasks, 0.0), **dict(zip(alphas, moved, strict=True))}
        mixed = replace(alone, rule=place.recipe.search.rule)
        (kls["mixture"],) = results_of(divergences_of(workers, mixed, rows, [alpha]))
    found = {name: right_rows(_whole(journal, name, sizes)) for name in contestants}
    answers = {name: found.get(name, found["base"]) for name in ("base", *alphas)}
    in_order = {task: mixture[task] for task in tasks}  # a journal's own is that of the alphabet
    return {
        "split": "gate",
        "rows": [_table_row(name, right, kls[name]) for name, right in {**answers, "mixture": in_order}.items()],
        "paired": [{"against": name, **paired_margin(mixture, right)} for name, right in answers.items()],
        "gains": [
            {"expert": task, **paired_margin({task: answers[task][task]}, {task: answers["base"][task]})}
            for task in tasks
        ],
    }


def _whole(journal: GateJournal, name: str, sizes: Mapping[tuple[str, str, int], int]) -> dict[str, str]:
    """All marks of one contestant by task, in the order of the rows."""
    marks: dict[str, str] = {}
    for part, size in sizes.items():
        if part[0] == name:
            marks[part[1]] = marks.get(part[1], "") + (journal.part(*part, size) or "")
    return marks


def _table_row(name: str, answers: Answers, kl_to_base: Mapping[str, float]) -> dict[str, Any]:
    kind = name if name in {"base", "mixture"} else "expert"
    accuracy = {task: Accuracy(task, sum(right), len(right)).document() for task, right in answers.items()}
    return {"name": name, "kind": kind, "accuracy": accuracy, "kl_to_base": dict(kl_to_base)}
