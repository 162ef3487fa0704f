"""Messages between a process and its child: frozen dataclasses, written as JSON and read as the same type.

    PLAY = ChildJob("havoc_core.some.module", "play", asked=Game, told=Move, answer=Result)

`export/runtime/child.py` sends the request of a job and reads the answers; `export/runtime/serving.py` is the child's
side. A measured child should import little, so nothing here needs pydantic; a field may be a pydantic model, which then
checks itself.
"""

from __future__ import annotations

import base64
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Message = TypeVar("Message")
Asked = TypeVar("Asked")
Told = TypeVar("Told")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildJob(Generic[Asked, Told, Answer]):
    """One job of a child: the module that is its main program, and the types of the messages.

    `asked` is the request, `told` the child's messages during the work, `answer` its result.
    """

    module: str
    name: str
    asked: type[Asked]
    told: type[Told]
    answer: type[Answer]


def plain(message: object) -> Any:  # noqa: ANN401 - JSON
    """Return the JSON values of a message; `read` makes the message of them again."""
    if is_dataclass(message):
        return {field.name: plain(getattr(message, field.name)) for field in fields(message)}
    if hasattr(message, "model_dump"):
        return message.model_dump(mode="json")
    if isinstance(message, Mapping):
        return {name: plain(value) for name, value in message.items()}
    if isinstance(message, list | tuple):
        return [plain(value) for value in message]
    if isinstance(message, bytes):
        return base64.b64encode(message).decode()
    return str(message) if isinstance(message, Path) else message


def read(kind: type[Message], found: object, name: str = "message") -> Message:
    """Read JSON values as a message of this kind.

    A field that is missing, unknown or of another type is a `TypeError` that names it.
    """
    return cast("Message", _read(kind, found, name))


def _read(kind: Any, found: Any, name: str) -> Any:  # noqa: ANN401 - an annotation, and JSON
    if kind is Any:
        return found
    if hasattr(kind, "model_validate"):
        return kind.model_validate(found, strict=False)
    if get_origin(kind) in {Union, types.UnionType}:
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return None if found is None else _read(inner, found, name)
    if kind is Path and isinstance(found, str):
        return Path(found)
    if kind is bytes and isinstance(found, str):
        return base64.b64decode(found)
    if kind is float and type(found) is int:
        return float(found)
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal and found in parts:
        return found
    if is_dataclass(kind) and isinstance(found, dict):
        return _read_fields(kind, found, name)
    if origin is tuple and isinstance(found, list):
        return tuple(_read(parts[0], value, f"{name}[{place}]") for place, value in enumerate(found))
    if origin is dict and isinstance(found, dict):
        return {key: _read(parts[1], value, f"{name}.{key}") for key, value in found.items()}
    if type(found) is not kind:
        raise TypeError(f"{name} is {found!r:.60}, expected {kind.__name__ if isinstance(kind, type) else kind}")
    return found


def _read_fields(kind: Any, found: dict[str, Any], name: str) -> Any:  # noqa: ANN401 - see `_read`
    hints = get_type_hints(kind)
    known: Sequence[str] = [field.name for field in fields(kind)]
    if odd := sorted(found.keys() ^ set(known)):
        raise TypeError(f"{name} is not a {kind.__name__}: {', '.join(odd)} is missing or unknown")
    return kind(**{field: _read(hints[field], found[field], f"{name}.{field}") for field in known})
