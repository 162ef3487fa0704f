"""Train the classifier: scales of the singular values that make the first pass name the right expert.

It is an expert like any other, of a task of choices whose rows are the prompts of other tasks and whose right choice is
the name of the task that a prompt comes from. What a step descends is `expected_reward.py`, without its KL term and
without a limit of KL: those keep answers near the base's, and a classifier never answers. Gradients come from train
rows alone, the step that is kept is the best on search rows, and gate rows stay closed to it (`search_reader`).

`classifier.safetensors` has an expert's format and a name of its own beside `z_vectors_<task>.safetensors`, so nothing
takes it for an expert that answers. Its settings say the names it chooses from, in their order, and the instruction it
was trained behind.
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
"""A limit in nats a token that nothing reaches."""


def classifier_path(directory: Path) -> Path:
    """Where the classifier lies in a folder of experts."""
    return directory / f"{CLASSIFIER}.safetensors"


def classifier_task(*, is_chat: bool = False) -> Task:
    """Return the task of naming the task a text comes from; `labelled_rows` makes its rows.

    Behind a chat template an answer begins at once, in training as where `FirstPass` scores it: without a delimiter.
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
    """Return at most `num_rows` rows of the classifier's task: as many of each task, in an order that a seed shuffles.

    Each is the prompt of a row of `split`, asked as `FirstPass` asks, and the place of the row's task among `tasks`. A
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
    """Train the scales that tell prompts of `tasks` apart; `base.model` is given back unchanged.

    What is kept and raised is `train_expert`'s. Fewer than two tasks leave nothing to choose, a `HavocError`.
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
    """The settings without a tie to the base."""
    return dataclasses.replace(
        settings, max_kl=_ANY_KL, optimizer=dataclasses.replace(settings.optimizer, kl_coefficient=0.0)
    )


def load_classifier(directory: Path, *, basis: Basis, is_chat: bool = False) -> tuple[Expert, FirstPass]:
    """Read the classifier of a folder of experts, and the names it chooses from.

    `is_chat` says that prompts go through a chat template now. Raises `HavocError` for a file that is missing or
    belongs to another base or basis, for an expert that answers, and for one trained behind an instruction that this
    version does not ask, or with the template where it is left out now, or the other way round.
    """
    path = classifier_path(directory)
    if not path.exists():
        raise HavocError(f"{path}: no classifier; train one: havoc train BASE --classifier TASKS --out {directory}")
    expert = load_expert(path, basis=basis)
    names = expert.settings.get("names")
    if expert.domain != CLASSIFIER or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HavocError(f"{path}: is an expert of {expert.domain!r} and no classifier; give it its own name back")
    if expert.settings.get("instruction") != INSTRUCTION:
        raise HavocError(f"{path}: was trained behind another instruction than this version asks; train it again")
    if bool(expert.settings.get("chat")) != is_chat:
        trained, now = ("with", "without") if expert.settings.get("chat") else ("without", "with")
        raise HavocError(f"{path}: was trained {trained} the chat template, and prompts go {now} it now: see --no-chat")
    return expert, FirstPass(tuple(names))
