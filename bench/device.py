"""The identity of the processor, to which a verdict is bound, and the machine around it.

A CPU is identified by model and instruction sets. A GPU needs two witnesses that agree: NVML and the CUDA driver. NVML
without a kernel driver is a simulation and is marked as one. Nothing here names the machine or its user.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .. import storage
from ..cgroups import cpu_quota_cores
from ..cores import cpu_name, num_usable_cores, processor_fields
from ..errors import HavocError
from ..export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER, kind_of_provider
from .cuda_driver import CudaCard, open_cuda_card
from .judge.schema import Cpu, Device, Gpu, GpuWitness, Host
from .nvml import Card, Nvml, open_nvml

RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
_FEATURE = re.compile(r"^(sse4_[12]|avx\w*|fma|f16c|amx\w*|asimd\w*|neon|sve2?|sme2?|bf16|i8mm|fphp|rvv)$")
_CUDA_MEMORY_SHARE = 0.90  # the CUDA driver leaves out its reserved memory, so it reports a little less than NVML


def identify_device(provider: str) -> Device:
    """Identify the processor that an ONNX Runtime provider runs on; `HavocError` if this machine has none."""
    return IDENTIFY[kind_of_provider(provider).name]()


def default_provider() -> str:
    """The default provider: CUDA if its driver shows a card, else the CPU."""
    return CUDA_PROVIDER if isinstance(open_cuda_card(), CudaCard) else CPU_PROVIDER


def _identify_host() -> Device:
    cpu = identify_cpu()
    return Device(kind="cpu", name=cpu.name, cpu=cpu, fingerprint=storage.sha256_json(cpu.model_dump(mode="json")))


def _identify_card() -> Device:
    with open_nvml() as nvml:
        cuda = open_cuda_card()
        if isinstance(nvml, str) and isinstance(cuda, str):
            raise HavocError(f"no NVIDIA GPU can be identified here ({nvml}; {cuda})")
        gpu = _identify_gpu(nvml, cuda)
        reasons = simulation_reasons(nvml) if isinstance(nvml, Nvml) else ()
    return Device(
        kind="cuda",
        name=next((witness.name for witness in (gpu.nvml, gpu.cuda) if witness is not None), "unknown"),
        cpu=identify_cpu(),
        gpu=gpu,
        is_simulated=bool(reasons),
        simulation_reasons=reasons,
        fingerprint=storage.sha256_json([gpu.model_dump(mode="json"), reasons]),
    )


IDENTIFY: dict[str, Callable[[], Device]] = {"cpu": _identify_host, "cuda": _identify_card}
"""The function that identifies each kind of `DEVICE_KINDS`; a missing device is a `HavocError`."""


def _identify_gpu(nvml: Nvml | str, cuda: CudaCard | str) -> Gpu:
    """Compare both witnesses; the card is the first one in CUDA, found in NVML by its UUID."""
    by_cuda = None if isinstance(cuda, str) else _cuda_witness(cuda)
    if isinstance(nvml, str):
        return Gpu(nvml=None, cuda=by_cuda, disagreements=(nvml,))
    card = nvml.card(None if isinstance(cuda, str) else cuda.uuid) or nvml.card()
    if card is None:
        return Gpu(nvml=None, cuda=by_cuda, disagreements=("NVML lists no card",))
    by_nvml = _nvml_witness(nvml, card)
    return Gpu(
        nvml=by_nvml,
        cuda=by_cuda,
        disagreements=disagreements(by_nvml, by_cuda, None if isinstance(cuda, str) else cuda.bus_width_bits, card),
        pci_device_id=card.pci_device_id(),
        bus_width_bits=card.bus_width_bits() or (None if isinstance(cuda, str) else cuda.bus_width_bits),
        vbios=card.vbios(),
        driver_version=nvml.driver_version,
        cuda_driver_version=None if isinstance(cuda, str) else cuda.driver_version,
        driver_model=card.driver_model(),
        mig_mode=card.mig_mode(),
        persistence_mode=card.persistence_mode(),
        accounting_mode={None: None, True: "on", False: "off"}[card.is_accounting()],
        power_limit_w=card.power_limit_w(),
        max_sm_clock_mhz=card.max_sm_clock_mhz(),
        max_memory_clock_mhz=card.max_memory_clock_mhz(),
    )


def _nvml_witness(nvml: Nvml, card: Card) -> GpuWitness:
    return GpuWitness(
        name=card.name() or "unknown",
        uuid_sha256=_hash_text(card.uuid()),
        compute_capability=card.compute_capability(),
        num_sms=card.num_sms(),
        memory_total_bytes=card.memory_total_bytes(),
        library_sha256=_hash_library(nvml.library_file),
    )


def _cuda_witness(cuda: CudaCard) -> GpuWitness:
    return GpuWitness(
        name=cuda.name,
        uuid_sha256=_hash_text(cuda.uuid),
        compute_capability=cuda.compute_capability,
        num_sms=cuda.num_sms,
        memory_total_bytes=cuda.memory_total_bytes,
        library_sha256=_hash_library(cuda.library_file),
    )


def disagreements(
    nvml: GpuWitness, cuda: GpuWitness | None, cuda_bus_width_bits: int | None, card: Card
) -> tuple[str, ...]:
    """The differences between NVML and the CUDA driver about one card, as sentences."""
    if cuda is None:
        return ()
    pairs = {
        "name": (nvml.name, cuda.name),
        "UUID": (nvml.uuid_sha256, cuda.uuid_sha256),
        "compute capability": (nvml.compute_capability, cuda.compute_capability),
        "multiprocessors": (nvml.num_sms, cuda.num_sms),
        "memory bus": (card.bus_width_bits(), cuda_bus_width_bits),
    }
    found = [
        f"{what}: NVML {ours}, CUDA {theirs}" if what != "UUID" else "NVML and CUDA give different UUIDs"
        for what, (ours, theirs) in pairs.items()
        if None not in (ours, theirs) and ours != theirs
    ]
    if nvml.memory_total_bytes and cuda.memory_total_bytes:
        share = cuda.memory_total_bytes / nvml.memory_total_bytes
        if not _CUDA_MEMORY_SHARE <= share <= 1.0:
            found.append(f"memory: NVML {nvml.memory_total_bytes}, CUDA {cuda.memory_total_bytes} bytes")
    return tuple(found)


def simulation_reasons(nvml: Nvml) -> tuple[str, ...]:
    """Reasons why the NVML library cannot be NVIDIA's own with a real card; empty if there are none.

    On Linux the genuine library talks to a kernel module, which leaves `/proc/driver/nvidia/version` and device files
    (on WSL `/dev/dxg`), and its file name ends in the driver's version. This finds accidents, not a forger.
    """
    if sys.platform != "linux" or Path("/dev/dxg").exists():
        return ()
    reasons = []
    kernel = Path("/proc/driver/nvidia/version")
    if not kernel.exists() and not Path("/dev/nvidiactl").exists():
        reasons.append("NVML answers, but no NVIDIA kernel driver is loaded")
    elif kernel.exists() and (nvml.driver_version or "?") not in kernel.read_text(errors="replace"):
        reasons.append(f"NVML says driver {nvml.driver_version}, the kernel has another")
    file = nvml.library_file
    if file is not None and nvml.driver_version and not file.resolve().name.endswith(nvml.driver_version):
        reasons.append("the NVML library's file has another version than the driver")
    return tuple(reasons)


def identify_cpu() -> Cpu:
    """Identify this machine's processor from the reports of its operating system."""
    info = processor_fields()
    features = info.get("flags", info.get("Features", "")).split()
    return Cpu(
        name=cpu_name()[:500],
        vendor=info.get("vendor_id", info.get("CPU implementer", "unknown")),
        architecture=platform.machine(),
        family=_joined(info, "cpu family", "model", "CPU part", "CPU variant"),
        stepping=_joined(info, "stepping", "CPU revision"),
        features=tuple(sorted(feature for feature in features if _FEATURE.match(feature))),
        num_logical_cores=os.cpu_count() or 1,
        num_usable_cores=num_usable_cores(),
    )


