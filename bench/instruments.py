"""Readings that the parent takes while a child works: its memory, the device's clocks, temperature and energy.

One thread reads one probe at a fixed interval and sleeps between readings. Memory is watched only in separate passes;
clocks and temperature are read only twice a second, which costs less than a hundredth of one core.
"""

from __future__ import annotations

import contextlib
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from .gpu_processes import sort_out
from .judge.schema import TelemetryPoint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from types import TracebackType

    from .nvml import Card

MAX_SERIES = 600
RAPL_PACKAGE = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
Reading = TypeVar("Reading")


class Sampler(Generic[Reading]):
    """Reads `probe` every `interval_ms` inside a `with` block; keeps (time, reading) unless the reading is None."""

    def __init__(self, probe: Callable[[], Reading | None], *, interval_ms: float) -> None:
        self._probe = probe
        self._interval_s = interval_ms / 1e3
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: BaseException | None = None
        self.readings: list[tuple[int, Reading]] = []

    def _run(self) -> None:
        try:
            while True:
                self.take()
                if self._stop.wait(self._interval_s):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again at the end of the `with` block
            self._failure = error

    def take(self) -> None:
        """Take one reading now, in addition to the regular ones."""
        reading = self._probe()
        if reading is not None:
            self.readings.append((time.perf_counter_ns(), reading))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure

    @property
    def max_gap_ms(self) -> float | None:
        """Longest time between two readings, in which something may have been missed."""
        times = [t_ns for t_ns, _ in self.readings]
        return max(((after - before) / 1e6 for before, after in pairwise(times)), default=None)


def thinned(readings: Sequence[tuple[int, int]], limit: int = MAX_SERIES) -> list[tuple[int, int]]:
    """At most `limit` readings with the highest of every stretch; repetitions of a value are left out first."""
    ends = {0, len(readings) - 1}
    readings = [
        reading
        for index, reading in enumerate(readings)
        if index in ends or not readings[index - 1][1] == reading[1] == readings[index + 1][1]
    ]
    if len(readings) <= limit:
        return readings
    edges = [len(readings) * index // limit for index in range(limit + 1)]
    return [max(readings[begin:end], key=lambda reading: reading[1]) for begin, end in pairwise(edges) if end > begin]


def process_rss_bytes(pid: int) -> int | None:
    """Resident set of another process now; None if it has ended or the platform does not report it."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * _PAGE_BYTES or None
    return None


def _page_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


_PAGE_BYTES = _page_bytes()


def cpu_reading() -> dict[str, Any] | None:
    """Clock and temperature of the CPU, and whether its firmware throttles it; None if nothing is reported."""
    values = {
        "cpu_clock_mhz": _cpu_clock_mhz(),
        "temperature_c": _cpu_temperature_c(),
        "num_throttles": _number(_FIRST_CPU / "thermal_throttle/package_throttle_count"),
    }
    return values if any(value is not None for value in values.values()) else None


_FIRST_CPU = Path("/sys/devices/system/cpu/cpu0")


def _cpu_clock_mhz() -> float | None:
    """Clock of the fastest core: the working one; idle cores have low clocks."""
    files = _FIRST_CPU.parent.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    kilohertz = max((found for file in files if (found := _number(file)) is not None), default=None)
    if kilohertz is not None:
        return kilohertz / 1e3
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        return max(clocks, default=None)
    return None


def _cpu_temperature_c() -> float | None:
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        with contextlib.suppress(OSError):
            if (zone / "type").read_text().strip() in {"x86_pkg_temp", "cpu-thermal", "cpu_thermal", "soc-thermal"}:
                millidegrees = _number(zone / "temp")
                return None if millidegrees is None else millidegrees / 1e3
    return None


def cpu_energy_j() -> float | None:
    """Energy counter of the first CPU package (RAPL), if the system allows reading it; it overflows at times."""
    microjoules = _number(RAPL_PACKAGE)
    return None if microjoules is None else microjoules / 1e6


def _number(file: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return float(file.read_text())
    return None


def gpu_reading(card: Card, *, own_pid: int | None, idle_pids: Collection[int]) -> dict[str, Any]:
    """Clocks, temperature, power, throttle reasons and foreign processes of a card now."""
    processes = card.processes()
    occupants = None if processes is None else sort_out(processes, own_pid=own_pid, idle_pids=idle_pids)
    return {
        "sm_clock_mhz": card.sm_clock_mhz(),
        "memory_clock_mhz": card.memory_clock_mhz(),
        "temperature_c": card.temperature_c(),
        "power_w": card.power_w(),
        "throttle_reasons": card.throttle_reasons() or (),
        "used_bytes": card.memory_used_bytes(),
        "num_foreign_processes": None if occupants is None else occupants.num_foreign,
    }


def telemetry_points(
    readings: Sequence[tuple[int, dict[str, Any]]], *, process: int, zero_ns: int
) -> list[TelemetryPoint]:
    """Readings in the form of the record, with times since `zero_ns`."""
    points = []
    throttles = readings[0][1].get("num_throttles") if readings else None
    for t_ns, reading in readings:
        values = {key: reading[key] for key in TelemetryPoint.model_fields.keys() & reading.keys()}
        if (count := reading.get("num_throttles")) is not None:
            values["throttle_reasons"] = (
                ("cpu_thermal_throttle",) if throttles is not None and count > throttles else ()
            )
            throttles = count
        points.append(TelemetryPoint(t_ns=max(t_ns - zero_ns, 0), process=process, **values))
    return points
