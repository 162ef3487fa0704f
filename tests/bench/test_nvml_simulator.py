"""Faults of a GTX 1660, played by a library with NVML's symbols: each is noticed, and nothing simulated ever passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import Device, Record, load_record, seal_of
from havoc_core.bench.judge.targets import load_target
from havoc_core.cli import main
from havoc_core.errors import HavocError

SOURCES = Path(__file__).parent / "nvml_simulator"
COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        COMPILER is None or sys.platform != "linux", reason="the simulator needs a C compiler and Linux"
    ),
]

Simulate = Callable[..., Any]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulator")
    for source, name in (("nvml.c", "libnvidia-ml.so.1"), ("cuda.c", "libcuda.so.1")):
        flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        subprocess.run([COMPILER, *flags, "-o", folder / name, SOURCES / source], check=True)
    return folder


@pytest.fixture
def run(libraries: Path, tmp_path: Path) -> Simulate:
    """Run Python under the simulator, with lines of the scenario replaced (None: taken out) or added."""

    def start(*arguments: str, add: tuple[str, ...] = (), **replace: str | None) -> Any:
        lines = (SOURCES / "gtx1660.scenario").read_text().splitlines()
        lines = [line for line in lines if line.split()[0] not in replace]
        lines += [f"{key} {value}" for key, value in replace.items() if value is not None]
        (tmp_path / "scenario").write_text("\n".join([*lines, *add]) + "\n")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(libraries),
            "HAVOC_NVML_SCENARIO": str(tmp_path / "scenario"),
        }
        command = [sys.executable, "-W", "error", *arguments]
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    return start


@pytest.fixture
def session(run: Simulate, tiny_artifact: Path) -> Simulate:
    """Measure the tiny artifact under the simulator: `session(mode, scenario changes)`."""

    def start(*mode: str, add: tuple[str, ...] = (), **replace: str | None) -> Any:
        return run(str(SOURCES / "simulated_session.py"), str(tiny_artifact), *mode, add=add, **replace)

    return start


@pytest.fixture
def late_session(session: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Begin every measuring process 0.6 s late, so that what happens earlier happens while it loads, on any machine."""
    late = tmp_path / "late-python"
    late.write_text(f'#!/bin/sh\nsleep 0.6\nexec "{sys.executable}" "$@"\n')
    late.chmod(0o755)
    monkeypatch.setenv("SIMULATED_CHILD_PYTHON", str(late))
    return session


