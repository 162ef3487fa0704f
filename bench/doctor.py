"""What this machine can and cannot measure, and why: every answer comes from a trial, not from a list.

A finding answers one question with yes, partly or no, with the reason and, if there is one, the remedy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..cores import num_usable_cores
from ..errors import HavocError
from ..export.runtime.devices import CUDA_PROVIDER, DEVICE_KINDS
from .cuda_driver import open_cuda_card
from .device import (
    identify_cpu,
    identify_device,
    identify_host,
    runtime_package,
    swap_used_bytes,
)
from .instruments import RAPL_PACKAGE, cpu_energy_j, cpu_reading, process_rss_bytes
from .judge.figures import show
from .judge.rules import device_problem
from .judge.targets import BUNDLED, read_targets
from .nvml import Card, Nvml, open_nvml
from .page_cache import disk_read_bytes
from .tool_version import identify_tool
from .windows_memory import open_counters

if TYPE_CHECKING:
    from .judge.schema import Device

Answer = Literal["yes", "partly", "no"]
# y = Neg(x) as an ONNX file of 60 bytes, to try whether a provider runs at all.
_SMALLEST_GRAPH = (
    b'\x08\x08:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
EDGE_PACKAGES = ("numpy", "onnxruntime", "pynvml", "PIL", "tokenizers")
REPORT_PACKAGES = ("matplotlib",)
LAB_PACKAGES = ("torch", "safetensors", "onnx", "onnx_ir", "onnxscript", "pymoo", "datasets", "gguf", *REPORT_PACKAGES)


@dataclass(frozen=True, slots=True)
class Capability:
    """One question about this machine, answered."""

    topic: str
    question: str
    answer: Answer
    reason: str

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def examine() -> list[Capability]:
    """Look at this machine; takes about a second and changes nothing."""
    with open_nvml() as nvml:
        card = nvml.card() if isinstance(nvml, Nvml) else None
        return [
            *_machine(),
            *_runtime(),
            *_graphics(nvml, card),
            *_metrics(card),
            _sandbox(),
            *_targets(),
            _tool(),
            *_packages(),
        ]


def _machine() -> list[Capability]:
    cpu, host = identify_cpu(), identify_host_or_none()
    cores = num_usable_cores()
    found = [Capability("machine", "processor", "yes", f"{cpu.name}, {cores} of {cpu.num_logical_cores} cores usable")]
    if host is not None:
        container = f", container {host.container}" if host.container else ""
        text = f"{host.os} {host.kernel}, {show(host.ram_bytes, 'bytes')}{container}"
        found.append(Capability("machine", "system", "yes", text))
        governor = host.cpu_governor
        if governor is not None:
            steady: Answer = "yes" if governor == "performance" else "partly"
            found.append(Capability("machine", "steady CPU clock", steady, f"governor {governor}"))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None:
        quiet: Answer = "yes" if load < 0.5 * cores else "partly" if load < cores else "no"
        found.append(Capability("machine", "quiet", quiet, f"load {load:.2f} on {cores} cores in the last minute"))
    swapped = swap_used_bytes()
    if swapped:
        found.append(Capability("machine", "no swapping", "partly", f"{show(swapped, 'bytes')} are swapped out"))
    return found


def identify_host_or_none() -> Any:  # noqa: ANN401 - a Host, or None if ONNX Runtime is missing
    """Describe the machine; None if ONNX Runtime is missing or installed twice, which another finding reports."""
    try:
        return identify_host()
    except HavocError:
        return None


def _runtime() -> list[Capability]:
    try:
        package = runtime_package()
    except HavocError as error:
        return [Capability("runtime", "ONNX Runtime", "no", str(error))]
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    version = importlib.metadata.version(package)
    found = [Capability("runtime", "ONNX Runtime", "yes", f"{package} {version}: {', '.join(providers)}")]
    if CUDA_PROVIDER not in providers:
        found.append(Capability("runtime", "runs on NVIDIA GPUs", "no", f"{package} was built without {CUDA_PROVIDER}"))
    elif isinstance(card := open_cuda_card(), str):
        found.append(Capability("runtime", "runs on NVIDIA GPUs", "no", f"{package} could, but {card}"))
    else:
        reason = provider_problem(CUDA_PROVIDER)
        answer: Answer = "yes" if reason is None else "no"
        if reason is not None and "havoc-core[gpu]" not in reason:
            reason = f'{reason}; CUDA\'s libraries come with pip install "havoc-core[gpu]"'
        text = f"a graph ran on {card.name}, CUDA driver {card.driver_version}"
        found.append(Capability("runtime", "runs on NVIDIA GPUs", answer, reason or text))
    return found


def provider_problem(provider: str) -> str | None:
    """Open and run the smallest graph on a provider; return why that fails, as a sentence, or None if it works."""
    import numpy as np

    from ..export.runtime.providers import open_graph

    try:
        session, _ = open_graph(
            _SMALLEST_GRAPH, provider=provider, num_threads=1, weights={}, packs_weights=True, provider_options={}
        )
        answer = session.run(None, {"x": np.ones(1, dtype=np.float32)})
    except Exception as error:  # noqa: BLE001 - any error of the runtime is the answer
        return f"{provider} was tried: {' '.join(str(error).split())[:300]}"
    return None if float(answer[0][0]) == -1.0 else f"{provider} computes -1 as {answer[0][0]}"


def _graphics(nvml: Nvml | str, card: Card | None) -> list[Capability]:
    cuda = open_cuda_card()
    if isinstance(nvml, str) or card is None:
        reason = nvml if isinstance(nvml, str) else "NVML lists no card"
        first = Capability("graphics card", "first witness: NVML", "no", reason)
    else:
        first = Capability(
            "graphics card", "first witness: NVML", "yes", f"{card.name()}, driver {nvml.driver_version}"
        )
    second: Capability
    if isinstance(cuda, str):
        second = Capability("graphics card", "second witness: CUDA driver", "no", cuda)
    else:
        text = f"{cuda.name}, compute capability {cuda.compute_capability}, {cuda.num_sms} multiprocessors"
        second = Capability("graphics card", "second witness: CUDA driver", "yes", text)
    return [first, second, *_identity()]


def _identity() -> list[Capability]:
    try:
        device = identify_device(CUDA_PROVIDER)
    except HavocError:
        return []
    if device.is_simulated:
        reason = f"simulated: {'; '.join(device.simulation_reasons)}"
        return [Capability("graphics card", "identity proven", "no", reason)]
    gpu = device.gpu
    if gpu is None or gpu.disagreements or gpu.nvml is None or gpu.cuda is None:
        reasons = gpu.disagreements if gpu else ()
        return [Capability("graphics card", "identity proven", "no", "; ".join(reasons) or "a witness is missing")]
    return [Capability("graphics card", "identity proven", "yes", "both witnesses agree")]


def _metrics(card: Card | None) -> list[Capability]:
    timed = Capability("can measure", "prefill_ms, decode_tok_per_s, ttft_ms, load_s", "yes", "monotonic clock")
    own = process_rss_bytes(os.getpid())
    rss = "sampled from outside and kept by the kernel" if own else f"{sys.platform} shows no process's resident set"
    energy = cpu_energy_j()
    reading = cpu_reading()
    return [
        timed,
        Capability("can measure", "cold start", *_cold_start()),
        Capability("can measure", "peak_rss_bytes", "yes" if own else "no", rss),
        _vram(card),
        Capability("can measure", "energy_j_per_tok", *_energy(card, energy)),
        Capability("can measure", "clock and temperature", *_telemetry(card, reading)),
    ]


def _cold_start() -> tuple[Answer, str]:
    if hasattr(os, "posix_fadvise") and disk_read_bytes() is not None:
        return "yes", "files can be removed from the page cache, and reads from the disk are counted"
    return "partly", f"{sys.platform} does not count a process's reads, so a start is recorded as warm or unknown"


def _vram(card: Card | None) -> Capability:
    if card is None:
        return Capability("can measure", "peak_vram_bytes", "no", "no NVIDIA card answers through NVML")
    return Capability("can measure", "peak_vram_bytes", *_vram_method(card))


def _vram_method(card: Card) -> tuple[Answer, str]:
    """Name the best method that this card and driver offer."""
    processes = card.processes()
    if card.is_accounting():
        return "yes", "the driver accounts for each process, without a gap"
    if processes is None:
        return "partly", "the driver lists no process: only the runtime's allocator is known, which cannot prove a pass"
    if card.driver_model() == "WDDM":
        with open_counters() as counters:
            if counters is not None:
                return "yes", "Windows counts each process's memory, dedicated and shared"
    if card.driver_model() == "WDDM" or any(process.used_bytes is None for process in processes):
        return "partly", "the driver gives no figures of processes: whole card minus idle, if no other process uses it"
    return "yes", "sampled per process; with `nvidia-smi --accounting-mode=1` as root there is no sampling gap"


def _energy(card: Card | None, cpu_joules: float | None) -> tuple[Answer, str]:
    if card is not None and card.energy_j() is not None:
        return "yes", "the card counts energy"
    if cpu_joules is not None:
        return "yes", "the processor counts energy (RAPL)"
    if RAPL_PACKAGE.exists():
        return "no", f"the processor counts energy, but only root may read {RAPL_PACKAGE}"
    return "no", "this system shows no energy counter; virtual machines rarely do"


def _telemetry(card: Card | None, reading: dict[str, Any] | None) -> tuple[Answer, str]:
    if card is not None:
        return "yes", "NVML"
    offered = sorted(key for key, value in (reading or {}).items() if value is not None)
    if not offered:
        return "no", "this system shows neither; virtual machines rarely do"
    is_whole = {"cpu_clock_mhz", "temperature_c"} <= set(offered)
    return ("yes" if is_whole else "partly"), ", ".join(offered)


def _targets() -> list[Capability]:
    devices = _devices()
    return [_target(target, devices) for target in read_targets(BUNDLED).values()]


def _target(target: Any, devices: list[Device]) -> Capability:  # noqa: ANN401 - a Target
    reasons = [device_problem(device, target, this_cpu=identify_cpu()) for device in devices]
    reason = next((reason for reason in reasons if reason is None), reasons[-1] if reasons else "no device")
    if reason is None:
        return Capability("can be judged for", target.name, "yes", f"{target.title}: a record made here can pass")
    return Capability("can be judged for", target.name, "no", f"{reason}; a record made elsewhere can be gated here")


def _devices() -> list[Device]:
    found = []
    for kind in DEVICE_KINDS.values():
        try:
            found.append(identify_device(kind.provider))
        except HavocError:
            if kind.is_host:
                raise
    return found


def measured_device() -> Device | None:
    """The device that `bench` measures here by default, with its name in records; None without ONNX Runtime."""
    try:
        return _devices()[-1]
    except HavocError:
        return None


def _sandbox() -> Capability:
    """Accuracy of code needs to run the model's code; the other domains need nothing."""
    from ..adapt.sandbox.process import enforced

    try:
        layers = enforced(allow_unconfined=False)
    except (HavocError, OSError) as error:
        return Capability("can measure", "accuracy/code", "no", str(error))
    missing = [name.replace("_", " ") for name, is_on in layers.items() if not is_on]
    if missing:
        return Capability(
            "can measure", "accuracy/code", "partly", f"generated code is confined except for {', '.join(missing)}"
        )
    return Capability("can measure", "accuracy/code", "yes", f"generated code is confined: {', '.join(layers)}")


def _tool() -> Capability:
    tool = identify_tool()
    if tool.git_commit is None:
        return Capability("installed", "havoc-core", "yes", tool.version)
    changed = ", with uncommitted changes" if tool.is_git_dirty else ""
    return Capability(
        "installed", "havoc-core", "yes", f"{tool.version} from a checkout of {tool.git_commit[:12]}{changed}"
    )


def _packages() -> list[Capability]:
    return [
        _extra("edge", "bench, verify, eval, generate", EDGE_PACKAGES),
        _extra("lab", "train, search, export", LAB_PACKAGES),
        _extra("report", "html, markdown, junit, badge", REPORT_PACKAGES),
    ]


def _extra(name: str, verbs: str, packages: tuple[str, ...]) -> Capability:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return Capability("installed", f"{name}: {verbs}", "yes", "all packages are installed")
    reason = f"missing {', '.join(missing)}: pip install 'havoc-core[{name}]'"
    return Capability("installed", f"{name}: {verbs}", "no", reason)
