"""Records that a real card made, kept under reports/: they pass where they were made, and nowhere else."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import load_record
from havoc_core.bench.judge.targets import load_target

FOLDERS = sorted((Path(__file__).resolve().parents[2] / "reports").glob("*-h200"))
NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_it_breaks_no_rule_where_it_was_made(folder: Path) -> None:
    """No rule was written with a card at hand; a real record is what they must let pass."""
    judgement = judge([load_record(folder / "record.json")], load_target(str(folder / "target.toml")), now=NOW)
    assert judgement.findings == ()
    assert (judgement.verdict, judgement.evidence, judgement.exit_code) == ("pass", "measured_target", 0)


def test_another_card_refuses_it(folder: Path) -> None:
    judgement = judge([load_record(folder / "record.json")], load_target("gtx1660"), now=NOW)
    assert (judgement.verdict, judgement.evidence, judgement.exit_code) == ("not_measured", "measured_other_device", 5)


def test_two_ways_of_measuring_its_memory_agree(folder: Path) -> None:
    """What NVML says of the process, and of the whole card less what it held before: within 1 %."""
    record = load_record(folder / "record.json")
    (series,) = record.memory.vram
    assert (series.method, series.cross_check_method) == ("nvml_process", "nvml_device_delta")
    assert series.cross_check_bytes == pytest.approx(series.peak_bytes, rel=0.01)
    assert series.peak_bytes > record.subject.weight_bytes


def test_every_node_that_computes_ran_on_the_card(folder: Path) -> None:
    """ONNX Runtime kept four lengths on the CPU, where the card's kernel reads them."""
    for process in load_record(folder / "record.json").samples:
        assert set(process.nodes_by_provider) == {"CUDAExecutionProvider"}
        assert process.num_shape_nodes == 4
