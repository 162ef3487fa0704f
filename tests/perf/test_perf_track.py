"""What metrics cost a training: the time spent on figures and on metrics.jsonl, as a share of the whole.

Both are timed in one run, so that other work on the machine slows both alike. Goal: under 1 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.step_figures import StepFigures
from havoc_core.adapt.tasks.task import load_task
from havoc_core.adapt.training import train_expert
from havoc_core.config import ExpertSettings
from havoc_core.jobs import training_settings
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT
from havoc_core.track.metrics_file import MetricsFile

Row = Callable[..., None]


class Spent:
    """Seconds spent in the methods that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start_s

        return call


def test_metrics_against_training(
    benchmark: BenchmarkFixture, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled base's math expert, 20 steps with the default settings, validated as often as a run does."""
    base, task = load_base("nano"), load_task("math")
    basis = base_basis(base, tmp_path, SILENT)
    settings = training_settings(ExpertSettings(num_steps=20), task)
    spent = Spent()
    for name in ("note_gradient", "note_validation", "record"):
        monkeypatch.setattr(StepFigures, name, spent.timed(getattr(StepFigures, name)))
    record = MetricsFile(tmp_path, warn=pytest.fail).log

    def train() -> float:
        start_s = time.perf_counter()
        train_expert(base, basis, task, settings=settings, checkpoint_dir=tmp_path, record=record)
        return time.perf_counter() - start_s

    whole_s = benchmark.pedantic(train, rounds=1)
    share = spent.seconds / whole_s
    detail = f"{1000 * spent.seconds / 20:.2g} ms of {1000 * whole_s / 20:.3g} ms a step"
    row("metrics, share of a training step", 100 * share, goal=1, is_upper_goal=True, unit="%", detail=detail)
    assert share < 0.05
