"""Run independent jobs in worker processes, which are started once, get job after job, and are always ended.

    with Workers(2) as workers:
        for result in workers.run(".adapt.commands:train_job", requests, listen=stage.advance):
            ...                                             # in the order of the requests, whichever is ready first

A worker is `python -m havoc_core.processes`. It reads one JSON request per line, calls the named function with it, and
answers with JSON lines: progress during the work, then the result or the error. A `HavocError` keeps its class and so
its exit code. If this process dies in any way, the worker's standard input closes and the worker ends. Ctrl-C stops
only this process, which ends its workers; results that a job saved before are available to the next run.

Each worker is a session of its own, because Linux divides a core between sessions, not between processes (autogroup,
sched(7)): beside another busy program each worker then gets half of a core. In one session, all workers together would
get that half. Ctrl-Z therefore stops this process only; a worker stops when its job is done.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from . import cores, errors
from .children import start_process
from .errors import HavocError, MeasurementError
from .messages import plain

Listen = Callable[[int, str], None]
"""Gets the number of units that a job has done since the last call, and a few words."""

_ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HavocError)}
_CLOSED = {"event": "closed"}


def hear_nothing(_n: int, _note: str) -> None:
    """Listen to a job without showing it."""


@dataclass
class _Worker:
    """One child, its error output, and the number of its current request."""

    process: subprocess.Popen[bytes]
    complaints: Any
    job: int | None = None

    def ask(self, job: int, request: dict[str, Any]) -> None:
        self.job = job
        assert self.process.stdin is not None  # noqa: S101 - opened as a pipe
        with contextlib.suppress(OSError):  # a dead worker is noticed by its closed output
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def death(self) -> str:
        """How it ended without an answer, with its last words."""
        code = self.process.wait()
        self.complaints.seek(0)
        lines = self.complaints.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        if code == -signal.SIGKILL:
            return "a worker process was killed (signal 9): memory may have run out; free some and run it again"
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return f"a worker process ended {how} without a result{last}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in filter(None, (self.process.stdin, self.process.stdout, self.complaints)):
            with contextlib.suppress(OSError):
                pipe.close()


@dataclass
class Workers:
    """Up to `num_processes` children of `num_threads` threads each, started when there is work, ended by `with`."""

    num_processes: int
    num_threads: int = 1
    _workers: list[_Worker] = field(default_factory=list)
    _events: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]] = field(default_factory=queue.SimpleQueue)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the workers at once."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def run(
        self, function: str, requests: Sequence[object], *, listen: Listen = hear_nothing
    ) -> Iterator[Any | HavocError]:
        """Call ".module:function" of this package with each request and a Progress; yield results in their order.

        A request is a message (`messages`), which the function is given as JSON values.

        A `HavocError` of a job is yielded in its place, so one that fails does not stop the others. A defect in a job
        and a worker that dies raise a `MeasurementError` here.
        """
        waiting = list(enumerate(requests))[::-1]
        done: dict[int, Any] = {}
        for worker in self._awake(len(requests)):
            self._hand_out(worker, function, waiting)
        for place in range(len(requests)):
            while place not in done:
                worker, event = self._events.get()
                if event["event"] == "progress":
                    listen(event["n"], event["note"])
                    continue
                done[self._finished(worker)] = _outcome(worker, event)
                self._hand_out(worker, function, waiting)
            yield done.pop(place)

    def _hand_out(self, worker: _Worker, function: str, waiting: list[tuple[int, object]]) -> None:
        if waiting:
            job, request = waiting.pop()
            worker.ask(job, {"function": function, "request": plain(request)})

    def _finished(self, worker: _Worker) -> int:
        assert worker.job is not None  # noqa: S101 - only a worker that was asked answers
        job, worker.job = worker.job, None
        return job

    def _awake(self, num_jobs: int) -> list[_Worker]:
        while len(self._workers) < min(self.num_processes, num_jobs):
            self._workers.append(self._started())
        return self._workers

    def _started(self) -> _Worker:
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the worker is ended
        process = start_process(
            [sys.executable, "-P", "-m", f"{__package__}.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=cores.environment_for(self.num_threads),
            start_new_session=True,
        )
        worker = _Worker(process, complaints)
        threading.Thread(target=self._listen_to, args=(worker,), daemon=True).start()
        return worker

    def _listen_to(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None  # noqa: S101 - opened as a pipe
        with contextlib.suppress(OSError, ValueError):  # closed under it when the worker is ended
            for line in worker.process.stdout:
                self._events.put((worker, json.loads(line)))
        self._events.put((worker, _CLOSED))


def results_of(outcomes: Iterator[Any | HavocError]) -> Iterator[Any]:
    """Hand on the results of `Workers.run`; the first that is an error is raised."""
    for outcome in outcomes:
        if isinstance(outcome, HavocError):
            raise outcome
        yield outcome


def _outcome(worker: _Worker, event: Mapping[str, Any]) -> Any | HavocError:  # noqa: ANN401 - a job's JSON result
    match event["event"]:
        case "result":
            return event["result"]
        case "error":
            return _ERRORS[event["type"]](event["message"])
        case "defect":
            raise MeasurementError(f"a worker process failed ({event['message']}); please report it")
    raise MeasurementError(worker.death())


class _TellingProgress:
    """The progress of a job as events: the units of its outermost stage, and the notes of all stages."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit, self._depth = emit, 0

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[_TellingStage]:  # noqa: ARG002
        """See `Progress.stage`."""
        self._depth += 1
        try:
            yield _TellingStage(self._emit, name, counts=self._depth == 1)
        finally:
            self._depth -= 1


class _TellingStage:
    def __init__(self, emit: Callable[[dict[str, Any]], None], name: str, *, counts: bool) -> None:
        self._emit, self._name, self._counts = emit, name, counts

    def advance(self, n: int = 1, note: str = "") -> None:
        """See `Stage.advance`."""
        words = f"{self._name}: {note}" if note else self._name
        self._emit({"event": "progress", "n": n if self._counts else 0, "note": words})

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:  # noqa: ARG002 - a Stage's
        """Say the figures as a note: the parent shows one line for all its workers."""
        self.advance(0, ", ".join(f"{name} {value}" for name, value in figures.items()))


def main() -> NoReturn:
    """Answer requests until the standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's prints must not mix with the answers
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen_to_parent, args=(requests,), daemon=True).start()

    def emit(event: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the lifeline ends this process, not a missing listener
            answers.write(json.dumps(event, allow_nan=False).encode() + b"\n")
            answers.flush()

    while True:
        emit(_answer(requests.get(), emit))


def _answer(message: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    module, _, name = message["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module, __package__), name)
        return {"event": "result", "result": function(message["request"], _TellingProgress(emit))}
    except HavocError as error:
        return {"event": "error", "type": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"event": "error", "type": "MeasurementError", "message": "memory ran out in a worker process"}
    except Exception as error:  # noqa: BLE001 - sent to the parent, which ends the run
        traceback.print_exc()
        return {"event": "defect", "message": f"{type(error).__name__}: {error}"}


def _listen_to_parent(requests: queue.SimpleQueue[dict[str, Any]]) -> NoReturn:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)  # the result is no longer needed


if __name__ == "__main__":
    main()
