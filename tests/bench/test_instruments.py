"""Instruments: they read at their pace, keep peaks when thinned, and hand their failures on."""

from __future__ import annotations

import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core.bench.instruments import Sampler, cpu_reading, process_rss_bytes, telemetry_points, thinned
from havoc_core.errors import MeasurementError

pytestmark = pytest.mark.alone


def test_sampler_reads_until_left() -> None:
    """Readings come with rising times; None is left out; nothing is read after leaving."""
    values = itertools.count()

    def probe() -> int | None:
        value = next(values)
        return value if value % 2 else None

    with Sampler(probe, interval_ms=2) as sampler:
        time.sleep(0.1)
    num_readings = len(sampler.readings)
    assert num_readings > 1
    assert all(value % 2 for _, value in sampler.readings)
    assert sorted(sampler.readings) == sampler.readings
    assert sampler.max_gap_ms is not None
    time.sleep(0.02)
    assert len(sampler.readings) == num_readings


def test_sampler_failure_is_raised() -> None:
    """A probe that fails ends the measurement instead of leaving a hole."""

    def probe() -> int:
        raise MeasurementError("the GPU was lost")

    with pytest.raises(MeasurementError, match="GPU was lost"), Sampler(probe, interval_ms=1):
        time.sleep(0.05)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(min_value=0, max_value=50), min_size=1, max_size=300), limit=st.integers(2, 40))
def test_thinning_keeps_the_peak(values: list[int], limit: int) -> None:
    """However few points are kept, the highest stays, times rise, and the bound holds."""
    readings = list(enumerate(values))
    thin = thinned(readings, limit)
    assert max(value for _, value in thin) == max(values)
    assert [t for t, _ in thin] == sorted({t for t, _ in thin})
    assert len(thin) <= limit
    assert set(thin) <= set(readings)


def test_own_memory_is_seen_from_outside() -> None:
    """Another process's resident set is read; one that is gone has none."""
    block = np.ones(2_000_000)
    assert process_rss_bytes(os.getpid()) > block.nbytes
    assert process_rss_bytes(2**22 + 1) is None


def test_throttle_counter_becomes_a_reason() -> None:
    """A CPU whose thermal counter moved between two readings throttled; a standing counter is silence."""
    readings = [(10, {"num_throttles": 4.0}), (20, {"num_throttles": 4.0}), (30, {"num_throttles": 5.0})]
    points = telemetry_points(readings, process=2, zero_ns=5)
    assert [point.throttle_reasons for point in points] == [(), (), ("cpu_thermal_throttle",)]
    assert [(point.t_ns, point.process) for point in points] == [(5, 2), (15, 2), (25, 2)]
    assert telemetry_points([], process=0, zero_ns=0) == []


def test_cpu_reading_is_plausible() -> None:
    """What the system tells of its CPU lies within what CPUs do."""
    reading = cpu_reading()
    if reading is None or reading["cpu_clock_mhz"] is None:
        pytest.skip("this system does not tell its CPU's clock")
    assert 100 < reading["cpu_clock_mhz"] < 10_000
