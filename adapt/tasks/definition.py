"""The content of a task file: one validated TOML table; an unknown key is refused with the nearest known key.

    name = "my-task"            # used everywhere: z_vectors_my-task.safetensors, accuracy/my-task
    kind = "choice"             # or "generate", "code"
    metric = "acc"              # the metric of accuracy/my-task

    [data] [data.splits] [prompt] [few_shot] [choice] [generate] [code] [training] [limits]

`docs/tasks.md` explains every key with an example; the fields below are the reference. A value that names a part of a
row is a Jinja expression over its columns (`choices.text`); a text that contains columns is a Jinja template.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ...errors import HavocError
from ...mistakes import mistakes
from .names import CLASSIFIER, NAME, Method
from .template import Expression, Template

MAX_FILE_BYTES = 1_000_000
MAX_DOTS = 32  # in one line; a dotted key is parsed in quadratic time
RESERVED = frozenset({"base", "mixture", "mean", "weight_format", CLASSIFIER})
"""Names with another meaning in score tables and in the search."""

FORMATS = ("parquet", "jsonl", "json", "csv")
_SHARES_OF_ONE_FILE = {"train": {"end": 0.7}, "search": {"start": 0.7, "end": 0.85}, "gate": {"start": 0.85}}
_USUAL_PARTS = {"train": "train", "search": "validation", "gate": "test"}

Kind = Literal["choice", "generate", "code"]
SplitName = Literal["train", "search", "gate"]
ColumnType = Literal["text", "texts", "number", "picture", "any"]
Generator = Literal["math", "code", "reasoning", "vision"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]


def _template(source: str) -> str:
    return _compiles(Template, source)


def _expression(source: str) -> str:
    return _compiles(Expression, source)


def _compiles(kind: type[Template | Expression], source: str) -> str:
    try:
        kind(source)
    except HavocError as error:
        raise ValueError(str(error)) from error
    return source


def _pattern(source: str) -> str:
    try:
        re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{source!r} is not a regular expression ({error})") from error
    return source


TemplateText = Annotated[str, AfterValidator(_template)]
ExpressionText = Annotated[str, AfterValidator(_expression)]
Pattern = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_pattern)]
Text = Annotated[str, Field(min_length=1, max_length=2000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Split(_Part):
    """The rows of one split: those of a part of the data, or a share of it by hash, from `start` to `end`.

    `must` is an expression that must be true for every row of the split; other rows are refused.
    """

    part: Text = "data"
    start: Share = 0.0
    end: Share = 1.0
    must: ExpressionText | None = None

    @model_validator(mode="after")
    def _is_a_share(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"is empty: start {self.start:g} is not below end {self.end:g}")
        return self


class Data(_Part):
    """The source of the rows: a generator, local files, or the hub with --online.

    `path` is a file, or a folder with `PART-*.EXT` or `PART.EXT` (parquet, jsonl, json, csv), in --data DIR or beside
    the task file. `problem` is the question of a row: rows with the same problem are used once, and never in two
    splits. `group` is wider (all questions about one picture) and is never in two splits either. `ids` are columns that
    identify a row without changing it. Without `splits` a single file is split by hash, 70 / 15 / 15, and a folder has
    the parts train, validation (for search) and test (for gate).
    """

    generator: Generator | None = None
    path: Text | None = None
    hub: Text | None = None
    subset: Text | None = None
    public: Text | None = None
    splits: dict[SplitName, Split] = Field(default_factory=dict)
    problem: Annotated[tuple[ExpressionText, ...], Field(min_length=1)]
    group: tuple[ExpressionText, ...] = ()
    ids: tuple[Text, ...] = ()
    columns: dict[str, ColumnType] = Field(default_factory=dict)
    data_sha256: dict[SplitName, Sha256] = Field(default_factory=dict)

    @field_validator("data_sha256", mode="before")
    @classmethod
    def _of_the_gate(cls, value: object) -> object:
        return {"gate": value} if isinstance(value, str) else value

    @field_validator("splits", mode="before")
    @classmethod
    def _named_parts(cls, value: object) -> object:
        """Read `gate = "test"` as `gate = { part = "test" }`."""
        if not isinstance(value, dict):
            return value
        return {name: {"part": part} if isinstance(part, str) else part for name, part in value.items()}

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> Self:
        if self.generator is not None and (self.path or self.hub):
            raise ValueError("has both a generator and files: keep one of them")
        if self.generator is None and not (self.path or self.hub):
            raise ValueError(
                "does not say where the rows come from: give `path` (a file or folder) or `hub` (a data set)"
            )
        if self.subset is not None and self.hub is None:
            raise ValueError("names a subset, but no data set on the `hub`")
        shares = list(self.splits.items())
        for place, (name, split) in enumerate(shares):
            for other_name, other in shares[place + 1 :]:
                if split.part == other.part and split.start < other.end and other.start < split.end:
                    raise ValueError(
                        f"gives {name} and {other_name} the same rows of {split.part!r}: split them by shares"
                    )
        return self


class PromptRule(_Part):
    """The prompt of the model. `image` names the column of a picture, `image_side` its width and height in pixels.

    Pictures that are read are fitted into that square with their proportions. The default is 32, the size of the
    pictures that HAVOC draws.
    """

    template: TemplateText
    image: Text | None = None
    image_side: Annotated[int, Field(ge=1, le=4096)] | None = None

    @model_validator(mode="after")
    def _has_a_picture(self) -> Self:
        if self.image_side is not None and self.image is None:
            raise ValueError("gives the size of a picture but not its column: name prompt.image too")
        return self


class FewShot(_Part):
    """Solved rows before the question: `number` rows, from `split` or written in the file.

    `choose` takes the first rows of the data, or a sample by `seed`. Each row is shown as prompt, answer, `separator`.
    """

    number: Annotated[int, Field(ge=0, le=100)] = 0
    split: Literal["train", "search", "gate"] = "train"
    choose: Literal["first", "sample"] = "first"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    separator: str = "\n\n"
    rows: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _leaks_nothing(self) -> Self:
        if self.split == "gate":
            raise ValueError('split = "gate" shows solved rows of the test (a leak): use "train" or "search"')
        if self.rows and self.number > len(self.rows):
            raise ValueError(f"number = {self.number}, but there are {len(self.rows)} rows")
        return self


class ChoiceRule(_Part):
    """One of the row's choices is right; the model's likelihood of each one decides.

    `choices` gives the texts, `label` the label of the right choice, one of `labels` (without `labels`: its position
    from 0). `delimiter` is put between prompt and choice.
    """

    choices: ExpressionText
    labels: ExpressionText | None = None
    label: ExpressionText
    delimiter: str = " "


class TaskMetric(_Part):
    """How the answer is found in the model's text, and when it is right.

    `extract` is a regular expression; the match `which` counts, and its first group that is not empty. Without a match
    there is no answer, or with `is_whole_without` the whole text is the answer. `compare`:

        text     equal to the gold answer, after `ignore` patterns are removed from both
        number   the same number: 1,000 = 1000 = 1e3 (see numbers.py)
        choice   the right choice is named, by text or label (see choices.py)
        words    the same words as at least `agreeing` gold answers, or as the most frequent one if fewer agree
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
    extract: Pattern | None = None
    which: Literal["first", "last"] = "first"
    is_whole_without: bool = False
    compare: Literal["text", "number", "choice", "words"] = "text"
    ignore: tuple[Pattern, ...] = ()
    ignore_case: bool = False
    agreeing: Annotated[int, Field(ge=1, le=1000)] = 1


