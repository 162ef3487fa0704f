"""The VRAM ladder: the best method that answered, checked by the next, and never a number that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from havoc_core.bench.gpu_processes import sort_out
from havoc_core.bench.judge.limits import LOWER_BOUND_METHODS
from havoc_core.bench.nvml import GpuProcess
from havoc_core.bench.vram import VramFinding, VramReading, arena_series, disagreement, settle

MB = 1_000_000


def _settle(readings: list[VramReading], *, first_ns: int = 0, **changes: Any) -> VramFinding:
    usual = {
        "process": 0,
        "zero_ns": 0,
        "interval_ms": 5.0,
        "max_gap_ms": 6.0,
        "baseline_bytes": 300 * MB,
        "settled_bytes": 300 * MB,
        "accounted_bytes": None,
        "weight_bytes": 100 * MB,
        "phase_start_ns": {"load": 1},
    }
    return settle(list(enumerate(readings, first_ns)), **{**usual, **changes})


def _reading(device: int | None, own: int | None = None, others: int | None = 0) -> VramReading:
    return VramReading(
        device_used_bytes=None if device is None else device * MB,
        own_used_bytes=None if own is None else own * MB,
        num_others=others,
    )


def test_methods_in_order() -> None:
    """Accounting before per-process sampling before the whole card; each held against the next."""
    readings = [_reading(400, 90), _reading(720, 410), _reading(700, 400)]
    chosen = [_settle(readings, accounted_bytes=415 * MB), _settle(readings), _settle([_reading(400), _reading(720)])]
    assert [(f.series.method, f.series.peak_bytes, f.series.cross_check_bytes) for f in chosen] == [
        ("nvml_accounting", 415 * MB, 410 * MB),
        ("nvml_process", 410 * MB, 420 * MB),
        ("nvml_device_delta", 420 * MB, None),
    ]
    assert [disagreement(f.series) for f in chosen] == [None, None, None]


def test_disagreement_is_a_problem() -> None:
    """More than 64 MB and 5 % apart is no measurement."""
    words = "nvml_process says 410000000 bytes, nvml_device_delta 600000000"
    assert disagreement(_settle([_reading(900, 410)]).series) == words


def test_strangers_close_the_whole_card() -> None:
    """With others on the card, or nobody told, only per-process figures count."""
    for others in (1, None):
        finding = _settle([_reading(900, None, others)])
        assert finding.series is None
        assert "other processes" in finding.reason
        assert _settle([_reading(900, 410, others)]).series.cross_check_method is None


def test_a_card_that_does_not_come_back_was_not_ours_alone() -> None:
    """Whatever the process list says: more or less than before by over 64 MB means that somebody came or went."""
    for settled, is_ours in ((236, True), (235, False), (364, True), (365, False), (None, True)):
        finding = _settle([_reading(400), _reading(720)], settled_bytes=None if settled is None else settled * MB)
        assert (finding.series is not None) is is_ours
        if not is_ours:
            assert f"300000000 bytes before and {settled}000000 after" in finding.reason


def test_the_whole_card_comes_with_a_caveat() -> None:
    """It says whether the driver kept back a figure or the whole list; better methods need no such words."""
    listed = VramReading(device_used_bytes=720 * MB, own_used_bytes=None, num_others=0, is_own_listed=True)
    assert "Windows and WSL" in _settle([listed]).caveat
    assert "containers" in _settle([_reading(720)]).caveat
    assert _settle([_reading(720, 410)]).caveat is None
    assert _settle([_reading(720)], accounted_bytes=410 * MB).caveat is None


def test_windows_counts_what_nvml_may_not_say() -> None:
    """Its per-process counters stand between NVML's and the whole card, though others draw on it; spill is kept."""
    readings = [
        replace(_reading(900, None, 2), windows_used_bytes=410 * MB, windows_shared_bytes=5 * MB),
        replace(_reading(950, None, 2), windows_used_bytes=430 * MB, windows_shared_bytes=90 * MB),
    ]
    series = _settle(readings).series
    assert (series.method, series.peak_bytes, series.spilled_bytes) == ("windows_process", 430 * MB, 90 * MB)
    assert series.cross_check_method is None
    both = _settle([replace(_reading(720, 400), windows_used_bytes=390 * MB)]).series
    assert (both.method, both.cross_check_method, both.cross_check_bytes) == (
        "nvml_process",
        "windows_process",
        390 * MB,
    )
    assert both.spilled_bytes is None