IDENTIFY = """
import json
from havoc_core.bench.device import identify_device
from havoc_core.export.runtime.devices import CUDA_PROVIDER
from havoc_core.errors import HavocError
try:
    print(identify_device(CUDA_PROVIDER).model_dump_json())
except HavocError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture
def identify(run: Simulate) -> Callable[..., Device]:
    """Identify the simulated card."""

    def start(**replace: str | None) -> Device:
        return Device.model_validate(run("-c", IDENTIFY, **replace), strict=False)

    return start


def test_two_witnesses_agree(identify: Callable[..., Device]) -> None:
    """NVML through the genuine binding and the CUDA driver describe one GTX 1660, and it is known to be simulated."""
    device = identify()
    assert device.name == "NVIDIA GeForce GTX 1660"
    assert device.gpu.disagreements == ()
    assert device.gpu.nvml.uuid_sha256 == device.gpu.cuda.uuid_sha256
    assert (device.gpu.pci_device_id, device.gpu.bus_width_bits, device.gpu.cuda.num_sms) == ("0x2184", 192, 22)
    assert device.is_simulated
    assert device.simulation_reasons
    assert "0a1b2c3d" not in device.model_dump_json()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("cuda_name", "NVIDIA GeForce GTX 1660 SUPER", "CUDA NVIDIA GeForce GTX 1660 SUPER"),
        ("cuda_uuid", "0" * 32, "different UUIDs"),
        ("cuda_cc", "8.6", "compute capability: NVML 7.5, CUDA 8.6"),
        ("cuda_bus_width", "256", "memory bus: NVML 192, CUDA 256"),
        ("cuda_sms", "24", "multiprocessors: NVML 22, CUDA 24"),
        ("cuda_memory", "4000000000", "memory: NVML 6442450944, CUDA 4000000000"),
    ],
)
def test_witnesses_that_disagree(identify: Callable[..., Device], key: str, value: str, words: str) -> None:
    """Where NVML and the CUDA driver differ, the record says in what."""
    assert any(words in sentence for sentence in identify(**{key: value}).gpu.disagreements)


def test_sibling_keeps_its_own_name(identify: Callable[..., Device]) -> None:
    """A GTX 1660 SUPER is never called a GTX 1660: name and PCI device id are those of the SUPER."""
    name = "NVIDIA GeForce GTX 1660 SUPER"
    device = identify(name=name, cuda_name=name, pci_device_id="0x21c4")
    wanted = load_target("gtx1660").device
    assert device.name == name
    assert device.name not in wanted.names
    assert device.gpu.pci_device_id == "0x21c4" != wanted.pci_device_id
    assert device.fingerprint != identify().fingerprint


def test_one_witness_is_missing(identify: Callable[..., Device], run: Simulate) -> None:
    """A card that only NVML shows has one witness; a field the card lacks is None, not 0; a lost card is one line."""
    device = identify(cuda_name=None, bus_width=None, power_limit_mw=None, num_cores=None)
    assert device.gpu.cuda is None
    assert device.gpu.nvml.num_sms is None
    assert device.gpu.bus_width_bits is None
    assert device.gpu.power_limit_w is None
    lost = run("-c", IDENTIFY, cuda_name=None, lost="1")
    assert lost["error"] == "MeasurementError"
    assert "GPU was lost" in lost["message"]


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1660", "NVIDIA GeForce GTX 1660 SUPER"])
def test_simulated_record_never_passes(
    session: Simulate, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A whole record made on the simulator is marked so; the gate ends with 5, and calling it measured is refused."""
    document = session("record", name=name, cuda_name=name)["seen"]
    record = Record.model_validate(document, strict=False)
    assert record.is_intact()
    assert (record.evidence, record.device.name) == ("simulated", name)
    (series,) = record.memory.vram
    assert (series.method, series.cross_check_method) == ("nvml_process", "nvml_device_delta")
    assert series.peak_bytes == series.cross_check_bytes == 500_000_000
    assert series.baseline_bytes == 310_000_000
    assert series.max_gap_ms is not None
    assert record.energy is None or record.energy.method == "nvml_total_energy"  # a counter that stood still is silent
    judgement = judge([record], load_target("gtx1660"))
    assert (judgement.exit_code, judgement.evidence) == (5, "simulated")
    record.save(tmp_path / "record.json")
    assert main(["gate", str(tmp_path / "record.json"), "--target", "gtx1660"]) == 5
    assert "NOT MEASURED" in capsys.readouterr().out
    document["evidence"] = "measured"
    document["sha256"] = seal_of(document)
    (tmp_path / "record.json").write_text(json.dumps(document))
    with pytest.raises(HavocError, match="simulated device cannot give"):
        load_record(tmp_path / "record.json")


def test_growing_memory_peaks_at_its_end(session: Simulate) -> None:
    """Memory that grows while the model runs is caught at its highest."""
    (series,) = session("memory", process="child 400000000 100000")["seen"]["vram"]
    assert series["reading_bytes"] == sorted(series["reading_bytes"])
    assert series["peak_bytes"] == max(series["reading_bytes"]) > 410_000_000


def test_accounting_is_believed_first(session: Simulate) -> None:
    """With accounting on, the driver's own maximum counts and is held against sampling."""
    (series,) = session("memory", accounting="1", accounted_peak="520000000")["seen"]["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_accounting", 520_000_000)
    assert (series["cross_check_method"], series["cross_check_bytes"]) == ("nvml_process", 500_000_000)


