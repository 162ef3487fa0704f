"""The kinds of device that HAVOC runs on: one entry each says what export, the runtime, bench and gate ask of it.

A new kind is an entry here, and how it is identified in `bench.device`: see docs/extending.md. No ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One kind of device, `name` in records and targets.

    `provider` is ONNX Runtime's execution provider for it, `tensors` the runtime's name for the place of its tensors,
    `provider_options` the default options of a session. `is_host` says that the model runs on the machine's own CPU:
    then peak memory is the process's RSS, CPU time counts, and clocks and energy are those of the machine. `has_nvml`
    says that NVML reads its memory, clocks and energy; `captures_steps` that a step can be captured as a CUDA graph.
    `runtime_bytes` is the memory that the runtime itself uses on it, for estimates only.
    """

    name: str
    provider: str
    tensors: str
    provider_options: Mapping[str, str] = field(default_factory=dict)
    is_host: bool = False
    has_nvml: bool = False
    captures_steps: bool = False
    runtime_bytes: int


DEVICE_KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind(
            name="cpu",
            provider=CPU_PROVIDER,
            tensors="cpu",
            is_host=True,
            # Python, ONNX Runtime and a session: of the 95 MB that nano takes, 4 are its weights and activations
            runtime_bytes=90_000_000,
        ),
        DeviceKind(
            name="cuda",
            provider=CUDA_PROVIDER,
            tensors="cuda",
            provider_options={
                "arena_extend_strategy": "kSameAsRequested",  # the default doubles and never gives back
                "use_tf32": "0",  # a product that rounds its factors to 10 bits is not fp32
            },
            has_nvml=True,
            captures_steps=True,
            runtime_bytes=300_000_000,  # measured range 287..667 MB (pytorch pull request 86509)
        ),
    )
}


def kind_of_provider(provider: str) -> DeviceKind:
    """The kind of device that an execution provider runs on; an unknown provider is a `HavocError`."""
    for kind in DEVICE_KINDS.values():
        if kind.provider == provider:
            return kind
    known = " or ".join(kind.provider for kind in DEVICE_KINDS.values())
    raise HavocError(f"unknown provider {provider!r}: choose {known}")
