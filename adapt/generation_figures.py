"""The metrics of a search after each generation, with the names of seed 003: `adas/*`."""

from __future__ import annotations

from collections import Counter
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .candidate import Evaluation, Origin, SearchSettings

_BYTES_PER_GB = 1e9


def generation_figures(
    evaluations: Sequence[Evaluation],
    origins: Sequence[Origin],
    settings: SearchSettings,
    *,
    front_size: int,
    num_feasible: int,
) -> dict[str, float | None]:
    """Return the metrics of the last generation of `origins`, by name.

    "best" and counts are over all candidates so far, means and spreads only over the generation; None if every
    candidate failed.
    """
    number = max(origin.generation for origin in origins)
    pairs = list(zip(evaluations, origins, strict=True))
    newest = [one for one, origin in pairs if origin.generation == number]
    measured = [one for one in evaluations if not one.reason]
    answered = [one for one in newest if not one.reason]
    structures = Counter(str(one.candidate.structure) for one in newest)
    figures: dict[str, float | None] = {
        "adas/generation": number,
        "adas/pareto_front_size": front_size,
        "adas/evaluated": len(evaluations),
        "adas/failed": len(evaluations) - len(measured),
        "adas/feasible": num_feasible,
        "adas/repaired": sum(origin.is_repaired for origin in origins if origin.generation == number),
        **_best(measured),
        **{
            f"adas/structures/{one.candidate.structure}": structures[str(one.candidate.structure)]
            for one in evaluations
        },
    }
    for place, domain in enumerate(settings.domains):
        alphas = [one.candidate.alpha[place] for one in newest]
        kls = [one.kl_to_base[domain] for one in answered if domain in one.kl_to_base]
        figures |= {
            f"adas/accuracy/{domain}": _mean([one.accuracy[domain] for one in answered]),
            f"adas/best_accuracy/{domain}": max((one.accuracy[domain] for one in measured), default=None),
            f"adas/kl/{domain}": _mean(kls),
            f"adas/alpha_mean/{domain}": fmean(alphas),
            f"adas/alpha_std/{domain}": pstdev(alphas),
        }
    return figures


def _best(measured: Sequence[Evaluation]) -> Mapping[str, float | None]:
    memory = min((one.cost["peak_bytes"] for one in measured), default=None)
    return {
        "adas/best_latency_ms": min((one.cost["prefill_ms"] for one in measured), default=None),
        "adas/best_accuracy": max((one.mean_accuracy for one in measured), default=None),
        "adas/best_memory_gb": None if memory is None else memory / _BYTES_PER_GB,
        "adas/best_throughput_tps": max((one.cost["decode_tok_per_s"] for one in measured), default=None),
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
