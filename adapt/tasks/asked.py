"""How a task asks and judges: its prompt for a row, its right answer, and the judgement of any other answer.

`definition.py` defines task files, `task.py` loads one, `sources.py` reads rows. The four domains of seed 003 generate
their rows, with the columns of the public data set that each replaces. The bundled base model was pretrained on their
corpus: like real web text it is a mixture of sources, some with worked answers and some without (see each domain's
module).
"""

from __future__ import annotations

import functools
import importlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import HavocError
from ...model.stopping import cut
from ...storage import sha256_json
from . import answers, assertions
from .numbers import read_number
from .reward import RIGHT, Prompt, Reward, Row, wrong
from .template import Expression, Template
from .vision import SIDE

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import ModuleType

    from .definition import Definition, Kind, TaskMetric, WrittenRule

Part = TypeVar("Part")


@dataclass(frozen=True)
class Task:
    """One task: its definition, the name it was loaded by, and the solved rows at the beginning of its prompts.

    `folder` contains the task file, for data in the same folder. `examples` are the few-shot rows, if possible one more
    than shown, because a prompt never shows the answer of its own row.
    """

    name: str
    definition: Definition
    folder: Path | None = None
    examples: tuple[Row, ...] = ()

    @property
    def kind(self) -> Kind:
        """The kind of answer: `choice` by likelihood, `generate` as text, `code` as a program."""
        return self.definition.kind

    @property
    def metric(self) -> str:
        """What `accuracy/<name>` means."""
        return self.definition.metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics of the task."""
        return self.definition.metrics

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which an answer ends."""
        return self.definition.limits.stop

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        return self.definition.limits.max_new_tokens

    @property
    def num_rows(self) -> int:
        """The number of rows that are scored by default."""
        return self.definition.limits.num_rows

    @property
    def needs_pictures(self) -> bool:
        """Whether a prompt shows a picture, which a text-only model cannot read."""
        return self.definition.prompt.image is not None

    @property
    def image_side(self) -> int:
        """Width and height in pixels of the square into which a row's picture is fitted."""
        return self.definition.prompt.image_side or SIDE

    @property
    def num_few_shot(self) -> int:
        """Number of solved rows before every question."""
        return self.definition.few_shot.number

    @property
    def generator(self) -> ModuleType | None:
        """The module that generates this task's rows; None if they are read."""
        name = self.definition.data.generator
        return importlib.import_module(f".{name}", __package__) if name else None

    @property
    def dataset(self) -> str:
        """Where the rows come from, for a record or a card."""
        data = self.definition.data
        if data.generator:
            return f"built-in {data.generator}"
        return f"{data.hub}/{data.subset}" if data.hub and data.subset else str(data.hub or data.path)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the file's content, without comments, order, pinned data and the name."""
        said = self.definition.model_dump(mode="json", exclude={"name": True, "data": {"data_sha256"}})
        if said["prompt"]["image_side"] is None:  # a key that the file leaves out is not in its hash
            del said["prompt"]["image_side"]
        return sha256_json(said)

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row must have, in the order of first use."""
        definition, found = self.definition, [*self._template.columns, *self._answer_columns]
        rules = (definition.choice, definition.generate, definition.code)
        expressions = [*definition.data.problem, *self.group_sources]
        expressions += [
            source
            for rule in rules
            if rule is not None
            for key in ("choices", "labels", "label", "gold", "tests", "setup")
            if (source := getattr(rule, key, None)) is not None
        ]
        expressions += [split.must for split in definition.data.splits.values() if split.must is not None]
        found += [column for source in expressions for column in sorted(Expression(source).columns)]
        found += [path.partition(".")[0] for path in definition.data.columns]
        return tuple(dict.fromkeys([*found, *([definition.prompt.image] if definition.prompt.image else [])]))

    @property
    def group_sources(self) -> tuple[str, ...]:
        """Expressions for the part of a row that may be in only one split."""
        return self.definition.data.group or self.definition.data.problem

    @functools.cached_property
    def _template(self) -> Template:
        return Template(self.definition.prompt.template)

    @functools.cached_property
    def _answer(self) -> Template | None:
        rule = self.definition.generate or self.definition.code
        return None if rule is None or rule.answer is None else Template(rule.answer)

    @property
    def _answer_columns(self) -> list[str]:
        return [] if self._answer is None else sorted(self._answer.columns - ({"gold"} if self._has_words else set()))

    @property
    def _has_words(self) -> bool:
        rule = self.definition.generate
        return rule is not None and any(metric.compare == "words" for metric in rule.metrics)

    def _value(self, source: str | None, row: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON values
        return None if source is None else _expression(source).value(row)

    def prompt(self, row: Row) -> Prompt:
        """Return the prompt for `row`, with the solved rows before it."""
        image = self.definition.prompt.image
        return Prompt(self._shown(row), None if image is None else _png(row[image]))

    def _shown(self, row: Row) -> str:
        rule, question = self.definition.few_shot, self._template.render(row)
        if not rule.number:
            return question
        others = [example for example in self.examples if example != row][: rule.number]
        if len(others) < rule.number:
            raise HavocError(
                f"{self.name}: a prompt needs {rule.number} solved rows, but there are {len(others)}: "
                "load the task with the data of these rows"
            )
        solved = [self._template.render(other) + self.reference(other) + rule.separator for other in others]
        return "".join([*solved, question])

    def choices(self, row: Row) -> tuple[str, ...]:
        """Return the continuations to choose from, each with the delimiter before it (kind `choice`)."""
        delimiter = _required(self.definition.choice).delimiter
        return tuple(delimiter + text for text in self._texts(row))

    def right_choice(self, row: Row) -> int:
        """Return the position of the right choice, from 0 (kind `choice`)."""
        return self._place(self._value(_required(self.definition.choice).label, row), row)

    def _texts(self, row: Row) -> list[str]:
        rule = self.definition.choice or self.definition.generate
        texts = self._value(getattr(rule, "choices", None), row)
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):  # noqa: PLR2004
            raise HavocError(f"the choices are {_short(texts)}, expected a list of at least two texts")
        return texts

    def _labels(self, row: Row) -> list[str]:
        """Labels of the choices; A, B, C ... if the task names none (an answer in words may use them)."""
        rule, texts = self.definition.choice or self.definition.generate, self._texts(row)
        labels = self._value(getattr(rule, "labels", None), row)
        if labels is None:
            return [chr(ord("A") + place) for place in range(len(texts))]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise HavocError(f"the labels are {_short(labels)}, expected a list of texts")
        if len(labels) != len(texts):
            raise HavocError(f"there are {len(texts)} choices but {len(labels)} labels")
        return labels

    def _place(self, label: object, row: Row) -> int:
        rule, num = self.definition.choice or self.definition.generate, len(self._texts(row))
        if getattr(rule, "labels", None) is None:
            if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < num:
                return label
            raise HavocError(f"the label {_short(label)} is not a position from 0 to {num - 1}")
        labels = self._labels(row)
        if label not in labels:
            raise HavocError(f"the label {_short(label)} is not among {', '.join(labels)}")
        return labels.index(str(label))

    def reference(self, row: Row) -> str:
        """Return a right completion with its steps, as it follows the prompt."""
        if self.kind == "choice":
            return self.choices(row)[self.right_choice(row)]
        if self.generator is not None:
            return str(self.generator.reference(row))
        written: WrittenRule | None = self.definition.generate or self.definition.code
        rule = _required(written)
        gold = {"gold": answers.most_agreed(self._golds(row))} if self._has_words else {}
        return rule.delimiter + _required(self._answer).render({**row, **gold})

    def corpus(self, row: Row, rng: random.Random) -> str:
        """Return a completion in the form of a pretraining source, right or wrong (generated tasks)."""
        return str(_required(self.generator).corpus(row, rng))

    def make_row(self, rng: random.Random, index: int) -> Row:
        """Generate a row (generated tasks)."""
        row: Row = _required(self.generator).make_row(rng, index)
        return row

    def judge(self, pairs: Sequence[tuple[Row, str]]) -> list[Reward]:
        """Judge completions by the task's metric; in a `choice` task by the choice named in the text."""
        if self.kind == "choice":
            return [self._judge_choice(row, text) for row, text in pairs]
        return [rewards[self.metric] for rewards in self.judge_all(pairs)]

    def judge_all(self, pairs: Sequence[tuple[Row, str]]) -> list[dict[str, Reward]]:
        """Judge completions by every metric of a task of kind `generate` or `code`."""
        pairs = [(row, cut(text, self.stop)) for row, text in pairs]
        if self.definition.code is not None:
            return [{"pass": reward} for reward in self._run(pairs)]
        metrics = _required(self.definition.generate).metrics
        return [{metric.name: self._judge_one(metric, row, text) for metric in metrics} for row, text in pairs]

    def _judge_choice(self, row: Row, text: str) -> Reward:
        texts, labels = self._texts(row), self._labels(row)
        said = cut(text.lstrip(), self.stop)
        return _reward(answers.why_choice_is_wrong(said, self.right_choice(row), labels, texts, needs_cue=False))

    def _judge_one(self, metric: TaskMetric, row: Row, text: str) -> Reward:
        if metric.compare == "choice":
            place = self._place(self._value(_required(self.definition.generate).gold, row), row)
            said = text if metric.extract is None else answers.found_answer(metric, text) or ""
            return _reward(answers.why_choice_is_wrong(said, place, self._labels(row), self._texts(row)))
        if metric.compare == "words":
            return _reward(answers.why_words_are_wrong(metric, text, self._golds(row)))
        if metric.compare == "number":
            return _reward(answers.why_number_is_wrong(metric, text, self._gold_number(metric, row)))
        return _reward(answers.why_text_is_wrong(metric, text, self._gold(row), self.reference(row)))

    def _gold(self, row: Row) -> str:
        rule = _required(self.definition.generate)
        gold = self._value(rule.gold, row)
        return self.reference(row) if gold is None else str(gold)

    def _gold_number(self, metric: TaskMetric, row: Row) -> str:
        rule = _required(self.definition.generate)
        if rule.gold is not None:
            return self._gold(row)
        return answers.found_answer(metric, self.reference(row)) or ""

    def _golds(self, row: Row) -> list[str]:
        rule = _required(self.definition.generate)
        golds = self._value(rule.gold, row)
        golds = [golds] if isinstance(golds, str) else golds
        if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) for gold in golds):
            raise HavocError(f"the gold answers are {_short(golds)}, expected a list of texts")
        return golds

    def _run(self, pairs: Sequence[tuple[Row, str]]) -> list[Reward]:
        seconds = _required(self.definition.code).cpu_seconds
        return assertions.judge(
            [
                assertions.Program(self._setup(row), answers.program(text), self._tests(row), seconds)
                for row, text in pairs
            ]
        )

    def _tests(self, row: Row) -> tuple[str, ...]:
        tests = self._value(_required(self.definition.code).tests, row)
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) and test for test in tests):
            raise HavocError(f"the tests are {_short(tests)}, expected a list of assert statements")
        return tuple(tests)

    def _setup(self, row: Row) -> str:
        setup = self._value(_required(self.definition.code).setup, row)
        if setup is not None and not isinstance(setup, str):
            raise HavocError(f"the set-up code is {_short(setup)}, expected text")
        return setup or ""

    def check(self, row: Row) -> None:
        """Refuse a row that cannot be asked or judged, in one line that says why."""
        self._check_types(row)
        self._template.render(row)
        reference = self.reference(row)
        if self.definition.code is not None:
            self._tests(row)
            self._setup(row)
        elif self.definition.generate is not None:
            self._check_gold(row, reference)
        else:
            self._labels(row)

    def _check_types(self, row: Row) -> None:
        declared = self.definition.data.columns
        for path, kind in declared.items():
            value: Any = row
            for part in path.split("."):
                if not isinstance(value, dict) or part not in value:
                    raise HavocError(f"{path} is missing: {path.partition('.')[0]} is {_short(row)}")
                value = value[part]
            if not _IS_OF_TYPE[kind](value):
                raise HavocError(f"{path} is {_short(value)}, expected {_TYPE_NAMES[kind]}")
        may_be_null = self._null_columns() | {path.partition(".")[0] for path in declared}
        for column in self.columns:
            if row.get(column) is None and column not in may_be_null:
                raise HavocError(f"{column} is null")

    def _null_columns(self) -> frozenset[str]:
        setup = self.definition.code.setup if self.definition.code is not None else None
        return frozenset() if setup is None else _expression(setup).columns

    def _check_gold(self, row: Row, reference: str) -> None:
        for metric in _required(self.definition.generate).metrics:
            if metric.compare == "number" and read_number(self._gold_number(metric, row)) is None:
                raise HavocError(f"the gold answer {_short(self._gold(row)[-40:])} is not a number HAVOC can read")
            reward = self._judge_one(metric, row, cut(reference, self.stop))
            if reward.outcome != "right":
                raise HavocError(f"the row's own answer is wrong by the metric {metric.name} ({reward.reason})")

    def problem(self, row: Row) -> list[Any]:
        """Return the row's question without its answer: rows with the same question are one problem."""
        return [self._value(source, row) for source in self.definition.data.problem]

    def group(self, row: Row) -> list[Any]:
        """Return the part that may be in only one split, such as the picture of several questions."""
        return [self._value(source, row) for source in self.group_sources]

    def must(self, split: str, row: Row) -> str | None:
        """Return the condition of the split if `row` does not meet it, else None."""
        condition = self.definition.data.splits[split].must  # type: ignore[index] # checked by the caller
        return condition if condition is not None and not self._value(condition, row) else None


@functools.cache
def _expression(source: str) -> Expression:
    return Expression(source)


def _required(part: Part | None) -> Part:
    """Return a section that every task of this kind has."""
    if part is None:
        raise TypeError("a task of another kind")
    return part


def _reward(reason: str) -> Reward:
    return wrong(reason) if reason else RIGHT


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."  # noqa: PLR2004 - a line of an error


def _png(image: Any) -> bytes:  # noqa: ANN401 - PNG bytes, or a PIL image
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


_IS_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "texts": _is_texts,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "picture": lambda value: value is not None,
    "any": lambda _: True,
}
_TYPE_NAMES = {
    "text": "text",
    "texts": "a list of texts without null",
    "number": "a number",
    "picture": "a picture",
    "any": "anything",
}
