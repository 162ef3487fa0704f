"""NVIDIA's management library as typed readings: each value comes from the card, or is None if not offered.

The binding is `nvidia-ml-py`, whose module is called `pynvml`. A field that a card, a driver or a container does not
support is None, never 0. A card that disappears while it is being read is a `MeasurementError`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasurementError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
CORES_PER_SM = {  # fp32 cores of one multiprocessor by compute capability: helper_cuda.h of the CUDA samples
    **dict.fromkeys(("6.0", "7.0", "7.2", "7.5", "8.0"), 64),
    **dict.fromkeys(("5.0", "5.2", "5.3", "6.1", "6.2", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0"), 128),
}


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """One process on the card; `used_bytes` is None if the driver hides it (Windows, WSL, some containers)."""

    pid: int
    used_bytes: int | None
    does_compute: bool


@dataclass(frozen=True)
class Card:
    """One card of an open NVML library. Every method asks the driver again."""

    library: Any
    handle: Any

    def _ask(self, function: str, *arguments: object) -> Any:  # noqa: ANN401 - each function has its own result type
        return _ask(self.library, getattr(self.library, function, None), self.handle, *arguments)

    def name(self) -> str | None:
        """Marketing name, exactly as the driver gives it."""
        return _text(self._ask("nvmlDeviceGetName"))

    def uuid(self) -> str | None:
        """Unique name, "GPU-xxxxxxxx-xxxx-...". Hash it before it is stored."""
        return _text(self._ask("nvmlDeviceGetUUID"))

    def pci_device_id(self) -> str | None:
        """PCI device id such as "0x2184", which differs between similar cards."""
        info = self._ask("nvmlDeviceGetPciInfo")
        return None if info is None else f"0x{info.pciDeviceId >> 16:04x}"

    def compute_capability(self) -> str | None:
        """Major and minor, such as "7.5"."""
        answer = self._ask("nvmlDeviceGetCudaComputeCapability")
        return None if answer is None else f"{answer[0]}.{answer[1]}"

    def num_sms(self) -> int | None:
        """Multiprocessors, from NVML's number of cores and the cores per multiprocessor at this compute capability."""
        num_cores, num_per_sm = (
            self._number("nvmlDeviceGetNumGpuCores"),
            CORES_PER_SM.get(self.compute_capability() or ""),
        )
        return None if num_cores is None or num_per_sm is None or num_cores % num_per_sm else num_cores // num_per_sm

    def memory_total_bytes(self) -> int | None:
        """Size of the card's memory."""
        info = self._memory()
        return None if info is None else _positive(info.total)

    def memory_used_bytes(self) -> int | None:
        """Allocated memory of the whole card, without the driver's own reserve if it is reported separately."""
        info = self._memory()
        return None if info is None else int(info.used)

    def _memory(self) -> Any:  # noqa: ANN401 - a ctypes structure of the binding
        version_2 = getattr(self.library, "nvmlMemory_v2", None)
        info = None if version_2 is None else self._ask("nvmlDeviceGetMemoryInfo", version_2)
        return info if info is not None else self._ask("nvmlDeviceGetMemoryInfo")

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Every process that computes or draws on the card; None if the driver does not give the list."""
        computing = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if computing is None:
            return None
        drawing = self._ask("nvmlDeviceGetGraphicsRunningProcesses") or ()
        found: dict[int, GpuProcess] = {}
        for process, does_compute in [*((p, False) for p in drawing), *((p, True) for p in computing)]:
            used = None if process.usedGpuMemory is None else _positive(process.usedGpuMemory)
            found[int(process.pid)] = GpuProcess(pid=int(process.pid), used_bytes=used, does_compute=does_compute)
        return tuple(found.values())

    def is_accounting(self) -> bool | None:
        """Whether the driver keeps per-process maxima (off by default, root switches it on)."""
        mode = self._ask("nvmlDeviceGetAccountingMode")
        return None if mode is None else bool(mode)

    def accounted_peak_bytes(self, pid: int) -> int | None:
        """The process's highest memory, by the driver's own accounting."""
        stats = self._ask("nvmlDeviceGetAccountingStats", pid)
        return None if stats is None or stats.maxMemoryUsage is None else _positive(stats.maxMemoryUsage)

    def sm_clock_mhz(self) -> int | None:
        """Core clock now."""
        return self._number("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_SM)

    def memory_clock_mhz(self) -> int | None:
        """Memory clock now."""
        return self._number("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_MEM)

    def max_sm_clock_mhz(self) -> int | None:
        """Highest core clock of the card."""
        return self._number("nvmlDeviceGetMaxClockInfo", self.library.NVML_CLOCK_SM)

    def max_memory_clock_mhz(self) -> int | None:
        """Highest memory clock of the card."""
        return self._number("nvmlDeviceGetMaxClockInfo", self.library.NVML_CLOCK_MEM)

    def temperature_c(self) -> float | None:
        """Core temperature now."""
        sensor = self.library.NVML_TEMPERATURE_GPU
        value = self._number("nvmlDeviceGetTemperatureV", sensor)
        value = value if value is not None else self._number("nvmlDeviceGetTemperature", sensor)
        return None if value is None else float(value)

    def power_w(self) -> float | None:
        """Power drawn by the board now (one-second mean from Ampere on)."""
        milliwatts = self._number("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def power_limit_w(self) -> float | None:
        """Enforced power limit."""
        milliwatts = self._number("nvmlDeviceGetEnforcedPowerLimit")
        return None if milliwatts is None else milliwatts / 1e3

    def energy_j(self) -> float | None:
        """Energy since the driver was loaded; differences count."""
        millijoules = self._number("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def throttle_reasons(self) -> tuple[str, ...] | None:
        """Why the clocks are not higher, by name; the function was renamed, so both names are tried."""
        mask = self._number("nvmlDeviceGetCurrentClocksEventReasons")
        mask = mask if mask is not None else self._number("nvmlDeviceGetCurrentClocksThrottleReasons")
        if mask is None:
            return None
        known = tuple(name for bit, name in THROTTLE_REASONS.items() if mask & bit)
        unknown = mask & ~sum(THROTTLE_REASONS)
        return (*known, f"unknown_0x{unknown:x}") if unknown else known

    def bus_width_bits(self) -> int | None:
        """Width of the memory bus."""
        return self._number("nvmlDeviceGetMemoryBusWidth")

    def vbios(self) -> str | None:
        """Version of the card's firmware."""
        return _text(self._ask("nvmlDeviceGetVbiosVersion"))

    def driver_model(self) -> str | None:
        """Windows only: "WDDM", "WDM" or "MCDM"."""
        answer = self._ask("nvmlDeviceGetDriverModel")
        if answer is None:
            return None
        current = answer[0] if isinstance(answer, list) else answer
        return {0: "WDDM", 1: "WDM", 2: "MCDM"}.get(current, f"unknown_{current}")

    def mig_mode(self) -> str | None:
        """Whether the card is split into instances."""
        answer = self._ask("nvmlDeviceGetMigMode")
        return None if answer is None else {0: "off", 1: "on"}.get(answer[0], "unknown")

    def persistence_mode(self) -> str | None:
        """Whether the driver stays loaded between processes."""
        value = self._number("nvmlDeviceGetPersistenceMode")
        return None if value is None else {0: "off", 1: "on"}.get(value, "unknown")

    def _number(self, function: str, *arguments: object) -> int | None:
        answer = self._ask(function, *arguments)
        return None if answer is None else int(answer)


