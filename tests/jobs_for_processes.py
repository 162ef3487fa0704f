"""Jobs that tests/test_processes.py has done in worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from havoc_core.errors import HavocError, IdentityError


def square(request: dict[str, Any], progress: Any) -> dict[str, Any]:
    time.sleep(request.get("delay_s", 0))
    with progress.stage("square", 2) as stage:
        with progress.stage("inner", 7) as inner:
            inner.advance(7, note="beneath")
        stage.advance(2, note=f"of {request['number']}")
    print("what a job prints is no answer")
    return {
        "square": request["number"] ** 2,
        "pid": os.getpid(),
        "session": os.getsid(0),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def refuse(request: dict[str, Any], progress: Any) -> None:
    if request["number"] == 1:
        raise IdentityError("this is another device")
    if request["number"] == 2:
        raise HavocError("two is refused")


def fail(request: dict[str, Any], progress: Any) -> None:
    raise ZeroDivisionError("a defect")


def die(request: dict[str, Any], progress: Any) -> None:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), request["signal"])


def sleep(request: dict[str, Any], progress: Any) -> None:
    Path(request["folder"], str(os.getpid())).touch()
    signal.pause()