class WrittenRule(_Part):
    """The model writes a text: `answer` is a right completion with its steps, after `delimiter`.

    Few-shot rows and next-token training show it. A task with generated rows has its own.
    """

    answer: TemplateText | None = None
    delimiter: str = ""


class GenerateRule(WrittenRule):
    """The model writes an answer.

    `gold` is the expected answer (default: `answer`): a text; for `choice` the right label; for `words` a list of
    texts, of which the most frequent one is `gold` in `answer`.
    """

    gold: ExpressionText | None = None
    choices: ExpressionText | None = None
    labels: ExpressionText | None = None
    metrics: Annotated[tuple[TaskMetric, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [metric.name for metric in self.metrics]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"has two metrics with the name {', '.join(twice)}")
        if any(metric.compare == "choice" for metric in self.metrics) and (self.choices is None or self.labels is None):
            raise ValueError('compares with "choice" but does not say where `choices` and `labels` are')
        return self


class CodeRule(WrittenRule):
    """The model writes a program: right if all `tests` hold; each is one `assert` statement, run in the sandbox.

    The program and the calls of its tests together may use `cpu_seconds` of CPU time and three times that of wall time.
    """

    tests: ExpressionText
    setup: ExpressionText | None = None
    cpu_seconds: Annotated[int, Field(ge=1, le=60)] = 1


class TaskLimits(_Part):
    """Default limits of the task.

    `stop` ends an answer in training, search and scoring; `num_rows` is the number of scored rows; `above` is the share
    of right answers for a target's limit on this task that names none.
    """

    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 128
    stop: tuple[Text, ...] = ()
    num_rows: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    above: Annotated[float, Field(gt=0, lt=1)] | None = None


class Training(_Part):
    """Default training of an expert of this task.

    `method` is one of `adapt/objectives.py`: "next-token" for a task that small bases almost never answer right, so
    that sampled answers would have no signal. `auto` is "expected-reward" for choices and "reinforce" for other tasks.
    """

    method: Method = "auto"


class Definition(_Part):
    """A whole task file."""

    name: str
    kind: Kind
    metric: Text
    description: str = ""
    data: Data
    prompt: PromptRule
    few_shot: FewShot = FewShot()
    choice: ChoiceRule | None = None
    generate: GenerateRule | None = None
    code: CodeRule | None = None
    training: Training = Training()
    limits: TaskLimits = TaskLimits()

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics of this task."""
        if self.generate is not None:
            return tuple(metric.name for metric in self.generate.metrics)
        return ("acc", "acc_norm") if self.kind == "choice" else ("pass",)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not NAME.fullmatch(self.name) or self.name in RESERVED:
            raise ValueError(
                f"name = {self.name!r}: a name has small letters, digits, - and _ (at most 64), and must not be "
                f"{', '.join(sorted(RESERVED))}"
            )
        for kind in get_args(Kind):
            if (getattr(self, kind) is not None) != (kind == self.kind):
                has = "lacks its section" if kind == self.kind else "has a section"
                raise ValueError(f'is of kind = "{self.kind}" and {has} [{kind}]')
        if self.metric not in self.metrics:
            raise ValueError(f"metric = {self.metric!r}: this task has {', '.join(self.metrics)}")
        written = self.generate or self.code
        if written is not None and written.answer is None and self.data.generator is None:
            raise ValueError(f"the key {self.kind}.answer is missing: the template of a right completion")
        if self.prompt.image is not None and self.few_shot.number:
            raise ValueError("few_shot: a prompt can have only one picture, so a task with pictures has no solved rows")
        return self


def read_definition(path: Path) -> Definition:
    """Read a task file; an unreadable file or a mistake in it is a one-line `HavocError`."""
    table = _read_toml(path)
    try:
        return Definition.model_validate_json(
            json.dumps(_with_defaults(table, path))
        )  # strict, but a list may be a tuple
    except (ValueError, TypeError, RecursionError) as error:  # not JSON: a date, a number that is too long
        raise HavocError(f"{path}: {mistakes(error, Definition)}") from error


def _with_defaults(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Name the task after its file; split a single file by hash, and expect the usual parts in a folder."""
    table = {"name": path.stem, **table}
    data = table.get("data")
    if isinstance(data, dict) and not {"splits", "generator"} & set(data):
        is_file = Path(str(data.get("path", ""))).suffix.lstrip(".") in FORMATS
        table["data"] = {**data, "splits": _SHARES_OF_ONE_FILE if is_file else _USUAL_PARTS}
    return table


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise HavocError(f"{path}: not a task file but a folder, pipe or device")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise HavocError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise HavocError(f"{str(path)!r}: not a valid file name ({error})") from error
    if len(data) > MAX_FILE_BYTES:
        raise HavocError(f"{path}: larger than {MAX_FILE_BYTES} bytes; no valid task file is that large")
    for number, line in enumerate(data.split(b"\n"), start=1):
        head = line.partition(b"=")[0]
        if (num_dots := head.count(b".")) > MAX_DOTS and not line.lstrip().startswith(b"#"):
            raise HavocError(
                f"{path}: line {number} has {num_dots} dots in its key: no valid task file is nested that deep"
            )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200] or "nested too deep"
        raise HavocError(f"{path}: not valid TOML ({said})") from error
