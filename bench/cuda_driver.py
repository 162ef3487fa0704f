"""The CUDA driver API as the second witness of a card's identity, through ctypes: no toolkit, no context needed."""

from __future__ import annotations

import ctypes
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .nvml import loaded_library

if TYPE_CHECKING:
    from pathlib import Path

_SUCCESS = 0
_SM_COUNT, _BUS_WIDTH, _CC_MAJOR, _CC_MINOR = 16, 37, 75, 76


@dataclass(frozen=True, kw_only=True)
class CudaCard:
    """What the CUDA driver reports about the first visible card."""

    name: str
    uuid: str
    compute_capability: str
    num_sms: int
    memory_total_bytes: int
    bus_width_bits: int
    driver_version: str
    library_file: Path | None


def open_cuda_card() -> CudaCard | str:
    """Ask the CUDA driver for its first visible card; if there is none, return the reason as a sentence."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "CUDA: the driver library is not installed"
    try:
        return _first_card(library)
    except _CudaError as error:
        return f"CUDA: {error}"
    except AttributeError as error:
        return f"CUDA: the driver library is incomplete ({error})"


class _CudaError(Exception):
    """A call of the driver API that did not succeed."""


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(library, function)(*arguments)
    if code != _SUCCESS:
        raise _CudaError(f"{function} failed with code {code}")


def _first_card(library: ctypes.CDLL) -> CudaCard:
    _call(library, "cuInit", 0)
    device, version = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), 0)
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, len(name), device)
    raw_uuid = ctypes.create_string_buffer(16)
    _call(library, "cuDeviceGetUuid", raw_uuid, device)
    total = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    return CudaCard(
        name=name.value.decode(errors="replace"),
        uuid=f"GPU-{uuid.UUID(bytes=raw_uuid.raw)}",
        compute_capability=f"{_attribute(library, device, _CC_MAJOR)}.{_attribute(library, device, _CC_MINOR)}",
        num_sms=_attribute(library, device, _SM_COUNT),
        memory_total_bytes=total.value,
        bus_width_bits=_attribute(library, device, _BUS_WIDTH),
        driver_version=f"{version.value // 1000}.{version.value % 1000 // 10}",
        library_file=loaded_library("libcuda.so"),
    )


def _attribute(library: ctypes.CDLL, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    _call(library, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value
