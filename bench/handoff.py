"""What the next phase of the user's pipeline receives: the keys of its "Output to Phase 8", and what they rest on.

    {"success", "experts", "best_mixture", "adapted_model",
     "metrics": {"latency_ms", "accuracy", "vram_gb", "throughput_tps"}, "verdict", "evidence"}

A value that was not measured is null. `success` is true only for a pass, so nobody downstream ships the unproven.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bounds import quantile_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .gate import Judgement
    from .record import Record

_DIGITS = 4


def build_handoff(
    record: Record,
    judgement: Judgement,
    *,
    experts: Mapping[str, str],
    best_mixture: Sequence[float],
    adapted_model: str,
) -> dict[str, Any]:
    """Return the handoff document. `experts` maps domains to file names, `adapted_model` names the released model."""
    return {
        "success": judgement.verdict == "pass",
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
    }


def _latency_ms(record: Record) -> float | None:
    """Return the 90th percentile of every prefill, the figure the gate judges."""
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
    """Return tokens after the first over the time they took, all processes together."""
    runs = [run for process in record.samples for run in process.decode if run.step_ns]
    seconds = sum(sum(run.step_ns) for run in runs) / 1e9
    return sum(len(run.step_ns) for run in runs) / seconds if runs else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
