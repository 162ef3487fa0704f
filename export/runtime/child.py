"""One fresh child process: it gets the request of a `ChildJob`; the parent sleeps while it listens, and always ends it.

The child is a module that ends in `serving.serve`: `havoc_core.bench.worker` measures, `havoc_core.bench.accuracy`
scores, `foreign` runs an artifact's graphs for other code. It answers with one JSON document per line: marks and
progress during the work, then its result or its error. Its standard input stays open: if this process dies, the child
ends too.
"""

from __future__ import annotations

import functools
import json
import os
import site
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ...children import start_process
from ...errors import HavocError, IdentityError, MeasurementError
from ...messages import Answer, Asked, ChildJob, Told, plain, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ERRORS: dict[str, type[HavocError]] = {
    "HavocError": HavocError,
    "IdentityError": IdentityError,
    "MeasurementError": MeasurementError,
}
ENVIRONMENT_DEFAULTS = {"CUDA_MODULE_LOADING": "LAZY"}
_PACKAGE = Path(__file__).parents[2]
_ELSEWHERE = """
import importlib.util, runpy, sys
name, folder, module = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules[name] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs a module of this package in an interpreter that has another one of that name, or none."""


def run_worker(
    job: ChildJob[Asked, Told, Answer],
    request: Asked,
    *,
    timeout_s: float,
    on_start: Callable[[int], None] | None = None,
    listen: Callable[[Told], None] | None = None,
    python: Path | None = None,
) -> Answer:
    """Run one job in a fresh process and return its result.

    `python` is another interpreter; it runs this package's code even if it has another HAVOC installed.

    `on_start` gets the process id before the work begins, `listen` gets the child's messages during the work. An error
    of the child is raised here as the same class; a child that dies or exceeds `timeout_s` is a `MeasurementError`.
    """
    command = [sys.executable, *isolation(), "-m", job.module]
    if python is not None:
        command = [str(python), *isolation(), "-c", _ELSEWHERE, __name__.partition(".")[0], str(_PACKAGE), job.module]
    with tempfile.TemporaryFile() as complaints, started(command, complaints) as process:
        if on_start is not None:
            on_start(process.pid)
        expired = threading.Event()
        timer = threading.Timer(timeout_s, _end, (process, expired))
        timer.daemon = True
        timer.start()
        try:
            result = _converse(process, job, request, listen)
        finally:
            timer.cancel()
        if result is None:
            process.wait()
            raise MeasurementError(death(process.returncode, timeout_s if expired.is_set() else None, complaints))
        return result


@contextmanager
def started(command: Sequence[str], complaints: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child with pipes to its standard input and output; it does not outlive the block."""
    process = start_process(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env={**ENVIRONMENT_DEFAULTS, **os.environ},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)


@functools.cache
def isolation() -> tuple[str, ...]:
    """Options with which no variable and no file of the user loads code into the child.

    If a package is installed only for the user, the user's files must stay visible.
    """
    home = site.getusersitepackages() if site.ENABLE_USER_SITE else None
    is_of_user = home is not None and Path(__file__).is_relative_to(home)
    return ("-E", "-P") if is_of_user else ("-I",)


def _end(process: subprocess.Popen[bytes], expired: threading.Event) -> None:
    expired.set()
    process.kill()


def _close(pipe: Any) -> None:  # noqa: ANN401 - a pipe whose buffered bytes are no longer needed
    try:
        pipe.close()
    except OSError:
        return


def _converse(
    process: subprocess.Popen[bytes],
    job: ChildJob[Asked, Told, Answer],
    request: Asked,
    listen: Callable[[Told], None] | None,
) -> Answer | None:
    """Send the request and listen; the result, or None when the child ended without one."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(json.dumps({"job": job.name, "request": plain(request)}).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return None
    for line in process.stdout:
        match json.loads(line):
            case {"result": result}:
                return read(job.answer, result, f"result of {job.name}")
            case {"error": message, "type": kind}:
                raise _ERRORS.get(kind, MeasurementError)(message)
            case {"told": told} if listen is not None:
                listen(read(job.told, told))
    return None


def death(return_code: int, timeout_s: float | None, complaints: IO[bytes]) -> str:
    """Say in one line how a child ended without a result; `timeout_s` if it was ended because it took longer."""
    if timeout_s is not None:
        return f"the process that runs the model gave no result within {timeout_s:.0f} s and was ended"
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    last = f": {lines[-1][:300]}" if lines else ""
    if return_code == -9:  # noqa: PLR2004 - SIGKILL, whose usual sender is the kernel when memory runs out
        return "the process that runs the model was killed (signal 9): memory may have run out; free some and try again"
    how = f"by signal {-return_code}" if return_code < 0 else f"with code {return_code}"
    return f"the process that runs the model ended {how} without a result{last}"