@pytest.mark.parametrize("told", ["0", None])
def test_silent_accounting_is_passed_over(session: Simulate, told: str | None) -> None:
    """Accounting that is on but knows nothing of the process leaves the next method its place."""
    (series,) = session("memory", accounting="1", accounted_peak=told)["seen"]["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_process", 500_000_000)


def test_accounting_knows_a_container_by_its_host_number(session: Simulate) -> None:
    """The driver accounts under the number it lists, which inside a container is not ours."""
    changes = {"process": "host 600000000", "accounting": "1", "accounted_peak": "610000000"}
    (series,) = session("memory", **changes)["seen"]["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_accounting", 610_000_000)


def test_per_process_figure_is_withheld(session: Simulate) -> None:
    """Where the driver will not tell per process (WDDM, WSL), the whole card minus its baseline counts, and says so."""
    seen = session("memory", process="child na", hidden_bytes="640000000")["seen"]
    (series,) = seen["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_device_delta", 640_000_000)
    assert "Windows and WSL" in seen["vram_caveat"]


def test_no_process_is_listed(session: Simulate) -> None:
    """A driver that lists nobody, as in some containers, leaves the whole card, with a caveat of its own."""
    seen = session("memory", hide_processes="1")["seen"]
    (series,) = seen["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_device_delta", 500_000_000)
    assert "containers" in seen["vram_caveat"]


def test_card_that_changed_hands_is_not_subtracted(session: Simulate) -> None:
    """Somebody who left while our process ran made the baseline too high: no difference is taken from it."""
    gone = "until 700 process 1 900000000"
    seen = session("memory", process="child na", hidden_bytes="640000000", hide_processes="1", add=(gone,))["seen"]
    assert [series["method"] for series in seen["vram"]] == ["ort_arena"]
    assert "other processes started or ended" in seen["vram_caveat"]


def test_container_sees_host_numbers(session: Simulate) -> None:
    """Our process under a number that does not exist here is found by its coming; a stranger before it is not ours."""
    (series,) = session("memory", process="host 600000000")["seen"]["vram"]
    assert (series["method"], series["peak_bytes"]) == ("nvml_process", 600_000_000)
    assert series["cross_check_method"] == "nvml_device_delta"


def test_stranger_spoils_the_baseline(session: Simulate) -> None:
    """With a stranger on the card and no per-process figures only the allocator speaks, and it can pass nothing."""
    stranger = f"process {os.getpid()} 900000000"
    seen = session("memory", process="child na", hidden_bytes="640000000", add=(stranger,))["seen"]
    assert [series["method"] for series in seen["vram"]] == ["ort_arena"]
    assert "other processes" in seen["vram_caveat"]


@pytest.mark.parametrize("told", ["0", "1000"])
def test_impossible_memory_is_no_number(session: Simulate, told: str) -> None:
    """Zero, or less than the weights, is unavailable and never a small number."""
    seen = session("memory", process=f"child {told}")["seen"]
    assert [series["method"] for series in seen["vram"]] == ["ort_arena"]
    assert "bytes of weights" in seen["vram_caveat"] or "no memory figure" in seen["vram_caveat"]


def test_throttling_and_strangers_are_noticed(session: Simulate) -> None:
    """A throttled clock and a stranger's process each make a window one to repeat."""
    strange = session("latency", throttle="0x41", add=(f"process {os.getpid()} 900000000",))["seen"]
    assert "the device throttled (hw_thermal_slowdown)" in strange["problems"]
    assert "another process used the GPU" in strange["problems"]
    assert strange["telemetry"][0]["sm_clock_mhz"] == 1785


def test_clocks_of_a_loading_card_do_not_count(late_session: Simulate) -> None:
    """A card idles at its lowest clocks while a model loads: readings begin with the first timed call."""
    seen = late_session("latency", add=("until 500 sm_clock 300",))["seen"]
    assert len(seen["telemetry"]) >= 2
    assert {point["sm_clock_mhz"] for point in seen["telemetry"]} == {1785}
    times = [point["t_ns"] for point in seen["telemetry"]]
    assert times == sorted(times)


