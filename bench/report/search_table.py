"""The candidates of a search as rows of a page: origin, weights and structure, scores.

Measured candidates are numbered from 1 in the order of evaluation; parents are given by these numbers. Of a long search
only the candidates are shown that led to the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..judge.figures import DASH, count, show

if TYPE_CHECKING:
    from .search_files import Front, FrontCandidate, FrontOrigin

MOST_ROWS = 200


def candidate_table(front: Front | None) -> dict[str, Any] | None:
    """Domains, rows and a note for a page; None without candidates, or if an older version kept no origins."""
    if front is None or not any(candidate.origin for candidate in front.candidates):
        return None
    domains = list(front.candidates[0].search_accuracy)
    numbers = {candidate.key: number for number, candidate in enumerate(front.candidates, start=1)}
    shown = [candidate for candidate in front.candidates if _is_telling(candidate, front)]
    if len(front.candidates) <= MOST_ROWS:
        shown = list(front.candidates)
    left_out = len(front.candidates) - len(shown)
    return {
        "domains": domains,
        "rows": [_row(candidate, front, numbers) for candidate in shown[:MOST_ROWS]],
        "note": f"{count(left_out, 'candidate')} that led to no result are only in front.json" if left_out else "",
    }


def _is_telling(candidate: FrontCandidate, front: Front) -> bool:
    return candidate.key in front.front or candidate.key == front.chosen or candidate.rescored_accuracy is not None


def _row(candidate: FrontCandidate, front: Front, numbers: dict[str, int]) -> dict[str, Any]:
    kl_to_base = candidate.kl_to_base
    return {
        "number": numbers[candidate.key],
        "origin": DASH if candidate.origin is None else _origin(candidate.origin, numbers),
        "alpha": [f"{weight:g}" for weight in candidate.alpha],
        "structure": candidate.structure.name,
        "screened": show(_mean(candidate.search_accuracy), "share"),
        "rescored": DASH if candidate.rescored_accuracy is None else show(_mean(candidate.rescored_accuracy), "share"),
        "kl": f"{max(kl_to_base.values()):.3f}" if kl_to_base else DASH,
        "within": {True: "yes", False: "no", None: DASH}[candidate.is_feasible],
        "is_on_front": candidate.key in front.front,
        "is_chosen": candidate.key == front.chosen,
    }


def _origin(origin: FrontOrigin, numbers: dict[str, int]) -> str:
    words = {"seeded": f"seeded: {origin.label}", "random": "random"}.get(origin.kind, "")
    if origin.kind == "bred":
        parents = dict.fromkeys(f"{numbers[key]}" if key in numbers else "a failed one" for key in origin.parents)
        words = f"bred in generation {origin.generation} from {' and '.join(parents)}"
    return f"{words}, repaired" if origin.is_repaired else words


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / len(shares)
