"""A kind of device is an entry and how it is identified: one that stands in this file is offered, named and judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from havoc_core.bench.device import IDENTIFY, identify_cpu, identify_device
from havoc_core.bench.doctor import measured_device
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.schema import Device
from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.profiles import PROFILES
from havoc_core.bench.watched_run import open_session
from havoc_core.cli import main, parse
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime.devices import DEVICE_KINDS, DeviceKind, kind_of_provider
from havoc_core.export.runtime.providers import require_provider
from tests.bench import sample_records as samples

NPU = DeviceKind(name="npu", provider="NpuExecutionProvider", tensors="npu", runtime_bytes=700_000_000)
NAME = "Example NPU 1"
TARGET = f"""
[board]
extends = "host"
title = "a board with an NPU"
without = ["peak_rss_bytes"]
[board.device]
kind = "npu"
names = ["{NAME}"]
is_this_machine = false
[board.roofline]
fp32_flop_per_s = 5e12
fp16_flop_per_s = 10e12
bandwidth_bytes_per_s = 100e9
[[board.limits]]
metric = "peak_vram_bytes"
below = 2
unit = "GB"
"""


def identify_npu() -> Device:
    fingerprint = hashlib.sha256(NAME.encode()).hexdigest()
    return Device(kind="npu", name=NAME, cpu=identify_cpu(), fingerprint=fingerprint)


@pytest.fixture(autouse=True)
def _npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_KINDS, "npu", NPU)
    monkeypatch.setitem(IDENTIFY, "npu", identify_npu)


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "board.toml"
    path.write_text(TARGET)
    return str(path)


def test_it_is_identified_and_offered() -> None:
    """By its provider, by `doctor`, and on the command line of `export`."""
    assert identify_device("NpuExecutionProvider") == measured_device() == identify_npu()
    assert parse(["export", "nano", "--for", "npu", "--out", "x"]).device == "npu"
    assert kind_of_provider("NpuExecutionProvider") is NPU
    with pytest.raises(HavocError, match="'TpuExecutionProvider': .* or NpuExecutionProvider"):
        kind_of_provider("TpuExecutionProvider")
    with pytest.raises(IdentityError, match="'NpuExecutionProvider' is not .*; there are C"):
        require_provider("NpuExecutionProvider")


def test_a_record_of_it_is_judged(target: str) -> None:
    """A good record of the kind passes; one of the same name on another kind, or run by another provider, does not."""
    changes = {
        "device__kind": "npu",
        "device__name": NAME,
        "device__gpu": None,
        "protocol__provider": NPU.provider,
        "samples__each__nodes_by_provider": {NPU.provider: 120},
    }
    good = samples.record("cuda", **changes)
    assert judge([good], load_target(target)).verdict == "pass"
    other = samples.record("cpu", device__name=NAME)
    found = judge([other], load_target(target))
    assert (found.verdict, found.exit_code) == ("not_measured", 5)
    assert "measured on a cpu device" in found.reason
    elsewhere = samples.record("cuda", **changes | {"protocol__provider": "CPUExecutionProvider"})
    assert "CPUExecutionProvider does not run on a npu" in judge([elsewhere], load_target(target)).reason


def test_plan_reckons_with_its_runtime(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate of memory holds what the kind's runtime takes."""
    estimates = []
    for num_bytes in (NPU.runtime_bytes, 0):
        monkeypatch.setitem(DEVICE_KINDS, "npu", dataclasses.replace(NPU, runtime_bytes=num_bytes))
        main(["plan", "edge-135m", "--target", target, "--json"])
        figures = json.loads(capsys.readouterr().out)["options"][0]["figures"]
        estimates += [figure["estimate"] for figure in figures if figure["metric"] == "peak_vram_bytes"]
    assert estimates[0] - estimates[1] == 700_000_000


def test_steps_are_captured_where_the_kind_can(tmp_path: Path) -> None:
    """`bench` refuses before anything runs."""
    with (
        pytest.raises(HavocError, match="CUDAExecutionProvider, .* NpuExecution"),
        open_session(tmp_path, provider=NPU.provider, profile=PROFILES["quick"], captures_steps=True),
    ):
        pass


@pytest.mark.parametrize("name", DEVICE_KINDS)
def test_every_kind_can_be_identified(name: str) -> None:
    """An entry without a way to identify it would fail where a user measures."""
    assert name in IDENTIFY
