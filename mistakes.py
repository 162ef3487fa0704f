"""Describe the mistakes in a document that pydantic refused, in one line and in the words of its file.

mistakes(error, Recipe)      "unknown key experts.num_stpes; did you mean num_steps?"
"""

from __future__ import annotations

import difflib
import reprlib
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MOST_SHOWN = 3
_MAX_PLACE_CHARS, _MAX_SAID_CHARS = 120, 300


def mistakes(
    error: Exception, form: type[BaseModel], *, keys: Sequence[str] | None = None, is_handwritten: bool = True
) -> str:
    """Name at most three mistakes that `form` found; one that only follows from another is left out.

    `keys` are the keys of the whole document if they are not those of `form`. `is_handwritten` is False for JSON from a
    program: pydantic would copy its values, megabytes of them, once for every mistake. An error that is not pydantic's,
    raised while the document was read, keeps its own words.
    """
    if isinstance(error, RecursionError):
        return "nested too deep"
    if not isinstance(error, ValidationError):
        return _one_line(str(error))
    found = error.errors(include_url=False, include_context=False, include_input=is_handwritten)
    within = {mistake["loc"][:depth] for mistake in found for depth in range(len(mistake["loc"]))}
    causes = [mistake for mistake in found if mistake["loc"] not in within]
    more = f" (and {len(causes) - _MOST_SHOWN} more)" if len(causes) > _MOST_SHOWN else ""
    return "; ".join(_mistake(dict(mistake), form, keys) for mistake in causes[:_MOST_SHOWN]) + more


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the known word nearest to `word`, or all of them."""
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(words)}"


def _mistake(mistake: dict[str, Any], form: type[BaseModel], keys: Sequence[str] | None) -> str:
    place, said = mistake["loc"], _one_line(mistake["msg"].removeprefix("Value error, "))
    where = " ".join(".".join(str(part) for part in place)[:_MAX_PLACE_CHARS].split())
    value = f" = {reprlib.repr(mistake['input'])}" if "input" in mistake else ""
    match mistake["type"]:
        case "extra_forbidden":
            known = keys if keys is not None and len(place) == 1 else _keys_of(form, place[:-1])
            return f"unknown key {where}; {nearest(str(place[-1]), known)}"
        case "missing":
            return f"the key {where} is missing"
        case "model_type" | "model_attributes_type" if value:
            return f"{where} is a section: write [{where}] on its own line"
        case "value_error":
            return f"{where}: {said}" if where else said
    said = f"{said[:1].lower()}{said[1:]}"
    return f"{where}{value}: {said}" if where else said


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_SAID_CHARS]


def _keys_of(form: type[BaseModel], section: Sequence[int | str]) -> list[str]:
    """Keys of the section at a place of the document."""
    for part in section:
        inner = _models_of(form.model_fields[part].annotation) if part in form.model_fields else []
        form = inner[0] if inner else form
    return list(form.model_fields)


def _models_of(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - any type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]
