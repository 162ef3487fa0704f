"""What arithmetic proves before a run: the seed's model cannot meet the seed's limits, smaller ones may."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.bench.judge.targets import Target, load_target
from havoc_core.bench.plan import build_plan, load_config, paper_roofline, prefill_ms, structures
from havoc_core.bench.roofline_probe import measure_rounds, roofline_of
from havoc_core.errors import HavocError
from havoc_core.model.hf_config import to_hf
from havoc_core.model.structure import Structure


@pytest.fixture(scope="module")
def gtx1660() -> Target:
    return load_target("gtx1660")


def test_the_seeds_model_is_impossible(gtx1660: Target) -> None:
    """No structure of the 5.96 B parameter model prefills in 100 ms or fits 2 GB on a GTX 1660: proven."""
    plan = build_plan("7b", gtx1660)
    assert plan.is_impossible
    assert plan.num_parameters == 5_957_685_248
    assert {option.outlook for option in plan.options} == {"impossible"}
    for option in plan.options:
        floors = {figure.metric: figure.floor for figure in option.figures}
        assert floors["prefill_ms"] > 500
        assert floors["peak_vram_bytes"] > 2e9
    assert "prefill_ms at best 585 ms (fp16-fp16; must be < 100 ms)" in plan.conclusion
    assert "peak_vram_bytes at best 3.44 GB (int4-fp16; must be < 2 GB)" in plan.conclusion


def test_small_models_show_which_formats_can_pass(gtx1660: Target) -> None:
    """135 M parameters pass with fp32 activations and likely not with fp16, whose products are slow on this card."""
    plan = build_plan("edge-135m", gtx1660)
    outlooks = {option.structure: option.outlook for option in plan.options}
    assert not plan.is_impossible
    assert {name for name, outlook in outlooks.items() if outlook == "possible"} == {
        "fp32-fp32",
        "fp16-fp32",
        "int8-fp32",
        "int4-fp32",
    }
    assert outlooks["int4-fp16"] == "unlikely"
    assert plan.truncated == ()
    larger = build_plan("edge-360m", gtx1660)
    assert not larger.is_impossible
    assert larger.conclusion.startswith(
        "no format is likely to pass, but none is proven impossible: prefill_ms likely 135 ms"
    )
    assert {option.structure for option in larger.truncated} >= {"int4-fp32-r0.40"}
    assert all(option.outlook == "possible" for option in larger.truncated)
    assert "0.6 TFLOP/s in practice" in larger.peaks


def test_the_floor_is_below_the_estimate(gtx1660: Target) -> None:
    """A certain bound is never worse than what is likely."""
    for option in build_plan("edge-360m", gtx1660).options:
        for figure in option.figures:
            assert figure.floor <= figure.estimate if figure.sign == "<" else figure.floor >= figure.estimate


def test_the_floor_is_the_roofline(gtx1660: Target) -> None:
    """512 tokens through N matrix parameters at 5.03 TFLOP/s: two operations each, and a little attention."""
    config = load_config("edge-135m")
    assert gtx1660.roofline is not None
    floor, _ = prefill_ms(config, Structure("fp32", "fp32"), gtx1660.roofline, num_tokens=512)
    matrices_alone = 1e3 * 2 * 106_000_000 * 512 / 5.03e12
    assert matrices_alone < floor < 1.2 * matrices_alone


def test_samples_needed_are_the_planning_table(gtx1660: Target) -> None:
    """869 of 1000 right, and a true 90 % passes 500 rows with 95 % chance, 100 rows with a third."""
    rows = {row["num_rows"]: row for row in build_plan("nano", gtx1660).samples["accuracy"]}
    assert {n: row["num_right"] for n, row in rows.items()} == {100: 92, 200: 179, 500: 439, 1000: 869, 2000: 1727}
    assert rows[500]["chance"]["0.90"] == pytest.approx(0.955, abs=0.01)
    assert rows[100]["chance"]["0.90"] == pytest.approx(0.32, abs=0.01)


def test_host_proves_only_memory() -> None:
    """Peaks measured in a blink prove nothing, so on `host` only memory can be impossible."""
    host = load_target("host")
    plan = build_plan("7b", host)
    for option in plan.options:
        assert {figure.metric for figure in option.figures if figure.outlook == "impossible"} <= {"peak_rss_bytes"}
    assert plan.is_impossible
    assert "prove nothing" in plan.peaks or "not measurable now" in plan.peaks


def test_rounds_that_disagree_give_no_peaks() -> None:
    """The best round counts, times the cores; rounds more than twice apart are of a busy machine and say nothing."""
    found, origin = roofline_of([4e10, 5e10], [8e9, 1e10], num_cores=4)
    assert found is not None
    assert (found.fp32_flop_per_s, found.bandwidth_bytes_per_s) == (2e11, 1e10)
    assert "one thread times 4 cores" in origin
    for rates in (([1e10, 5e10], [1e10, 1e10]), ([1e10, 1e10], [1e9, 1e10])):
        found, why = roofline_of(*rates, num_cores=4)
        assert found is None
        assert why.startswith("not measurable now: 2 rounds")


def test_without_peaks_only_memory_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine too busy to probe, times are left out and the plan says so; memory is arithmetic all the same."""
    monkeypatch.setattr("havoc_core.bench.plan.probe_roofline", lambda: (None, "not measurable now: busy"))
    plan = build_plan("nano", load_target("host"))
    assert {figure.metric for option in plan.options for figure in option.figures} == {"peak_rss_bytes"}
    assert plan.peaks == "not measurable now: busy"
    assert plan.conclusion.endswith("(by memory alone)")
    assert build_plan("7b", load_target("host")).is_impossible


