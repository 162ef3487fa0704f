"""A process's memory on graphics cards as Windows counts it, because its driver model (WDDM) does not give it to NVML.

The performance counters "GPU Process Memory" have one instance per process and adapter, `pid_1234_luid_0x..._phys_0`.
Dedicated usage is on the card; shared usage is system memory that the card can read, to which a driver moves what does
not fit. They are read through pdh.dll (learn.microsoft.com: PdhGetFormattedCounterArrayW), only on Windows.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from ctypes import POINTER, byref, c_int64, c_uint32, c_void_p, c_wchar_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGE, _MORE_DATA = 0x400, 0x800007D2
_COUNTERS = (r"\GPU Process Memory(*)\Dedicated Usage", r"\GPU Process Memory(*)\Shared Usage")


class _Value(ctypes.Structure):
    """PDH_FMT_COUNTERVALUE as a large integer."""

    _fields_ = (("status", c_uint32), ("large", c_int64))


class _Item(ctypes.Structure):
    """PDH_FMT_COUNTERVALUE_ITEM_W: an instance's name and its value."""

    _fields_ = (("name", c_wchar_p), ("value", _Value))


@dataclass(frozen=True)
class ProcessCounters:
    """An open query of both counters."""

    library: Any
    query: c_void_p
    counters: tuple[c_void_p, ...]

    def usage_bytes(self, pid: int) -> tuple[int, int] | None:
        """Dedicated and shared bytes of a process, over all adapters; None if Windows lists it on no adapter."""
        if self.library.PdhCollectQueryData(self.query):
            return None
        found = [self._of(counter, f"pid_{pid}_") for counter in self.counters]
        dedicated, shared = found
        return None if dedicated is None else (dedicated, shared or 0)

    def _of(self, counter: c_void_p, prefix: str) -> int | None:
        num_bytes, num_items = c_uint32(), c_uint32()
        ask = self.library.PdhGetFormattedCounterArrayW
        if ask(counter, _LARGE, byref(num_bytes), byref(num_items), None) & 0xFFFFFFFF != _MORE_DATA:
            return None
        room = ctypes.create_string_buffer(num_bytes.value)
        if ask(counter, _LARGE, byref(num_bytes), byref(num_items), room):
            return None
        items = ctypes.cast(room, POINTER(_Item))[: num_items.value]
        values = [item.value.large for item in items if item.name.startswith(prefix) and not item.value.status]
        return sum(values) if values else None


@contextmanager
def open_counters(library: Any = None) -> Iterator[ProcessCounters | None]:  # noqa: ANN401 - a loaded library
    """Open the counters, and close them at the end; None off Windows, or if Windows has no such counters."""
    if library is None and sys.platform != "win32":
        yield None
        return
    library = library or ctypes.CDLL("pdh.dll")
    query = c_void_p()
    if library.PdhOpenQueryW(None, None, byref(query)):
        yield None
        return
    try:
        counters = tuple(c_void_p() for _ in _COUNTERS)
        failed = [
            path
            for path, counter in zip(_COUNTERS, counters, strict=True)
            if library.PdhAddEnglishCounterW(query, path, None, byref(counter))
        ]
        yield None if failed else ProcessCounters(library, query, counters)
    finally:
        library.PdhCloseQuery(query)
