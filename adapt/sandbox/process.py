"""Run code that a model wrote in a confined process, and return plain values to judge it by.

    parent (here)                  server, one per job (confined.py)     child, one per job
    Job -> JSON with a nonce   ->  fork                              ->  run code, setup, calls
    nonce, exact types checked <-  passes the bytes on               <-  nonce + tagged plain values (plain.py)

The parent makes the verdict: it compares the returned values with expected values that the child never sees. An exit
code, printed text, an object with a false `__eq__` or an exception in `atexit` is not a value, so it is never right.
Several layers limit what the code may do (confinement.py). `enforced()` tries which of them work on this machine.
Without both Landlock and seccomp, nothing is run.

A confined process stays alive and forks a server per job, because a start of Python takes more than ten times as long
as a fork. Code runs with a fixed hash seed and a fixed `random`, so a job has one outcome, and outcomes are cached.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ...children import start_process
from ...errors import HavocError
from . import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_REQUEST_BYTES = 1 << 20
_MAX_REMEMBERED = 8192
_MAX_REMEMBERED_BYTES = 4096
_START_S = 60.0
_GRACE_S = 10.0
_MAX_ATTEMPTS = 2

_BOOTSTRAP = """
import sys, types
room = types.ModuleType("room")
room.__path__ = [sys.argv[1]]
sys.modules["room"] = room
from room.confined import main
main()
"""
"""Makes a package of this folder without adding it to sys.path, where its modules could shadow others."""


@dataclass(frozen=True, slots=True)
class Job:
    """Code to run, then `setup`, then the `calls`: Python expressions whose values are returned.

    A job may use `patience` times the CPU and wall time of the sandbox's limits.
    """

    setup: str
    code: str
    calls: tuple[str, ...]
    patience: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a job.

    "ok": `values` has one fresh plain built-in per call (a result that is not plain is a `plain.Opaque`). "error": the
    code did not compile, raised an exception, ended the process, or its output was not valid. "timeout": it used up its
    time. "infra": the sandbox failed, which says nothing about the code.
    """

    status: Literal["ok", "error", "timeout", "infra"]
    values: tuple[Any, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """The limits of one job. The kernel counts CPU time in whole seconds; wall time also ends a job that sleeps."""

    cpu_s: int = 1
    wall_s: float = 3.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 64 << 10

    def for_patience(self, times: int) -> SandboxLimits:
        """The same limits with `times` as much time."""
        return replace(self, cpu_s=self.cpu_s * times, wall_s=self.wall_s * times)


def run_functions(jobs: Sequence[Job], *, allow_unconfined: bool = False) -> list[Outcome]:
    """Run each job in its own confined child; one outcome per job, in order.

    Raises `HavocError` if neither Landlock nor seccomp is available, unless `allow_unconfined`.
    """
    return _shared_sandbox(os.getpid(), allow_unconfined).run(jobs) if jobs else []


def enforced(*, allow_unconfined: bool = True) -> dict[str, bool]:
    """What the sandbox refuses on this machine, tried from inside.

    Keys: files, writes, network, processes, signals, memory (what code is denied); landlock, seccomp, privileges
    (layers in force).
    """
    return dict(_shared_sandbox(os.getpid(), allow_unconfined).enforced)


@functools.lru_cache(maxsize=4)
def _shared_sandbox(pid: int, allow_unconfined: bool) -> Sandbox:  # noqa: ARG001 - a forked copy of this process needs its own
    sandbox = Sandbox(allow_unconfined=allow_unconfined)
    atexit.register(sandbox.close)
    return sandbox


class Sandbox:
    """A few confined processes and a cache of their outcomes. Close it or use it in `with`; threads may share it."""

    def __init__(
        self, *, limits: SandboxLimits | None = None, allow_unconfined: bool = False, num_processes: int | None = None
    ) -> None:
        self.limits = limits or SandboxLimits()
        self._allow_unconfined = allow_unconfined
        self._num_processes = num_processes or min(4, os.cpu_count() or 1)
        self._processes: list[_ConfinedProcess] = []
        self._remembered: OrderedDict[Job, Outcome] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def enforced(self) -> dict[str, bool]:
        """What the code may not do, tried from inside at the start of the confined process."""
        with self._lock:
            if not self._processes:
                self._processes.append(self._start())
            return dict(self._processes[0].enforced)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The confined processes that are alive, for a test that kills them."""
        return tuple(process.popen.pid for process in self._processes)

    def close(self) -> None:
        """End the confined processes; a later call starts new ones."""
        while self._processes:
            self._processes.pop().end()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run the jobs, equal jobs only once; one outcome per job, in order."""
        with self._lock:
            found = {job: self._remembered[job] for job in jobs if job in self._remembered}
            self._work(deque(_Run(job) for job in dict.fromkeys(jobs) if job not in found), found)
            return [found[job] for job in jobs]

    def _work(self, queue: deque[_Run], found: dict[Job, Outcome]) -> None:
        busy: dict[_ConfinedProcess, _Run] = {}
        try:
            while queue or busy:
                while queue and len(busy) < self._num_processes:
                    self._send(queue.popleft(), busy, queue, found)
                for process in _answering(busy):
                    run = busy.pop(process)
                    self._take(run, self._answer(process, run), queue, found)
        finally:  # interrupted: a late answer would be taken for the answer to another job
            for process in busy:
                self._drop(process)

    def _send(
        self, run: _Run, busy: dict[_ConfinedProcess, _Run], queue: deque[_Run], found: dict[Job, Outcome]
    ) -> None:
        run.nonce = secrets.token_hex(16)
        limits = self.limits.for_patience(run.job.patience)
        request = {
            "setup": run.job.setup, "code": run.job.code, "calls": run.job.calls, "nonce": run.nonce,
            "cpu_s": limits.cpu_s, "wall_s": limits.wall_s,
            "memory_bytes": limits.memory_bytes, "output_bytes": limits.output_bytes,
        }  # fmt: skip
        data = json.dumps(request).encode()
        if len(data) > _MAX_REQUEST_BYTES:
            found[run.job] = Outcome("error", reason=f"the code is larger than {_MAX_REQUEST_BYTES} bytes")
            return
        process = next((idle for idle in self._processes if idle not in busy), None)
        if process is None:
            process = self._start()
            self._processes.append(process)
        try:
            process.send(data)
        except OSError as error:
            self._drop(process)
            self._take(run, Outcome("infra", reason=f"the confined process has ended ({error})"), queue, found)
            return
        run.deadline = time.monotonic() + limits.wall_s + _GRACE_S
        busy[process] = run

    def _answer(self, process: _ConfinedProcess, run: _Run) -> Outcome:
        try:
            return _read_reply(process.receive(), run, self.limits.for_patience(run.job.patience))
        except (OSError, EOFError, ValueError, KeyError) as error:
            self._drop(process)
            return Outcome("infra", reason=f"the confined process failed ({error})")

    def _take(self, run: _Run, outcome: Outcome, queue: deque[_Run], found: dict[Job, Outcome]) -> None:
        run.num_attempts += 1
        if outcome.status == "infra" and run.num_attempts < _MAX_ATTEMPTS:
            queue.append(run)
            return
        found[run.job] = outcome
        if run.is_repeatable and outcome.status != "infra":
            self._remembered[run.job] = outcome
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)

    def _start(self) -> _ConfinedProcess:
        process = _ConfinedProcess()
        if not (self._allow_unconfined or process.enforced["landlock"] or process.enforced["seccomp"]):
            process.end()
            raise HavocError(
                "code from a model is not run here: this kernel has neither Landlock nor seccomp to confine it; "
                "use Linux 5.13 or newer on x86_64 or aarch64"
            )
        return process

    def _drop(self, process: _ConfinedProcess) -> None:
        process.end()
        with contextlib.suppress(ValueError):
            self._processes.remove(process)


