"""The side that asks: it finds the workers, gives each one a job, and gives the job of a dead worker to another one.

    with Fleet.connect(Address.parse("tcp://127.0.0.1:8786"), TlsFiles()) as fleet:
        for outcome in fleet.run(jobs):          # in the order of the jobs, not in the order they finish
            ...

Each worker has at most one job of this fleet. The fleet asks the scheduler several times a second which workers are
there. Files are sent before the first job that needs them; each content is sent once to each worker.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import onnxruntime

from .. import __version__, errors
from ..errors import HavocError, MeasurementError, printable
from ..messages import read
from ..processes import hear_nothing
from ..progress import SILENT
from .address import security
from .dask import quiet_dask
from .duties import PLUGIN, do, written
from .store import pieces_of
from .worker_requests import Lacking, Offer, Piece

if TYPE_CHECKING:
    from ..processes import Listen
    from ..progress import Progress
    from .address import Address, TlsFiles
    from .worker_requests import Tree, WorkerRequest

_CONNECT_S = 5
_ANSWER_S = 20.0
"""Seconds that the scheduler may take to list its workers."""
_LOOK_EVERY_S = 0.2
_PATIENCE_S = 60.0
"""Seconds that a job waits for a worker that fits, after the last one has gone."""
_MAX_DEATHS = 5
"""The run ends when so many workers were lost over one job: the job is then the likely cause."""
_MAX_FAULTS = 3
"""A worker that was unable to do its job so many times gets no more jobs."""
_MAX_WORKERS = 256
_ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HavocError)}


class WorkerLostError(Exception):
    """A worker did not do its job, and the job is not the cause; the message says why."""


class _UnusableError(Exception):
    """Scheduler or worker cannot run HAVOC's functions at all."""


@dataclass(eq=False)
class Worker:
    """One worker, what it offers, and what it has been sent.

    `quarantine` says why it is no longer asked to measure ("": it may measure). `num_faults` counts the jobs that it
    was unable to do while it was alive.
    """

    name: str
    address: str
    offer: Offer
    trees: set[str] = field(default_factory=set)
    is_gone: threading.Event = field(default_factory=threading.Event)
    quarantine: str = ""
    num_faults: int = 0


@dataclass(frozen=True, kw_only=True)
class FleetJob:
    """Something to be done by a worker that `fits`: `do` asks it, one request after another, and returns the outcome.

    If `do` raises a `HavocError`, that is the job's outcome; after a `WorkerLostError` another worker gets the job.
    `needs` says in a few words what kind of worker fits.
    """

    fits: Callable[[Worker], bool]
    do: Callable[[Worker], Any]
    needs: str


