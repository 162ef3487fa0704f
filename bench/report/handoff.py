"""The document for the next phase of the user's pipeline: the keys of its "Output to Phase 8", and their evidence.

    {"success", "experts", "best_mixture", "adapted_model",
     "metrics": {"latency_ms", "accuracy", "vram_gb", "throughput_tps"}, "verdict", "evidence", "criteria", "targets",
     "artifact", "phase6"}

`verdict` and `evidence` are those of the first target, `targets` has those of each. `phase6` is the document of phase
6, if there was one; HAVOC measured none of its values. A value that was not measured is null.

`success` is true only if all `criteria` are met, so that later phases do not ship an unproven model: every limit is
proven met; each expert is proven on its own task above the base and above the share that the task's file asks for; the
mixture's mean is at least that of each expert; the search has settled; and experts and mixture are close enough to the
base. Each criterion is listed; null means not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...bounds import quantile_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..judge.gate import Judgement
    from ..judge.record import Record
    from .phase6 import HandedOver

_DIGITS = 4
_TARGET_FIELDS = ("verdict", "evidence", "exit_code", "reason")


def build_handoff(
    record: Record,
    judgements: Sequence[Judgement],
    *,
    scores: Mapping[str, Any],
    is_converged: bool,
    max_kl: float,
    above: Mapping[str, float],
    experts: Mapping[str, str],
    best_mixture: Sequence[float],
    adapted_model: str,
    artifact: str,
    handed: HandedOver | None = None,
) -> dict[str, Any]:
    """Return the handoff document; the first of `judgements` decides.

    `experts` maps domains to file names, `adapted_model` names the released model, `artifact` the measured one;
    `scores` is the content of `scores.json`, `max_kl` the limit of KL(adapted || base) in nats per predicted token,
    `above` the share right that a task's file asks for, by task; `handed` is the document of the phase before, or None.
    """
    judgement = judgements[0]
    criteria = {
        "limits_met": judgement.verdict == "pass",
        "expert_above_base": _named(scores, "gains", lambda gain: (gain["expert"], gain["is_proven"])),
        "expert_above_share": _named(
            {"asked": [row for row in scores["rows"] if row["kind"] == "expert" and row["name"] in above]},
            "asked",
            lambda row: (row["name"], row["accuracy"][row["name"]]["low"] > above[row["name"]]),
        ),
        "mixture_not_below": _named(scores, "paired", lambda pair: (pair["against"], pair["margin"] >= 0)),
        "search_converged": is_converged,
        "kl_below_limit": _named(
            {"adapted": [row for row in scores["rows"] if row["kind"] != "base"]},
            "adapted",
            lambda row: (row["name"], max(row["kl_to_base"].values()) < max_kl),
        ),
    }
    return {
        "success": all(is_met for criterion in criteria.values() for is_met in _each(criterion)),
        "experts": dict(experts),
        "best_mixture": list(best_mixture),
        "adapted_model": adapted_model,
        "metrics": {
            "latency_ms": _rounded(_latency_ms(record)),
            "accuracy": _rounded(_mean_accuracy(record)),
            "vram_gb": _rounded(_vram_gb(record)),
            "throughput_tps": _rounded(_tok_per_s(record)),
        },
        "verdict": judgement.verdict,
        "evidence": judgement.evidence,
        "criteria": criteria,
        "targets": {one.target: {name: getattr(one, name) for name in _TARGET_FIELDS} for one in judgements},
        "artifact": artifact,
        "phase6": None if handed is None else handed.to_json(),
    }


def _named(
    scores: Mapping[str, Any], part: str, judge: Callable[[Mapping[str, Any]], tuple[str, bool]]
) -> dict[str, bool] | None:
    """A criterion for each name of a part of the scores; None if an older version did not write it."""
    try:
        return dict(map(judge, scores[part]))
    except KeyError:
        return None


def _each(criterion: bool | Mapping[str, bool] | None) -> list[bool]:
    """Whether each part of a criterion is met; an unknown part is not met."""
    return list(criterion.values()) if isinstance(criterion, dict) else [bool(criterion)]


def _latency_ms(record: Record) -> float | None:
    """Return the 90th percentile of every prefill: the figure that the gate judges."""
    samples = sorted(ms for process in record.samples for ms in process.prefill_ms)
    return quantile_of(samples, 0.9) if samples else None


def _mean_accuracy(record: Record) -> float | None:
    """Mean over the domains measured on the gate split."""
    shares = [item.num_right / item.num_rows for item in record.accuracy.values() if item.split == "gate"]
    return sum(shares) / len(shares) if shares else None


def _vram_gb(record: Record) -> float | None:
    peak_bytes = record.memory.peak_vram_bytes
    return None if peak_bytes is None else peak_bytes / 1e9


def _tok_per_s(record: Record) -> float | None:
    """Return the tokens after the first divided by their time, over all processes together."""
    runs = [run for process in record.samples for run in process.decode if run.step_ns]
    seconds = sum(sum(run.step_ns) for run in runs) / 1e9
    return sum(len(run.step_ns) for run in runs) / seconds if runs else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
