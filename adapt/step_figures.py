"""The metrics of a training step under the names of seed 003, `svf/<domain>/*`, gathered while it is taken.

Loss, reward and what the process took are handed on at every step; accuracy, errors and the figures of each matrix at
the steps that are validated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..track.catalogue import TRAINING
from ..track.process_figures import ProcessFigures
from .delta_figures import DeltaFigures

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ..track.metrics_file import Record
    from .basis import Basis
    from .tasks.evaluation import Scores

_OF_THE_TRACE = {
    "loss": "loss",
    "reward": "reward",
    "nats_per_token": "nats_per_token",
    "kl": "kl_div",
    "right": "right",
    "flat_groups": "flat_groups",
    "failed": "failed",
    "draws": "draws",
}
_TINY = 1e-6  # as torch's clip_grad_norm_ adds to a norm


class StepFigures:
    """Collects the figures of a step's parts, and passes them to `record` together."""

    def __init__(self, task: str, basis: Basis, deltas: Mapping[str, torch.nn.Parameter], record: Record) -> None:
        """Begin with nothing noted."""
        self._axis, self._prefix, self._record = TRAINING.format(domain=task), f"svf/{task}/", record
        self._deltas, self._process = DeltaFigures(basis, deltas), ProcessFigures()
        self._noted: dict[str, float | None] = {}
        self._gradient_scale = 1.0

    def note_gradient(self, norm: float, longest: float) -> None:
        """Note the norm of a gradient that was then cut to at most `longest`."""
        kept = min(1.0, longest / (norm + _TINY))
        self._gradient_scale = 1 / kept
        self._noted |= {"gradient_norm": norm, "clipped_share": 1 - kept}

    def note_validation(self, scores: Scores, kl_to_base: float, *, best: Mapping[str, int]) -> None:
        """Note the validation results by source of error, and the figures of the matrices."""
        num_rows, num_right = len(scores.right), sum(scores.right)
        failed = set(scores.failed_rows)
        num_empty = sum(
            not text.strip() and not is_right and place not in failed
            for place, (text, is_right) in enumerate(zip(scores.completions, scores.right, strict=True))
        )
        self._noted |= {
            "accuracy": num_right / num_rows,
            "best_accuracy": best["num_right"] / best["num_rows"] if best["num_rows"] else None,
            "kl_to_base": kl_to_base,
            "errors/wrong": num_rows - num_right - len(failed) - num_empty,
            "errors/empty": num_empty,
            "errors/failed": len(failed),
            "errors/cut": scores.num_cut,
        }
        figures = self._deltas.read(gradient_scale=self._gradient_scale)
        self._noted |= {f"z/{place}": value for place, value in figures.items()}

    def record(self, step: int, entry: Mapping[str, Any], *, num_skipped: int) -> None:
        """Record the notes, the step's `entry` in the trace, and the figures of the process; then begin again."""
        values = {name: entry[key] for key, name in _OF_THE_TRACE.items() if key in entry}
        process = {f"process/{name}": value for name, value in self._process.since_last().items()}
        values |= {**self._noted, **process, "skipped": num_skipped}
        self._record(self._axis, step, {self._prefix + name: value for name, value in values.items()})
        self._noted, self._gradient_scale = {}, 1.0