def _joined(info: dict[str, str], *keys: str) -> str | None:
    return "/".join(info[key] for key in keys if key in info) or None


def identify_host() -> Host:
    """Describe the machine around the device, and the versions of the computing software."""
    libc = " ".join(platform.libc_ver()).strip()
    return Host(
        os=platform.system(),
        kernel=platform.release(),
        libc=libc or None,
        container=_container(),
        ram_bytes=_meminfo_bytes("MemTotal") or _physical_memory_bytes(),
        swap_bytes=_meminfo_bytes("SwapTotal") or 0,
        cpu_governor=_read_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        cpu_quota_cores=cpu_quota_cores(),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in (runtime_package(), "numpy", "nvidia-ml-py")},
        },
    )


def runtime_package() -> str:
    """Name of the installed ONNX Runtime package; `HavocError` for none, or for several that overwrite each other."""
    found = []
    for name in RUNTIME_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            found.append(name)
    if not found:
        raise HavocError('ONNX Runtime is not installed: pip install "havoc-core[edge]"')
    if len(found) > 1:
        raise HavocError(
            f"{' and '.join(found)} are installed together and overwrite each other: "
            f"pip uninstall -y {' '.join(found)}, then install one of them"
        )
    return found[0]


def swap_used_bytes() -> int | None:
    """Swap in use now; None off Linux."""
    total, free = _meminfo_bytes("SwapTotal"), _meminfo_bytes("SwapFree")
    return None if total is None or free is None else total - free


def _meminfo_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _physical_memory_bytes() -> int:
    if sys.platform == "win32":
        return 1  # unknown without another package; nothing depends on it
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> str | None:
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    version = _read_line(Path("/proc/version")) or ""
    return "wsl2" if "microsoft" in version.lower() else None


def _read_line(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip()[:500] or None
    except OSError:
        return None


def _hash_text(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _hash_library(file: Path | None) -> str | None:
    if file is None:
        return None
    with contextlib.suppress(OSError):
        return storage.sha256_file(file)
    return None
