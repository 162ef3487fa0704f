"""The program inside the confined process: fork two processes per job, one to serve it, one to run the code.

`process.py` starts it with an empty environment and one socket as standard input. It loads the parts of the standard
library that small functions use, gives up its rights (`confinement.py`), and then serves requests one after another:

    request   4 bytes length, JSON {setup, code, calls, nonce, cpu_s, wall_s, memory_bytes, output_bytes}
    reply     4 bytes length, JSON line {end, code, cpu_s}, then the child's bytes unchanged
              end: "exit" (the child ended), "wall" (it was stopped), "flood" (it wrote too much), "infra" (no child)

    confined process            never reads a request or a result, so its memory contains none
      server, one per job       reads the request, forks the child, passes on its output, ends
        child                   runs the code, with a copy of that server's memory

The child's only open descriptor besides /dev/null is its own pipe, and its memory has no expected values: requests and
results of earlier jobs were in their servers, which have ended. So the code can only influence which plain values
arrive, or whether any arrive.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import sys
import time
import types
import warnings
from typing import Any, NoReturn

from . import confinement, plain

PRELOADED = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "builtins", "calendar", "cmath", "codecs",
    "collections.abc", "colorsys", "contextlib", "copy", "copyreg", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "enum", "fractions", "functools", "gc", "graphlib", "hashlib", "heapq", "hmac", "html", "io",
    "inspect", "itertools", "json", "keyword", "locale", "logging", "math", "mmap", "numbers", "operator", "os",
    "pprint", "queue", "random", "re", "reprlib", "secrets", "select", "statistics", "string", "stringprep",
    "struct", "sys", "textwrap", "threading", "time", "timeit", "traceback", "types", "typing", "unicodedata",
    "urllib.parse", "uuid", "warnings", "weakref", "zlib", "zoneinfo", "_strptime", "encodings.ascii",
    "encodings.latin_1", "encodings.utf_16", "encodings.utf_32", "encodings.idna", "encodings.hex_codec",
    "encodings.rot_13",
    "encodings.punycode",
)  # fmt: skip
"""Modules the code may import: a confined process cannot read files, so these are loaded before."""

_CONTROL = 3
_RESULT = 3  # in a child its pipe replaces the socket, which it must not have
_SELF_TEST_BYTES = 256 << 20
_LENGTH_BYTES = 4


def main() -> None:
    """Serve each request in its own process, until the socket closes."""
    null = _settle()
    layers = confinement.confine_parent()
    layers |= _self_test()
    os.dup2(null, 2)
    os.close(null)
    _send(json.dumps(layers).encode())
    while _is_served():
        pass


def _is_served() -> bool:
    """Serve one request in a fresh fork; False if the socket has closed or the server could not do its work.

    The next server is forked before its request arrives, so a job does not wait for the fork.
    """
    pid = os.fork()
    if pid == 0:
        _be_server()
    _, status = os.waitpid(pid, 0)
    return status == 0


def _be_server() -> NoReturn:
    try:
        confinement.end_with_parent()
        if request := _receive():
            _send(_serve(json.loads(request)))
            os._exit(0)
    finally:
        os._exit(1)


def _settle() -> int:
    """Load the modules, move the socket to its descriptor, put /dev/null in its place; return one more /dev/null."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.dup2(0, _CONTROL)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.environ.clear()
    sys.argv[:] = [""]
    sys.path.clear()
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()
    return null


def _self_test() -> dict[str, bool]:
    """Return what a confined child may not do, tried in such a child."""

    def attempt() -> bytes:
        is_filtered = confinement.confine_child(cpu_s=1, memory_bytes=_SELF_TEST_BYTES)
        return json.dumps(confinement.probe(is_filtered=is_filtered, memory_bytes=_SELF_TEST_BYTES)).encode()

    pid, pipe = _fork_child(attempt)
    written, _ = _read_until(pipe, time.monotonic() + 5, num_bytes=1 << 16)
    _reap(pid)
    return dict(json.loads(written))


