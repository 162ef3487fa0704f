"""The metrics of a finished stage: of the measured processes, the score table, the hand-off and the mixture.

Everything is read from the documents in the folder, as plain JSON.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from ..bounds import quantile_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_BYTES_PER_GB = 1e9


def process_points(record: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Each measured process of `record.json`: its number and its metrics; None for unknown values."""
    for sample in record["samples"]:
        prefill, ttft = (sorted(ns / 1e6 for ns in sample[calls]["duration_ns"]) for calls in ("prefill", "ttft"))
        rates = [1e9 * len(run["step_ns"]) / sum(run["step_ns"]) for run in sample["decode"] if run["step_ns"]]
        yield (
            sample["process"],
            {
                "bench/load_s": sample["load_ns"] / 1e9,
                "bench/cold_ms": sample["cold_ns"] / 1e6,
                "bench/prefill_p50_ms": median(prefill) if prefill else None,
                "bench/prefill_p90_ms": quantile_of(prefill, 0.9) if prefill else None,
                "bench/ttft_p50_ms": median(ttft) if ttft else None,
                "bench/decode_p50_tok_per_s": median(rates) if rates else None,
                "bench/busy_s": sample["busy_ns"] / 1e9 or None,
                **{f"bench/{name}": sample[name] for name in _COUNTED},
                **_telemetry([point for point in record["telemetry"] if point["process"] == sample["process"]]),
            },
        )
    for kind in ("rss", "vram"):
        for series in record["memory"][kind]:
            yield series["process"], {f"bench/peak_{kind}_bytes": series["peak_bytes"]}


_COUNTED = ("foreign_cpu_share", "involuntary_switches", "major_page_faults")


def _telemetry(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    def read(name: str) -> list[float]:
        return [point[name] for point in points if point[name] is not None]

    means = {f"bench/{name}": fmean(read(name)) if read(name) else None for name in _AVERAGED}
    return {**means, "bench/temperature_c": max(read("temperature_c"), default=None)}


_AVERAGED = ("cpu_clock_mhz", "sm_clock_mhz", "power_w")


def mixture_values(domains: Sequence[str], alpha: Sequence[float]) -> dict[str, float | None]:
    """`mixture/*`: the weight of each expert."""
    return {f"mixture/{domain}": weight for domain, weight in zip(domains, alpha, strict=True)}


def final_values(
    handoff: Mapping[str, Any],
    scores: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    exit_codes: Mapping[str, int],
    is_disturbed: bool,
) -> dict[str, float | None]:
    """`final/*`, from `handoff.json`, `scores.json` and `record.json`; `exit_codes` by the names of the targets."""
    peak_bytes = max((series["peak_bytes"] for series in record["memory"]["rss"]), default=None)
    values: dict[str, float | None] = {f"final/{name}": value for name, value in handoff["metrics"].items()}
    values |= {"final/peak_rss_gb": None if peak_bytes is None else peak_bytes / _BYTES_PER_GB}
    for row in scores["rows"]:
        for domain, count in row["accuracy"].items():
            place = f"{row['name']}/{domain}"
            values |= {
                f"final/accuracy/{place}": count["num_right"] / count["num_rows"],
                f"final/accuracy_low/{place}": count["low"],
                f"final/accuracy_high/{place}": count["high"],
                f"final/kl_to_base/{place}": row["kl_to_base"][domain],
            }
    values |= {f"final/gain/{gain['expert']}": gain["margin"] for gain in scores["gains"]}
    values |= {f"final/margin/{pair['against']}": pair["margin"] for pair in scores["paired"]}
    values |= {f"final/exit_code/{target.replace('/', '_')}": code for target, code in exit_codes.items()}
    return {**values, "final/disturbed": float(is_disturbed)}


def candidate_table(
    front: Mapping[str, Any], domains: Sequence[str], *, only_front: bool
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the candidates in `front.json`: all measured ones, or those on the front."""
    on_front, chosen = set(front["front"]), front["chosen"]
    columns = ["key", "generation", "origin", "structure", *(f"alpha/{domain}" for domain in domains)]
    columns += ["prefill_ms", "peak_bytes", "decode_tok_per_s", *(f"accuracy/{domain}" for domain in domains)]
    columns += ["is_feasible", "is_on_front", "is_chosen"]
    rows = [
        [
            one["key"],
            one["origin"]["generation"],
            one["origin"]["kind"],
            one["structure"]["weight_format"],
            *one["alpha"],
            *(one["cost"][name] for name in ("prefill_ms", "peak_bytes", "decode_tok_per_s")),
            *(one["search_accuracy"][domain] for domain in domains),
            one["is_feasible"],
            one["key"] in on_front,
            one["key"] == chosen,
        ]
        for one in front["candidates"]
        if not only_front or one["key"] in on_front
    ]
    return columns, rows