def _ask(library: Any, function: Callable[..., Any] | None, *arguments: object) -> Any:  # noqa: ANN401
    """Call a function of the binding; None if the card, driver or library does not offer it."""
    if function is None:
        return None
    try:
        return function(*arguments)
    except library.NVMLError as error:
        if error.value in (library.NVML_ERROR_GPU_IS_LOST, library.NVML_ERROR_RESET_REQUIRED):
            raise MeasurementError(f"the GPU was lost while it was measured ({error}): restart the machine") from error
        return None
    except UnicodeDecodeError:
        return None


def _text(answer: str | bytes | None) -> str | None:
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    return text or None


def _positive(value: int) -> int | None:
    return int(value) if 0 < int(value) < 2**62 else None


@dataclass(frozen=True, kw_only=True)
class Nvml:
    """The open library: its cards, the driver's version, and the file it was loaded from (only its hash is stored)."""

    library: Any
    cards: tuple[Card, ...]
    driver_version: str | None
    library_file: Path | None

    def card(self, uuid: str | None = None) -> Card | None:
        """Return the card with that UUID, or the first card; None if there is none."""
        return next((card for card in self.cards if uuid is None or card.uuid() == uuid), None)


@contextmanager
def open_nvml() -> Iterator[Nvml | str]:
    """Open NVML, or give the reason why it cannot be opened, as a sentence; shut down at the end."""
    try:
        import pynvml
    except ModuleNotFoundError:
        yield 'NVML: its binding is not installed: pip install "havoc-core[edge]"'
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield f"NVML: {error}"
        return
    try:
        count = _ask(pynvml, pynvml.nvmlDeviceGetCount) or 0
        handles = [_ask(pynvml, pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
        yield Nvml(
            library=pynvml,
            cards=tuple(Card(pynvml, handle) for handle in handles if handle is not None),
            driver_version=_text(_ask(pynvml, pynvml.nvmlSystemGetDriverVersion)),
            library_file=loaded_library("nvidia-ml"),
        )
    finally:
        _ask(pynvml, pynvml.nvmlShutdown)


def loaded_library(part_of_name: str) -> Path | None:
    """File of a shared library that this process has mapped, by a part of its name; None off Linux or if not found."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    files = (Path(columns[5]) for line in lines if len(columns := line.split(maxsplit=5)) > 5)  # noqa: PLR2004
    return next((file for file in files if part_of_name in file.name and ".so" in file.name), None)