def _serve(request: dict[str, Any]) -> bytes:
    try:
        pid, pipe = _fork_child(lambda: _run_confined(request))
    except OSError as error:
        return json.dumps({"end": "infra", "code": error.errno, "cpu_s": 0.0}).encode() + b"\n"
    deadline = time.monotonic() + request["wall_s"]
    written, end = _read_until(pipe, deadline, num_bytes=request["output_bytes"])
    if end == "exit" and not written and not _has_ended(pid, deadline):
        end = "wall"  # it closed its pipe and continued
    code, cpu_s = _reap(pid)
    return json.dumps({"end": end, "code": code, "cpu_s": cpu_s}).encode() + b"\n" + written


def _fork_child(work: Any) -> tuple[int, int]:  # noqa: ANN401 - a function that returns bytes
    """Start a child that does `work`, writes the returned bytes and ends; return its pid and the pipe to read."""
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if pid == 0:
        _be_child(work, writing)
    os.close(writing)
    return pid, reading


def _be_child(work: Any, writing: int) -> NoReturn:  # noqa: ANN401 - as above
    try:
        os.setpgid(0, 0)
        os.dup2(writing, _RESULT)
        os.closerange(_RESULT + 1, 64)
        left = memoryview(work())
        while left:
            left = left[os.write(_RESULT, left) :]
    finally:
        os._exit(0)  # no clean-up: atexit functions and finalisers of the code would run in it


def _run_confined(request: dict[str, Any]) -> bytes:
    confinement.confine_child(cpu_s=request["cpu_s"], memory_bytes=request["memory_bytes"])
    random.seed(0)
    return _run(request).encode()


def _run(request: dict[str, Any]) -> str:
    """Run the code, then the setup (which may use the code), then each call; write its values before the next call."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    values: list[str] = []
    num_chars_left: int = request["output_bytes"] // 2  # quotes are escaped once more later
    status, reason = "ok", ""
    try:
        for part in ("code", "setup"):
            exec(compile(request[part], f"<{part}>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        for call in request["calls"]:
            result = eval(compile(call, "<call>", "eval", dont_inherit=True), module.__dict__)  # noqa: S307
            values.append(plain.encode(result, max_chars=num_chars_left))
            num_chars_left -= len(values[-1])
    except BaseException as error:  # noqa: BLE001 - whatever the code raises, SystemExit too, is its result
        status, reason = "error", _describe(error)
    return str(request["nonce"]) + json.dumps({"status": status, "reason": reason, "values": values})


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:200]}"
    except BaseException:  # noqa: BLE001 - the exception belongs to the code, and so does its __str__
        return "an exception that cannot be described"


def _read_until(pipe: int, deadline: float, *, num_bytes: int) -> tuple[bytes, str]:
    """Read the pipe to its end, to the deadline or to more than `num_bytes`; close it."""
    written = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    try:
        while len(written) <= num_bytes:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return written, "wall"
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return written, "exit"
            written += piece
        return written[:num_bytes], "flood"
    finally:
        os.close(pipe)


def _has_ended(pid: int, deadline: float) -> bool:
    """Wait for the child to end by itself, so that its end can be distinguished from our own kill."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _reap(pid: int) -> tuple[int, float]:
    """End the child and everything it started; return its exit code (negative: signal) and its CPU seconds."""
    for stop in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            stop(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _receive() -> bytes:
    """Read one request, or nothing if the socket has closed."""
    header = _read_exactly(_LENGTH_BYTES)
    return _read_exactly(int.from_bytes(header, "big")) if header else b""


def _read_exactly(num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        piece = os.read(_CONTROL, num_bytes - len(data))
        if not piece:
            return b""
        data += piece
    return data


def _send(data: bytes) -> None:
    left = memoryview(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    while left:
        left = left[os.write(_CONTROL, left) :]
