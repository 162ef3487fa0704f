"""docs/reference.md: every key of recipes, targets, task files and records, and every exit code, out of the code."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from .adapt.tasks.definition import Definition, read_definition
from .adapt.tasks.names import BUNDLED as TASK_FILES
from .adapt.tasks.names import bundled_tasks
from .bench.judge.gate import EXIT_CODES
from .bench.judge.record import Record
from .bench.judge.targets import BUNDLED, Target, read_targets
from .bench.report.phase6 import Phase6
from .config import Recipe, bundled_recipes
from .errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

_VERDICTS = {
    "pass": "every limit is proven met, on the target device itself",
    "fail": "a limit is proven missed",
    "inconclusive": "a limit is undecided: the answer says how many more samples are needed",
}


_PAGE = """# Reference

Written by `make reference` from the code. A key without a default must be given.

## Exit codes

{exit_codes}

## Recipe

The file of `havoc run`, in TOML; how it is used: [recipes](recipes.md). Bundled: {recipes}.

{recipe}

## Target

An entry of a targets file, in TOML; how it is used: [gate in CI](ci.md). `extends = NAME` takes from another entry what
this one does not say.

{targets}

{target}

## What phase 6 hands over

The file of `havoc run --handoff`, in JSON; how it is used: [recipes](recipes.md#from-phase-6-to-phase-8).

{phase6}

## Task file

In TOML; how it is used: [tasks](tasks.md).

{tasks}

{task}

## Record

What `havoc bench` writes, in JSON, sealed by its own hash: [how a number is measured](measuring.md).

{record}
"""


def markdown() -> str:
    """Return docs/reference.md."""
    parts = {
        "recipe": _tables(Recipe),
        "target": _tables(Target),
        "task": _tables(Definition),
        "record": _tables(Record),
        "phase6": _tables(Phase6),
    }
    parts |= {"exit_codes": _exit_codes(), "targets": _bundled_targets(), "tasks": _bundled_tasks()}
    return _PAGE.format(recipes=_names(bundled_recipes()), **{name: "\n".join(lines) for name, lines in parts.items()})


def _exit_codes() -> Iterator[str]:
    """The verdicts' codes, and those of every error."""
    errors: list[type[HavocError]] = [HavocError, *HavocError.__subclasses__()]
    rows = {code: _VERDICTS[verdict] for verdict, code in EXIT_CODES.items()}
    rows |= {kind.exit_code: _sentence(kind) for kind in errors}
    yield from ("| code | meaning |", "|---|---|")
    yield from (f"| {code} | {meaning} |" for code, meaning in sorted(rows.items()))


def _sentence(kind: type) -> str:
    text = (kind.__doc__ or "").strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _bundled_targets() -> Iterator[str]:
    yield from ("| bundled target | what it is | limits |", "|---|---|---|")
    for name, target in read_targets(BUNDLED).items():
        limits = ", ".join(
            f"`{limit.metric}` {'below' if limit.below is not None else 'above'} "
            f"{limit.above if limit.below is None else limit.below:g} {limit.unit}"
            for limit in target.limits
        )
        yield f"| `{name}` | {target.title} | {limits} |"


def _bundled_tasks() -> Iterator[str]:
    yield from ("| bundled task | what it asks | answered by | figures |", "|---|---|---|---|")
    for name in bundled_tasks():
        task = read_definition(TASK_FILES / f"{name}.toml")
        yield f"| `{name}` | {task.description} | {task.kind} | {_names(task.metrics)} |"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _tables(model: type[BaseModel]) -> Iterator[str]:
    """A table of the model's keys, and one of each part that it is made of, in the order they are met."""
    schema = model.model_json_schema()
    parts = {"": schema, **schema.get("$defs", {})}
    waiting = [""]
    for name in waiting:
        part = parts[name]
        for other in _mentioned(part.get("properties", {})):
            if other not in waiting:
                waiting.append(other)
        if "properties" not in part:
            continue
        if name:
            yield ""
        yield f"### {name or model.__name__}\n"
        yield re.sub(r"\s*\n\s*", " ", part.get("description", "")).strip() + "\n"
        has_meanings = any("description" in value for value in part["properties"].values())
        yield "| key | value | default |" + (" meaning |" if has_meanings else "")
        yield "|---|---|---|" + ("---|" if has_meanings else "")
        for key, value in part["properties"].items():
            default = f"`{json.dumps(value['default'])}`" if "default" in value else ""
            if isinstance(value.get("default"), dict):
                default = "its own"
            row = f"| `{key}` | {_kind(value)} | {default} |"
            yield row + (f" {value.get('description', '').replace('|', chr(92) + '|')} |" if has_meanings else "")


def _mentioned(value: object) -> Iterator[str]:
    """Names of the parts that a piece of a schema refers to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner.rpartition("/")[2]
            else:
                yield from _mentioned(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mentioned(inner)


def _kind(value: dict[str, Any]) -> str:
    """What a key takes, in words: a type with its bounds, a choice, a part of its own."""
    if "anyOf" in value:
        return " or ".join(_kind(each) for each in value["anyOf"])
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return "any value" if name == "JsonValue" else f"[{name}](#{name.lower()})"
    if "enum" in value:
        return " or ".join(f"`{json.dumps(each)}`" for each in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if value.get("type") == "array":
        items = value.get("items") or (value.get("prefixItems") or [{}])[0]
        return f"list of {_kind(items)}"
    if value.get("type") == "object":
        inner = value.get("additionalProperties")
        return f"table of {_kind(inner)}" if isinstance(inner, dict) else "table"
    return f"{value.get('type', 'any')}{_bounds(value)}"


_FAR = 1e9
"""A bound beyond it only keeps a number within its type."""


def _bounds(value: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{word} {value[key]:g}" for key, word in words.items() if abs(value.get(key, _FAR)) < _FAR]
    return f", {', '.join(found)}" if found else ""


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