class Fleet:
    """The workers of one scheduler, while a run uses them."""

    def __init__(self, address: Address, client: Any, progress: Progress = SILENT) -> None:  # noqa: ANN401 - Dask's own
        self.address, self._client, self._progress = address, client, progress
        self.workers: dict[str, Worker] = {}
        self.patience_s = _PATIENCE_S
        self._refused: set[tuple[str, str | None]] = set()
        self._is_closed = threading.Event()
        self._topic = f"havoc-{secrets.token_hex(8)}"
        self._numbers = itertools.count()
        self._replies: dict[int, queue.SimpleQueue[str]] = {}
        self._due: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = concurrent.futures.ThreadPoolExecutor(_MAX_WORKERS, thread_name_prefix="havoc-fleet")
        self.noted: Callable[[dict[str, Any]], None] = lambda _: None
        """The thread of `run` calls this with what happens to workers, for a `cluster.jsonl`."""

    @classmethod
    def connect(cls, address: Address, tls: TlsFiles, progress: Progress = SILENT) -> Fleet:
        """Connect and check that there are workers of this version of HAVOC; otherwise raise a `HavocError`."""
        quiet_dask()
        from distributed import Client

        safety = security(address, tls, "client")
        try:
            client = Client(address.text, security=safety, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise HavocError(
                f"no Dask scheduler answers at {address.text} within {_CONNECT_S} s: start one (docs/cluster.md), or "
                f"correct the address or the certificates ({(str(error) or 'no answer').splitlines()[0][:200]})"
            ) from None
        fleet = cls(address, client, progress)
        client.subscribe_topic(fleet._topic, fleet._heard)
        try:
            fleet._require_workers()
        except BaseException:
            fleet.close()
            raise
        return fleet

    def _require_workers(self) -> None:
        if refusals := self._look():
            raise HavocError(refusals[0])
        if not self.workers:
            where = self.address.text
            raise HavocError(f"the scheduler at {where} has no workers: start some, `havoc worker {where}`")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the workers, without waiting for jobs that they still do."""
        self._is_closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(OSError, TimeoutError):
            self._client.close(timeout=2)

    def soon(self, act: Callable[[], None]) -> None:
        """Let the thread of `run` call `act`. From any thread."""
        self._due.put(act)

    def say(self, text: str, **facts: object) -> None:
        """Pass facts to `run`, which notes them, and a text for the progress display ("": none). From any thread."""

        def act() -> None:
            self.noted({**({"said": text} if text else {}), **facts})
            if text:
                with self._progress.stage("cluster", None) as stage:
                    stage.advance(0, printable(text))

        self.soon(act)

    def _do_what_is_due(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._due.get_nowait()()

    def ask(self, worker: Worker, request: WorkerRequest, data: bytes = b"", *, listen: Listen = hear_nothing) -> Any:  # noqa: ANN401 - each has its own
        """Send one request and return its result; its `HavocError` is raised, a lost worker a `WorkerLostError`.

        `listen` is called with the progress of a training, in this thread.
        """
        reply = self._carried(worker, written(request), data, listen)
        if "unable" in reply:
            worker.num_faults += 1
            raise WorkerLostError(reply["unable"])
        if "error" in reply:
            raise _ERRORS.get(reply["type"], HavocError)(reply["error"])
        return reply["result"]

    def send(self, worker: Worker, tree: Tree, sources: Mapping[str, Path]) -> None:
        """Send the worker all files of a tree that it lacks; `sources` gives each content's path by its hash."""
        if tree.hash in worker.trees:
            return
        sizes = {file.sha256: file for file in tree.files.values()}
        for sha256 in self.ask(worker, Lacking(tree=tree)):
            for start, data in pieces_of(sources[sha256]):
                self.ask(worker, Piece(file=sizes[sha256], start=start), data)
            self.say("", sent=sha256, num_bytes=sizes[sha256].num_bytes, worker=worker.name)
        worker.trees.add(tree.hash)

    def run(self, jobs: Sequence[FleetJob]) -> Iterator[Any | HavocError]:
        """Run all jobs on the workers and yield their outcomes in the order of the jobs.

        Raises `MeasurementError` when the scheduler is lost, when no worker that fits a job is left and none comes, or
        when several workers died over one job.
        """
        course = _Course(deque(enumerate(jobs)))
        try:
            for place in range(len(jobs)):
                while place not in course.done:
                    for refusal in self._look():
                        self.say(refusal)
                    self._hand_out(course)
                    self._collect(course)
                    self._do_what_is_due()
                yield course.done.pop(place)
        finally:
            self._do_what_is_due()

    def _hand_out(self, course: _Course) -> None:
        busy = {worker for _, _, worker in course.running.values()}
        for worker in [one for one in self.workers.values() if one not in busy and one.num_faults < _MAX_FAULTS]:
            found = next((pair for pair in course.waiting if pair[1].fits(worker)), None)
            if found is not None:
                course.waiting.remove(found)
                place, job = found
                course.running[self._threads.submit(_outcome, job, worker)] = (place, job, worker)
        if course.running or not course.waiting:
            course.idle_since_s = None
            return
        if course.idle_since_s is None:
            course.idle_since_s = time.monotonic()
            self.say(f"no worker is left that {course.waiting[0][1].needs}; waiting {self.patience_s:.0f} s for one")
        if time.monotonic() - course.idle_since_s > self.patience_s:
            raise MeasurementError(
                f"no worker is left that {course.waiting[0][1].needs}; all results so far are kept: start a worker and "
                "run the same command again to continue"
            )

    def _collect(self, course: _Course) -> None:
        if not course.running:
            self._is_closed.wait(_LOOK_EVERY_S)
            return
        finished, _ = concurrent.futures.wait(
            course.running, timeout=_LOOK_EVERY_S, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in finished:
            place, job, worker = course.running.pop(future)
            try:
                course.done[place] = future.result()
            except _UnusableError as error:
                raise MeasurementError(str(error)) from error
            except WorkerLostError as error:
                course.deaths[place] = course.deaths.get(place, 0) + 1
                self.say(f"worker {worker.name}: {error}; another worker gets its job", lost=worker.name)
                if course.deaths[place] >= _MAX_DEATHS:
                    raise MeasurementError(
                        f"{_MAX_DEATHS} workers were lost over the same job (the last one: {error}); all results so "
                        "far are kept: run the same command again to continue"
                    ) from None
                course.waiting.appendleft((place, job))

    def _look(self) -> list[str]:
        """Update the list of workers; return why new ones are refused."""
        try:
            if self._client.status != "running":
                raise OSError("closed")  # noqa: TRY301 - handled as what the call below raises
            info = self._client.sync(self._client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER_S)
        except (OSError, TimeoutError, concurrent.futures.CancelledError) as error:
            self._is_closed.set()
            raise MeasurementError(
                f"the connection to the scheduler at {self.address.text} is lost; all results so far are kept: start "
                "it and its workers, and run the same command again to continue"
            ) from error
        there = {address: facts for address, facts in info["workers"].items() if facts["status"] == "running"}
        for address, worker in list(self.workers.items()):
            if address not in there or _token(there[address]) != worker.offer.token:
                worker.is_gone.set()
                del self.workers[address]
        refusals = []
        for address, facts in there.items():
            if address not in self.workers and (address, _token(facts)) not in self._refused:
                try:
                    self.workers[address] = _worker(address, facts)
                except HavocError as error:
                    self._refused.add((address, _token(facts)))
                    refusals.append(str(error))
        return refusals

    def _carried(self, worker: Worker, text: str, data: bytes, listen: Listen) -> dict[str, Any]:
        """Send a text to the worker through Dask, and return the reply, which may come after some progress."""
        number, replies = next(self._numbers), queue.SimpleQueue[str]()
        self._replies[number] = replies
        there = {"workers": [worker.address], "allow_other_workers": False}
        key = f"{self._topic}-{number}"
        try:
            task = self._client.submit(do, text, data, self._topic, number, pure=False, key=key, **there)
        except Exception as error:
            if self._client.status == "running":
                raise
            raise WorkerLostError("the connection to it is lost") from error
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    reply: dict[str, Any] = json.loads(replies.get(timeout=_LOOK_EVERY_S))
                    if "progress" not in reply:
                        return reply
                    listen(*reply["progress"])
                if worker.is_gone.is_set() or self._is_closed.is_set() or task.status in {"cancelled", "lost"}:
                    raise WorkerLostError("it is gone")
                if task.status == "error":
                    with contextlib.suppress(TimeoutError):
                        self._raise(worker, task.exception(timeout=_ANSWER_S))
        finally:
            del self._replies[number]
            task.cancel()

    def _raise(self, worker: Worker, error: BaseException) -> NoReturn:
        """Raise `WorkerLostError` if the worker died, `_UnusableError` if it cannot run HAVOC's functions."""
        if type(error).__name__ == "KilledWorker":
            raise WorkerLostError("it is gone")
        raise _UnusableError(
            f"worker {worker.name} could not do its job ({type(error).__name__}: {str(error)[:300]}); install the same "
            "havoc-core for scheduler, workers and this command; if they are the same, please report it"
        ) from error

    def _heard(self, event: tuple[float, tuple[int, str]]) -> None:
        """Give a reply to the thread that waits for it; drop it if none does."""
        number, reply = event[1]
        if (replies := self._replies.get(number)) is not None:
            replies.put(reply)


@dataclass
class _Course:
    """The state of the jobs of one `Fleet.run`: waiting, running or done."""

    waiting: deque[tuple[int, FleetJob]]
    running: dict[concurrent.futures.Future[Any], tuple[int, FleetJob, Worker]] = field(default_factory=dict)
    done: dict[int, Any] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    idle_since_s: float | None = None


def _outcome(job: FleetJob, worker: Worker) -> Any | HavocError:  # noqa: ANN401 - the job's own
    try:
        return job.do(worker)
    except HavocError as error:
        return error


def _token(facts: Mapping[str, Any]) -> str | None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return str(json.loads(facts[PLUGIN])["token"])
    return None


def _worker(address: str, facts: Mapping[str, Any]) -> Worker:
    """Read what a worker says about itself; another version of HAVOC or ONNX Runtime is a `HavocError`."""
    name = printable(str(facts["name"]))
    if PLUGIN not in facts:
        raise HavocError(f"worker {name} at {address} was not started by `havoc worker`: stop it, it cannot be used")
    said = json.loads(facts[PLUGIN])
    versions = {
        "havoc-core": (said.get("version"), __version__),
        "onnxruntime": (said.get("onnxruntime"), onnxruntime.__version__),
    }
    for package, (theirs, ours) in versions.items():
        if theirs != ours:
            raise HavocError(
                f"worker {name} at {address} has {package} {printable(str(theirs))[:40]}, this command has {ours}: "
                f"install {ours} there and start the worker again, or stop it"
            )
    return Worker(name, address, read(Offer, said, f"offer of {name}"))
