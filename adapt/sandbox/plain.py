"""The only values that leave the confined process: plain built-ins with exactly that type, as tagged JSON.

    encode  in the confined process, beside untrusted code: turns a result into JSON, without calling its methods
    decode  in the trusted parent: turns that JSON into fresh built-ins, or refuses it

A result that is not exactly a built-in (a subclass of int, an object with a false `__eq__`) becomes `Opaque`, which
equals no value in a test. So `==` in the parent compares only built-ins and cannot be deceived.

Tags: l list, t tuple, s set, z frozenset, d dict, i big int in hexadecimal, f float that JSON lacks, c complex,
b bytes, a bytearray, r range, o opaque.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

_MAX_DEPTH = 64
_MAX_PARTS = 20_000
_JSON_INT = 1 << 53


@dataclass(frozen=True, slots=True)
class Opaque:
    """Replaces a result that is not plain; `type_name` is only for people."""

    type_name: str


class NotPlainError(ValueError):
    """The text is not in the form that `encode` writes, or it is too large."""


def encode(value: object, *, max_chars: int = 1 << 20) -> str:
    """Write `value` as tagged JSON; a value that is not plain becomes opaque; too deep or too large is an error."""
    text = json.dumps(_encode(value, [_MAX_PARTS], 0), separators=(",", ":"), allow_nan=False)
    if len(text) > max_chars:
        raise NotPlainError(f"the result has {len(text)} characters, at most {max_chars} are allowed")
    return text


def _encode(value: Any, parts_left: list[int], depth: int) -> object:  # noqa: ANN401 - this function finds the type
    parts_left[0] -= 1
    if depth > _MAX_DEPTH or parts_left[0] < 0:
        raise NotPlainError(f"the result is nested deeper than {_MAX_DEPTH} or has more than {_MAX_PARTS} parts")
    kind = type(value)
    if value is None or value is True or value is False or kind is str:
        return value
    if kind is int:
        return value if -_JSON_INT < value < _JSON_INT else ["i", hex(value)]
    if kind is float:
        return value if value - value == 0 else ["f", repr(value)]
    if kind is complex:
        return ["c", _encode(value.real, parts_left, depth + 1), _encode(value.imag, parts_left, depth + 1)]
    if kind is bytes or kind is bytearray:
        return ["b" if kind is bytes else "a", value.hex()]
    if kind is range:
        return ["r", value.start, value.stop, value.step]
    for tag, sequence in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if kind is sequence:
            return [tag, *[_encode(part, parts_left, depth + 1) for part in value]]
    if kind is dict or kind is OrderedDict or kind is defaultdict or kind is Counter:
        pairs = list(dict.items(value))
        return ["d", *[_encode(part, parts_left, depth + 1) for pair in pairs for part in pair]]
    return ["o", str(type.__dict__["__name__"].__get__(kind))[:80]]


def decode(text: str) -> Any:  # noqa: ANN401 - any plain value
    """Build the plain value that `text` describes; `NotPlainError` if it describes none."""
    try:
        return _decode(json.loads(text, parse_constant=_refuse), 0)
    except NotPlainError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise NotPlainError(f"not a plain value: {type(error).__name__}") from error


def _refuse(name: str) -> float:
    raise NotPlainError(f"{name} is not JSON")


def _decode(node: Any, depth: int) -> Any:  # noqa: ANN401 - parsed JSON in, plain value out
    if depth > _MAX_DEPTH:
        raise NotPlainError(f"nested deeper than {_MAX_DEPTH}")
    if type(node) is not list:
        if type(node) is dict:
            raise NotPlainError("an untagged dict")
        return node
    tag, *rest = node
    if tag in _LEAVES:
        return _LEAVES[tag](*rest)
    parts = [_decode(part, depth + 1) for part in rest]
    if tag == "d":
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if tag == "c":
        real, imaginary = parts
        return complex(real, imaginary)
    return _SEQUENCES[tag](parts)


def source(value: object) -> str:
    """Write a decoded value as Python source that needs only `inf` and `nan`; integers of any size, unlike `repr`."""
    match value:
        case bool():
            return repr(value)
        case int():
            return repr(value) if -_JSON_INT < value < _JSON_INT else hex(value)
        case list():
            return f"[{', '.join(map(source, value))}]"
        case tuple():
            return f"({''.join(source(part) + ', ' for part in value).strip()})"
        case set() | frozenset():
            return f"{type(value).__name__}([{', '.join(map(source, value))}])"
        case dict():
            return f"{{{', '.join(f'{source(key)}: {source(part)}' for key, part in value.items())}}}"
        case range():
            return f"range({source(value.start)}, {source(value.stop)}, {source(value.step)})"
        case complex():
            return f"complex({source(value.real)}, {source(value.imag)})"
    return repr(value)


def _float(text: str) -> float:
    if text not in {"nan", "inf", "-inf"}:
        raise NotPlainError("a tagged float that JSON can write without a tag")
    return float(text)


_LEAVES: dict[object, Any] = {
    "i": lambda text: int(text, 16),
    "f": _float,
    "b": bytes.fromhex,
    "a": bytearray.fromhex,
    "r": range,
    "o": lambda name: Opaque(str(name)),
}
_SEQUENCES: dict[object, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