@dataclass(slots=True)
class _Run:
    """One attempt to run a job."""

    job: Job
    nonce: str = ""
    deadline: float = 0.0
    num_attempts: int = 0
    is_repeatable: bool = True


def _answering(busy: dict[_ConfinedProcess, _Run]) -> list[_ConfinedProcess]:
    """Wait until a process has something to read or is past its deadline; return those."""
    timeout_s = max(0.0, min((run.deadline for run in busy.values()), default=0.0) - time.monotonic())
    with selectors.DefaultSelector() as selector:
        for process in busy:
            selector.register(process.socket, selectors.EVENT_READ, process)
        ready = [key.data for key, _ in selector.select(timeout_s)]
    return ready or [process for process, run in busy.items() if run.deadline <= time.monotonic()]


def _read_reply(reply: bytes, run: _Run, limits: SandboxLimits) -> Outcome:
    head, _, written = reply.partition(b"\n")
    end, code, cpu_s = (json.loads(head)[key] for key in ("end", "code", "cpu_s"))
    if end == "wall":
        run.is_repeatable = False
        return Outcome("timeout", reason=f"no result within {limits.wall_s:g} s")
    if end == "flood":
        return Outcome("error", reason=f"wrote more than {limits.output_bytes} bytes")
    if end == "infra":
        return Outcome("infra", reason=f"no child process could be started ({os.strerror(code)})")
    if written:
        run.is_repeatable = len(written) <= _MAX_REMEMBERED_BYTES
        return _read_message(written, run)
    if code == -signal.SIGXCPU or cpu_s >= limits.cpu_s:
        return Outcome("timeout", reason=f"used more than {limits.cpu_s} s of CPU time")
    if code == -signal.SIGKILL:
        return Outcome("infra", reason="the child process was killed from outside, probably because of its memory")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Outcome("error", reason=f"ended without a result ({how})")


