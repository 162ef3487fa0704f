"""A whole measurement on a real NVIDIA card: its record breaks no rule, and the target of another card refuses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.bench.accuracy import run_accuracy
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.measure import measure, measure_cost
from havoc_core.errors import HavocError
from havoc_core.export.runtime.devices import CPU_PROVIDER as CPU
from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
def test_a_short_measurement_ranks_by_device_memory(export, tmp_path: Path, activations: str) -> None:
    shipped = export("fp16", activations, tmp_path)
    cost = measure_cost(shipped.folder, provider=CUDA)
    (series,) = cost.record.memory.vram
    print(f"{cost.peak_bytes:,} bytes by {series.method}; {series.cross_check_method}: {series.cross_check_bytes}")
    assert cost.peak_bytes == series.peak_bytes > cost.record.subject.weight_bytes
    assert series.method != "ort_arena"
    assert cost.disturbance == ""


def test_a_record_of_this_card_is_judged_here_and_refused_elsewhere(export, tmp_path: Path) -> None:
    shipped = export("fp16", "fp16", tmp_path, cache="static")
    script = Path(__file__).with_name("card_target.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "card.toml")], check=True)
    record = measure(shipped.folder, profile="quick", provider=CUDA, captures_steps=True)
    assert record.protocol.provider_options["enable_cuda_graph"] == "1"
    here = judge([record], load_target(str(tmp_path / "card.toml")))
    assert [finding for finding in here.findings if finding.rule != "V07"] == [], here.reason
    elsewhere = judge([record], load_target("gtx1660"))
    assert (elsewhere.verdict, elsewhere.evidence, elsewhere.exit_code) == ("not_measured", "measured_other_device", 5)


def test_capture_needs_a_card_and_a_static_cache(export, tmp_path: Path) -> None:
    shipped = export("fp16", "fp16", tmp_path)
    with pytest.raises(HavocError, match="CUDAExecutionProvider, this is CPU"):
        measure_cost(shipped.folder, provider=CPU, captures_steps=True)
    with pytest.raises(HavocError, match="static cache"):
        measure_cost(shipped.folder, provider=CUDA, captures_steps=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_card_answers_as_the_cpu_does(export, tmp_path: Path, cache: str) -> None:
    """Row by row, pictures too: batches that are sorted, thinned and refilled live on the card."""
    shipped = export("fp32", "fp32", tmp_path, cache=cache)
    on_cpu, on_card = (
        run_accuracy(shipped.folder, Scoring(num_rows=64), provider=provider).right for provider in (CPU, CUDA)
    )
    assert set(on_card) == {"math", "code", "reasoning", "vision"}
    for task, right in on_card.items():
        num_apart = sum(a != b for a, b in zip(right, on_cpu[task], strict=True))
        print(f"{cache}, {task}: {sum(right)} of {len(right)} right, {num_apart} rows apart from the CPU's")
        assert num_apart <= 1  # two tokens that are equally likely may change places
