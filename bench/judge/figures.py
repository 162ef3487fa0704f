"""Write quantities for people: short, with the unit, and a dash if not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import HavocError
from ...errors import printable as printable  # noqa: PLC0414 - one of the ways to write for a person
from ...model.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Mapping

DASH = "\N{EN DASH}"
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_MANY = 1000


def show(value: float | None, unit: str, *, bare: bool = False) -> str:
    """Write `value`, which is in `unit`, for a table; `bare` leaves out the unit if the text beside it has one."""
    if value is None:
        return DASH
    match unit:
        case "bytes":
            return _scaled(value, _BYTES)
        case "ms":
            return _scaled(value / 1e3, _SECONDS)
        case "s":
            return _scaled(value, _SECONDS)
        case "share":
            return f"{100 * value:.1f}" if bare else f"{100 * value:.1f} %"
        case _:
            return _digits(value) if bare else f"{_digits(value)} {unit}"


def show_interval(low: float | None, high: float | None, unit: str) -> str:
    """Write the proven bounds: both, one, or a dash."""
    if low is None and high is None:
        return DASH
    if low is None:
        return f"≤ {show(high, unit)}"
    if high is None:
        return f"≥ {show(low, unit)}"
    if low == high:
        return show(low, unit)
    return f"{show(low, unit, bare=True)} {DASH} {show(high, unit)}"


def count(number: int, noun: str) -> str:
    """Write a count with its noun: "1 sample", "1,200 samples", "2 processes"."""
    return f"{number:,} {noun if number == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def structure_of(fields: Mapping[str, Any] | None) -> Structure | None:
    """Return the structure that a document's fields describe; None if they are incomplete."""
    if fields is None:
        return None
    try:
        return Structure.from_fields(fields)
    except (HavocError, OverflowError):
        return None


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    scale, name = next(((scale, name) for scale, name in units if abs(value) >= scale), units[-1])
    return f"{_digits(value / scale)} {name}"


def _digits(value: float) -> str:
    """Three significant digits, or all digits before the point if there are more."""
    return f"{value:,.0f}" if abs(value) >= _MANY / 10 else f"{value:.3g}"
