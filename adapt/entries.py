"""The valid lines of a search's journal, checked when read: a checksum only proves that a line is undamaged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

_KINDS = ("cost", "divergence", "evaluation")


def known_entries(
    entries: Sequence[Mapping[str, Any]], path: Path, *, objectives: Collection[str], domains: Collection[str]
) -> dict[str, Mapping[str, Any]]:
    """The entries after the first one by their keys.

    An entry that a search with these cost objectives and domains cannot write is a `HavocError` with its line.
    """
    for number, entry in enumerate(entries[1:], start=2):
        problem = _problem(entry, objectives, domains)
        if problem:
            raise HavocError(
                f"{path}: line {number} is not an evaluation of a search: {problem}; restore it or choose another --out"
            )
    return {entry["key"]: entry for entry in entries[1:]}


def _problem(entry: Mapping[str, Any], objectives: Collection[str], domains: Collection[str]) -> str:
    if not isinstance(entry.get("key"), str):
        return "it has no key"
    if "reason" in entry:
        is_reason = isinstance(entry["reason"], str) and bool(entry["reason"])
        if not is_reason:
            return "its reason is not a text"
        return "" if entry.get("kind") in _KINDS else f"its kind must be one of {', '.join(_KINDS)}"
    if entry.get("kind") == "cost":
        cost = entry.get("cost")
        if not isinstance(cost, dict) or not all(_is_positive(cost.get(metric)) for metric in objectives):
            return f"its cost is not a number above 0 for each of {', '.join(objectives)}"
        if not all(map(_is_finite, cost.values())):
            return "its cost has a value that is not a number"
        return "" if isinstance(entry.get("disturbance", ""), str) else "its disturbance is not a text"
    if entry.get("kind") == "divergence":
        nats = entry.get("kl_to_base")
        if not isinstance(nats, dict) or set(nats) != set(domains) or not all(map(_is_finite, nats.values())):
            return f"its kl_to_base is not a number for each of {', '.join(domains)}"
        return ""
    if entry.get("kind") != "evaluation":
        return f"its kind must be one of {', '.join(_KINDS)}"
    right = entry.get("right")
    if not isinstance(right, dict) or set(right) != set(domains):
        return f"it has no answers for exactly {', '.join(domains)}"
    if not all(isinstance(marks, str) and marks and set(marks) <= {"0", "1"} for marks in right.values()):
        return "its answers are not written as 0 and 1"
    return ""


def _is_positive(value: object) -> bool:
    return _is_finite(value) and value > 0  # type: ignore[operator]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
