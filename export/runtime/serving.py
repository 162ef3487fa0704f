"""The child's side of `child`: one JSON request in, JSON lines out, and the end when the parent ends. No torch."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import HavocError, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Mapping

Emit = Callable[[dict[str, Any]], None]
Task = Callable[[dict[str, Any], Emit], dict[str, Any]]


def serve(tasks: Mapping[str, Task]) -> int:
    """Read the request, do its task, write the result; every failure becomes one error line. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers

    def emit(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event, allow_nan=False).encode() + b"\n")
        answers.flush()

    request = json.loads(_read_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        emit({"event": "result", "result": tasks[request["task"]](request, emit)})
    except HavocError as error:
        emit({"event": "error", "type": type(error).__name__, "message": str(error)})
        return error.exit_code
    except MemoryError:
        emit({"event": "error", "type": "MeasurementError", "message": "memory ran out while the model ran"})
        return MeasurementError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _read_line() -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit(2)
        data += piece
    return data


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(3)