def test_the_allocator_is_a_lower_bound() -> None:
    """What the arena held is kept under a name the gate passes nothing by; silence or less than the weights is None."""
    series = arena_series(150 * MB, process=1, weight_bytes=150 * MB)
    assert (series.method, series.peak_bytes) == ("ort_arena", 150 * MB)
    assert series.method in LOWER_BOUND_METHODS
    assert arena_series(None, process=0, weight_bytes=1) is None
    assert arena_series(0, process=0, weight_bytes=1) is None
    assert arena_series(150 * MB - 1, process=0, weight_bytes=150 * MB) is None


def test_nothing_is_never_zero() -> None:
    """No reading, no memory told, or less than the weights: a reason, no series."""
    for readings in ([], [_reading(None)], [_reading(300)], [_reading(350, 50)]):
        finding = _settle(readings)
        assert finding.series is None
        assert finding.reason


@given(
    st.lists(
        st.builds(
            _reading, st.none() | st.integers(0, 6000), st.none() | st.integers(0, 6000), st.none() | st.integers(0, 2)
        ),
        max_size=12,
    )
)
def test_a_peak_holds_the_weights(readings: list[VramReading]) -> None:
    """Whatever the driver answers, a peak is at least the weights, or there is a reason and no peak."""
    finding = _settle(readings)
    assert (finding.series is None) == (finding.reason is not None)
    if finding.series is not None:
        assert finding.series.peak_bytes >= 100 * MB


def _process(pid: int, *, does_compute: bool = True) -> GpuProcess:
    return GpuProcess(pid=pid, used_bytes=pid * MB, does_compute=does_compute)


def test_our_process_is_told_from_strangers() -> None:
    """Ours by its number, or in a container by being new and unknown; a display that draws is no stranger."""
    visible = sort_out([_process(7), _process(8), _process(9, does_compute=False)], own_pid=7, idle_pids={8, 9})
    assert (visible.own.pid, visible.num_foreign, visible.num_drawing) == (7, 1, 1)
    container = sort_out([_process(50), _process(51)], own_pid=7, idle_pids={50}, exists=lambda _: False)
    assert (container.own.pid, container.num_foreign) == (51, 1)
    two_new = sort_out([_process(50), _process(51)], own_pid=7, idle_pids=(), exists=lambda _: False)
    assert (two_new.own, two_new.num_foreign) == (None, 2)
    local = sort_out([_process(50)], own_pid=7, idle_pids=(), exists=lambda _: True)
    assert (local.own, local.num_foreign) == (None, 1)


def test_limits_are_exact() -> None:
    """64 MB apart still agree, as do 5 % of a large peak; a peak of just the weights counts."""
    assert disagreement(_settle([_reading(710, 346)]).series) is None
    assert disagreement(_settle([_reading(711, 346)]).series) is not None
    assert disagreement(_settle([_reading(2400, 2000)]).series) is None
    assert disagreement(_settle([_reading(2401, 2000)]).series) is not None
    assert _settle([_reading(300, 100)]).series.peak_bytes == 100 * MB


def test_series_keeps_what_was_seen() -> None:
    """Baseline, times since the session began, and under accounting the curve of the best sampled method."""
    began = {"first_ns": 17, "zero_ns": 10, "phase_start_ns": {"load": 16}}
    series = _settle([_reading(500, 150), _reading(520, 180)], accounted_bytes=200 * MB, **began).series
    assert series.baseline_bytes == 300 * MB
    assert (series.time_ns, series.reading_bytes) == ((7, 8), (150 * MB, 180 * MB))
    assert series.phase_start_ns == {"load": 6}
    for readings, found in (([_reading(500), _reading(520)], (200 * MB, 220 * MB)), ([_reading(500, None, 1)], ())):
        assert _settle(readings, accounted_bytes=220 * MB, **began).series.reading_bytes == found