def test_a_throttled_window_is_repeated_and_counted(late_session: Simulate) -> None:
    """Throttling that ends is measured again; one that stays ends in an invalid record, after a bounded number."""
    passing = late_session("record", "12", add=("until 3000 throttle 0x40",))["seen"]
    assert 1 <= passing["protocol"]["num_retries"] == len(passing["protocol"]["retry_reasons"]) <= 12
    assert any("hw_thermal_slowdown" in reason for reason in passing["protocol"]["retry_reasons"])
    status = {check["id"]: check["status"] for check in passing["checks"]}
    assert (status["throttling"], status["retries"]) == ("ok", "warning")
    staying = late_session("record", "1", throttle="0x40")["seen"]
    assert staying["protocol"]["num_retries"] == 1
    assert {check["id"]: check["status"] for check in staying["checks"]}["throttling"] == "invalid"


def test_idle_reasons_are_harmless(session: Simulate) -> None:
    """A card that says "idle" between calls did not throttle."""
    calm = session("latency", throttle="0x1")["seen"]
    assert not [problem for problem in calm["problems"] if "CPU" not in problem]


@pytest.mark.parametrize(("mode", "after_ms"), [("memory", 500), ("latency", 150)])
def test_lost_card_ends_the_measurement(late_session: Simulate, mode: str, after_ms: int) -> None:
    """A card that disappears in mid-run is an invalid measurement (exit 4), not a zero."""
    answer = late_session(mode, add=(f"after {after_ms} lost 1",))
    assert answer["error"] == "MeasurementError"
    assert "GPU was lost" in answer["message"]


def test_doctor_tells_a_simulated_card(run: Simulate) -> None:
    """It names what the card would offer, that it is no real one, and that no graph runs on it."""
    found = run("-m", "havoc_core", "doctor", "--json", accounting="1")["findings"]
    answers = {finding["question"]: (finding["answer"], finding["reason"]) for finding in found}
    assert answers["first witness: NVML"] == ("yes", "NVIDIA GeForce GTX 1660, driver 580.95.05")
    assert answers["second witness: CUDA driver"][0] == "yes"
    assert answers["identity proven"][0] == "no"
    assert "simulated" in answers["identity proven"][1]
    assert answers["peak_vram_bytes"] == ("yes", "the driver accounts for each process, without a gap")
    assert answers["runs on NVIDIA GPUs"][0] == "no"
    assert answers["gtx1660"][0] == "no"
    withheld = run("-m", "havoc_core", "doctor", "--json", process="77 na")["findings"]
    vram = next(finding for finding in withheld if finding["question"] == "peak_vram_bytes")
    assert (vram["answer"], "gives no figures" in vram["reason"]) == ("partly", True)


def test_a_search_measures_the_card_it_is_bound_to(run: Simulate, tmp_path: Path) -> None:
    """Costs are the card's own memory; a simulated card is no GTX 1660, so the search is refused or proves nothing."""
    found = run(str(SOURCES / "simulated_search.py"), str(tmp_path / "search"))
    assert found["refusal"].startswith("target gtx1660: the device is simulated (NVML answers, but no NVIDIA kernel")
    assert "--on-this-machine" in found["refusal"]
    assert found["journal_device"] == "cuda"
    assert found["device"]["is_simulated"]
    front = found["front"]
    assert front["evidence"] == "measured_other_device"
    assert not any(candidate["is_feasible"] for candidate in front["candidates"])
    costs = {one["structure"]["weight_format"]: one["cost"]["peak_bytes"] for one in front["candidates"]}
    assert costs == {"fp32": 5e8, "int8": 5e8}  # what the card says that the process holds, whatever the CPU's memory
    assert found["limits"]["peak_bytes"] == ["<", 2e9]
