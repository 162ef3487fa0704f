"""How a quantity is written for a person: short, with its unit, and a dash for what was not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import HavocError
from ...errors import printable as printable  # noqa: PLC0414 - one of the ways to write for a person
from ...model.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .record import Record

DASH = "\N{EN DASH}"
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_MANY = 1000


def show(value: float | None, unit: str, *, bare: bool = False) -> str:
    """Write `value`, which is in `unit`, for a table; `bare` leaves the unit out where a neighbour already says it."""
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
    """Write what is proven: both bounds, or one, or a dash."""
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


_UNITS = {
    "prefill_ms": "ms",
    "ttft_ms": "ms",
    "load_s": "s",
    "decode_tok_per_s": "tok/s",
    "peak_rss_bytes": "bytes",
    "peak_vram_bytes": "bytes",
    "energy_j_per_tok": "J/tok",
    "kl_mean": "nats",
}


STATISTICS = {
    "prefill_ms": "median",
    "ttft_ms": "median",
    "load_s": "slowest",
    "decode_tok_per_s": "over all runs",
    "peak_rss_bytes": "highest",
    "peak_vram_bytes": "highest",
    "energy_j_per_tok": "mean",
    "kl_mean": "mean",
    "top1_share": "share of tokens",
}
"""What each figure of `measured` is of its samples; the rest are shares and totals."""


def label(metric: str) -> str:
    """Name a figure of `measured` with its statistic: `prefill_ms, median`."""
    return f"{metric}, {STATISTICS[metric]}" if metric in STATISTICS else metric


def unit_of(metric: str) -> str:
    """Return the unit that a metric of `measured` is in."""
    return _UNITS.get(metric, "share")


def measured(record: Record) -> dict[str, float | None]:
    """Each metric's figure: medians of times, the rate over all runs, worst peaks, shares; None for the unmeasured.

    `STATISTICS` says which of them a figure is; the gate judges prefill by its own percentile.
    """
    processes = record.samples
    return {
        "prefill_ms": _median([ms for process in processes for ms in process.prefill_ms]),
        "ttft_ms": _median([ms for process in processes for ms in process.ttft_ms]),
        "load_s": max((process.load_ns / 1e9 for process in processes), default=None),
        "decode_tok_per_s": decode_rate(record),
        "peak_rss_bytes": record.memory.peak_rss_bytes,
        "peak_vram_bytes": record.memory.peak_vram_bytes,
        "energy_j_per_tok": record.energy.joules / record.energy.num_tokens if record.energy else None,
        **_cost(record),
        **{f"accuracy/{domain}": item.num_right / item.num_rows for domain, item in record.accuracy.items()},
    }


def _cost(record: Record) -> dict[str, float | None]:
    """What the formats cost on a text, in records that say so; over random ids it is no figure of the artifact."""
    cost = record.subject.format_cost
    is_known = cost is not None and cost.text_sha256 is not None
    return {"kl_mean": cost.kl_mean, "top1_share": cost.top1_share} if cost is not None and is_known else {}


def decode_rate(record: Record) -> float | None:
    """Tokens per second over all decode runs, each run's first token excluded: the gate's estimate."""
    runs = [run for process in record.samples for run in process.decode if run.step_ns]
    seconds = sum(sum(run.step_ns) for run in runs) / 1e9
    return sum(len(run.step_ns) for run in runs) / seconds if seconds else None


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def structure_of(fields: Mapping[str, Any] | None) -> Structure | None:
    """Return the structure that a document's fields describe in full; None where they do not."""
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
    """Three significant digits, and every digit before the point."""
    return f"{value:,.0f}" if abs(value) >= _MANY / 10 else f"{value:.3g}"
