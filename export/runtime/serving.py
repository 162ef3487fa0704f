"""The child's side of `child`: one request in, JSON lines out, and the end when the parent ends. No torch."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import HavocError, MeasurementError
from ...messages import Answer, Asked, ChildJob, Told, plain, read

if TYPE_CHECKING:
    from collections.abc import Sequence

Served = tuple[ChildJob[Any, Any, Any], Callable[[Any, Callable[[Any], None]], Any]]


def served(job: ChildJob[Asked, Told, Answer], do: Callable[[Asked, Callable[[Told], None]], Answer]) -> Served:
    """Return a job with its function, which gets the request and a function to send messages."""
    return job, do


def serve(jobs: Sequence[Served]) -> int:
    """Read the request, do its job, write the result; every failure becomes one error line. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's prints must not mix with the answers

    def emit(**line: object) -> None:
        answers.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        answers.flush()

    line = json.loads(_read_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job, do = {job.name: (job, do) for job, do in jobs}[line["job"]]
    request = read(job.asked, line["request"], "request")
    try:
        emit(result=plain(do(request, lambda told: emit(told=plain(told)))))
    except HavocError as error:
        emit(error=str(error), type=type(error).__name__)
        return error.exit_code
    except MemoryError:
        emit(error="memory ran out while the model ran", type="MeasurementError")
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