def _read_message(written: bytes, run: _Run) -> Outcome:
    nonce = run.nonce.encode()
    try:
        if not written.startswith(nonce):
            raise plain.NotPlainError("it does not have this run's nonce")
        message = json.loads(written[len(nonce) :])
        if message["status"] == "error":
            return Outcome("error", reason=_printable(str(message["reason"])))
        values = tuple(plain.decode(text) for text in message["values"])
        if message["status"] != "ok" or len(values) != len(run.job.calls):
            raise plain.NotPlainError("it is incomplete")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return Outcome("error", reason=f"its output is not a result: {_printable(str(error))}")
    return Outcome("ok", values)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:300])


class _ConfinedProcess:
    """The running confined.py and the socket to it."""

    def __init__(self) -> None:
        if not hasattr(os, "fork"):
            raise HavocError("code from a model is not run here: this system cannot fork a confined process; use Linux")
        self._owner = os.getpid()
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(_START_S)
        with theirs, tempfile.TemporaryFile() as complaints:
            command = [sys.executable, "-P", "-s", "-S", "-c", _BOOTSTRAP, str(Path(__file__).parent)]
            self.popen = start_process(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # the whole environment, so -E (which would ignore it) is not needed
                start_new_session=True,
            )
            theirs.close()
            try:
                self.enforced: dict[str, bool] = json.loads(self.receive())
            except BaseException as error:
                self.end()
                if not isinstance(error, (OSError, EOFError, ValueError)):
                    raise
                complaints.seek(0)
                last_line = (complaints.read().decode(errors="replace").strip().splitlines() or [str(error)])[-1]
                raise HavocError(f"the confined process for model-written code did not start: {last_line}") from error
        self.socket.settimeout(_GRACE_S)

    def send(self, data: bytes) -> None:
        self.socket.sendall(len(data).to_bytes(4, "big") + data)

    def receive(self) -> bytes:
        return self._receive_exactly(int.from_bytes(self._receive_exactly(4), "big"))

    def _receive_exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = self.socket.recv(num_bytes - len(data))
            if not piece:
                raise EOFError("it ended")
            data += piece
        return data

    def end(self) -> None:
        """Kill it; in a forked copy of the process that owns it, only close the socket."""
        self.socket.close()
        if os.getpid() == self._owner:
            self.popen.kill()
            self.popen.wait()