def test_the_probe_is_one_thread_in_a_process_of_its_own() -> None:
    """The rounds of this machine are positive rates, and the probe does not load numpy here."""
    rounds = measure_rounds()
    assert {name: len(rates) for name, rates in rounds.items()} == {"flop_per_s": 4, "bytes_per_s": 4}
    assert all(rate > 1e6 for rates in rounds.values() for rate in rates)
    code = (
        "import sys; from havoc_core.bench.roofline_probe import probe_roofline; probe_roofline()\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_directory_is_a_model(tmp_path: Path) -> None:
    """A Hugging Face directory is planned by its config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(load_config("edge-135m"))))
    assert load_config(str(tmp_path)) == load_config("edge-135m")


@pytest.mark.parametrize("name", ["edge-1b", "", "/nowhere"])
def test_an_unknown_model_is_one_line(name: str) -> None:
    """A typo lists the presets."""
    with pytest.raises(HavocError, match="edge-135m"):
        load_config(name)


def test_every_structure_once() -> None:
    """Four weight formats by two activation types, without fp32 weights under fp16 activations."""
    assert len(structures()) == len(set(structures())) == 7


def test_planning_needs_no_torch() -> None:
    """The edge device plans too."""
    code = (
        "import sys; from havoc_core.bench.plan import build_plan\n"
        "from havoc_core.bench.judge.targets import load_target\n"
        "build_plan('7b', load_target('gtx1660'))\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CARD = """
[mine]
extends = "gtx1660"
title = "a card of one's own"
[mine.device]
names = ["{name}"]
pci_device_id = "0x1234"
"""


def test_peaks_are_never_those_of_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card without peaks is asked for them, or gets those of the bundled target that names it; nothing is probed."""

    def probe() -> None:
        raise AssertionError("probed")

    monkeypatch.setattr("havoc_core.bench.plan.probe_roofline", probe)
    path = tmp_path / "own.toml"
    for name in ("NVIDIA GeForce RTX 9999", "GeForce GTX 1660"):
        path.write_text(CARD.format(name=name))
        target = load_target(str(path)).model_copy(update={"roofline": None})
        if "1660" in name:
            assert paper_roofline(target) == load_target("gtx1660").roofline
            continue
        with pytest.raises(HavocError, match=r"'NVIDIA GeForce RTX 9999' .* \[mine\.roofline\]"):
            build_plan("nano", target)
    board = load_target("host").device.model_copy(update={"is_this_machine": False, "names": ("Board Processor",)})
    with pytest.raises(HavocError, match="peaks of 'Board Processor'"):
        build_plan("nano", load_target("host").model_copy(update={"device": board}))
    assert paper_roofline(load_target("host")) is None


def test_the_runtime_is_part_of_a_cpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled nano takes 95 MB, of which 4 are its own: the estimate is within 15 %."""
    monkeypatch.setattr("havoc_core.bench.plan.probe_roofline", lambda: (None, "busy"))
    option = build_plan("nano", load_target("host")).options[0]
    assert option.structure.startswith("fp32")
    assert option.figures[0].estimate == pytest.approx(94.9e6, rel=0.15)


def test_two_passes_are_twice_one(gtx1660: Target) -> None:
    """Not one prompt of twice the length, whose attention costs more: the floor of a plan must be a floor."""
    twice = gtx1660.model_copy(update={"workload": gtx1660.workload.model_copy(update={"passes": 2})})
    one, two = (
        {
            (option.structure, figure.metric): figure
            for option in build_plan("edge-135m", target).options
            for figure in option.figures
        }
        for target in (gtx1660, twice)
    )
    prefills = [key for key in one if key[1] == "prefill_ms"]
    assert prefills
    for key in prefills:
        assert two[key].floor == pytest.approx(2 * one[key].floor)
        assert two[key].estimate == pytest.approx(2 * one[key].estimate)
