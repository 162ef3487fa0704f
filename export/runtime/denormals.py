"""While a graph runs, numbers below the normal range of floats count as zero.

A softmax over scores that a mask hides gives such numbers, and processors take more than ten times as long for them:
attention over 512 tokens took twice as long (docs/log.md). ONNX Runtime sets this mode for its own threads. The thread
that calls it would keep the mode, or never get it if another session was opened first, so it is set here for a call.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

_X86 = (ctypes.c_uint32 * 8, 7, 0x8040)
"""C's fenv_t in words, the place of MXCSR in it, its bits for flush-to-zero and denormals-are-zero."""
_ARM = (ctypes.c_uint32 * 2, 0, 1 << 24)
"""The same of AArch64: FPCR and its bit FZ."""


class FlushedDenormals:
    """A context in which this thread counts denormal numbers as zero; afterwards all is as it was before.

    Only Linux on x86-64 and AArch64; elsewhere it does nothing.
    """

    def __enter__(self) -> Self:
        if _LAYOUT is not None:
            words, place, bits = _LAYOUT
            self._state = words()
            _LIBRARY.fegetenv(self._state)
            self._before = self._state[place]
            self._state[place] |= bits
            _LIBRARY.fesetenv(self._state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _LAYOUT is not None:
            self._state[_LAYOUT[1]] = self._before
            _LIBRARY.fesetenv(self._state)


def _layout() -> tuple[type[ctypes.Array[ctypes.c_uint32]], int, int] | None:
    if sys.platform != "linux" or not hasattr(_LIBRARY, "fesetenv"):
        return None
    return {"x86_64": _X86, "aarch64": _ARM}.get(platform.machine())


_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_LAYOUT = _layout()
