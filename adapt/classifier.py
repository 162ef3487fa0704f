"""Train the classifier: scales of the singular values that make the first pass name the right expert.

The classifier is an ordinary expert of a task of choices: the rows are the prompts of other tasks, and the right choice
is the name of the task that a prompt comes from. The loss is that of `expected_reward.py` without its KL term and
without a KL limit: both keep answers near the base's answers, and a classifier gives no answers. Gradients come from
train rows only, the best step on search rows is kept, and gate rows are never read (`search_reader`).

`classifier.safetensors` has the format of an expert but another file name than `z_vectors_<task>.safetensors`, so it is
never loaded as an expert that answers. Its settings hold the names that it chooses from, in order, and the instruction
that it was trained with.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

from ..errors import HavocError
from ..progress import SILENT, Progress
from ..track.metrics_file import Record, record_nothing
from .expert import load_expert
from .first_pass import DELIMITER, INSTRUCTION, FirstPass, asked
from .tasks.asked import Task
from .tasks.definition import ChoiceRule, Data, Definition, PromptRule
from .tasks.names import CLASSIFIER
from .tasks.sources import search_reader
from .training import train_on_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.checkpoint import Base
    from .basis import Basis
    from .expert import Expert
    from .objectives import TrainingSettings
    from .tasks.reward import Row
    from .tasks.sources import RowReader

_ANY_KL = 1e6
"""A limit in nats per token that is never reached."""


def classifier_path(directory: Path) -> Path:
    """The path of the classifier in a folder of experts."""
    return directory / f"{CLASSIFIER}.safetensors"


def classifier_task(*, is_chat: bool = False) -> Task:
    """Return the classifier's task: to name the task that a text comes from. `labelled_rows` makes its rows.

    After a chat template an answer begins without a delimiter, both in training and where `FirstPass` scores it.
    """
    definition = Definition(
        name="first-pass",
        kind="choice",
        metric="acc",
        description=INSTRUCTION,
        data=Data(path="prompts of other tasks", problem=("text",)),
        prompt=PromptRule(template="{{ text }}"),
        choice=ChoiceRule(choices="names", label="label", delimiter="" if is_chat else DELIMITER),
    )
    return Task(CLASSIFIER, definition)


def labelled_rows(tasks: Sequence[Task], split: str, num_rows: int, reader: RowReader) -> list[Row]:
    """Return at most `num_rows` rows of the classifier's task: equally many from each task, shuffled by a seed.

    Each is the prompt of a row of `split`, in the form that `FirstPass` uses, and the index of its task in `tasks`. A
    data set with fewer rows gives all it has.
    """
    names = [task.name for task in tasks]
    num_each = max(num_rows // len(tasks), 1)
    found: list[Row] = []
    for label, task in enumerate(tasks):
        texts = [task.prompt(row).text for row in reader.rows(task, split, num_each, may_be_fewer=True)]
        found += [{"text": asked(text, names), "names": names, "label": label} for text in texts]
    random.Random(f"havoc classifier {split} {reader.seed}").shuffle(found)
    return found


def train_classifier(
    base: Base,
    basis: Basis,
    tasks: Sequence[Task],
    *,
    settings: TrainingSettings,
    checkpoint_dir: Path,
    data_dir: Path | None = None,
    online: bool = False,
    progress: Progress = SILENT,
    record: Record = record_nothing,
) -> Expert:
    """Train scales that name the task of a prompt; `base.model` is unchanged afterwards.

    Checkpoints and errors are those of `train_expert`. Fewer than two tasks are a `HavocError`.
    """
    names = FirstPass(tuple(task.name for task in tasks)).names
    reader = search_reader(seed=settings.seed, data_dir=data_dir, online=online)
    expert = train_on_rows(
        base,
        basis,
        classifier_task(is_chat=base.tokenizer.chat is not None),
        labelled_rows(tasks, "train", settings.num_train_rows, reader),
        labelled_rows(tasks, "search", settings.num_validation_rows, reader),
        settings=_free(settings),
        checkpoint_dir=checkpoint_dir,
        progress=progress,
        record=record,
    )
    own: dict[str, Any] = {"names": list(names), "instruction": INSTRUCTION}
    return dataclasses.replace(expert, settings={**expert.settings, **own})


def _free(settings: TrainingSettings) -> TrainingSettings:
    """The settings without the KL term and the KL limit, which keep a model near its base."""
    return dataclasses.replace(
        settings, max_kl=_ANY_KL, optimizer=dataclasses.replace(settings.optimizer, kl_coefficient=0.0)
    )


def load_classifier(directory: Path, *, basis: Basis, is_chat: bool = False) -> tuple[Expert, FirstPass]:
    """Read the classifier of a folder of experts, and the names that it chooses from.

    `is_chat` says that prompts go through a chat template now. Raises `HavocError` for a missing file, for another base
    or basis, for an ordinary expert, for a classifier trained with another instruction than this version uses, and for
    one whose training differs from `is_chat`.
    """
    path = classifier_path(directory)
    if not path.exists():
        raise HavocError(f"{path}: not found; train one with havoc train BASE --classifier TASKS --out {directory}")
    expert = load_expert(path, basis=basis)
    names = expert.settings.get("names")
    if expert.domain != CLASSIFIER or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HavocError(f"{path}: is an expert of {expert.domain!r}, not a classifier; give the file its own name")
    if expert.settings.get("instruction") != INSTRUCTION:
        raise HavocError(f"{path}: was trained with another instruction than this version uses; train it again")
    if bool(expert.settings.get("chat")) != is_chat:
        trained, now = ("with", "without") if expert.settings.get("chat") else ("without", "with")
        raise HavocError(f"{path}: was trained {trained} the chat template, prompts are {now} it now: see --no-chat")
    return expert, FirstPass(tuple(names))
