"""The worker's side: it gets one request and sends one reply, both JSON text. Dask carries them and calls only `do`.

A reply holds one of three things: the `result`; the `error` that the request itself caused, with its `type`; or the
reason why this worker was `unable` to do it (its child died, its disk is full, it has another card than before).
Before its reply, a training sends its `progress` again and again: the steps since the last time, and a few words.
A child process scores and trains, and keeps base, experts and rows for the next request. Each measurement runs in a
fresh process that holds the device's lease.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial, singledispatchmethod
from typing import TYPE_CHECKING, Any

from ..bench.device import identify_device
from ..bench.measure import measure_cost
from ..errors import HavocError, IdentityError, MeasurementError
from ..messages import plain, read
from ..processes import Listen, Workers
from ..storage import read_bounded, scratch_directory, unreadable, write_bytes
from ..track.metrics_file import FILE_NAME, MAX_BYTES
from .lease import held, lease_path
from .worker_requests import Lacking, MeasuredOnce, MeasureTree, Piece, ScoreTree, TrainedFiles, TrainTree

if TYPE_CHECKING:
    from pathlib import Path

    from ..jobs import Place
    from .store import Store
    from .worker_requests import Offer, WorkerRequest

PLUGIN = "havoc"
"""The name under which Dask's worker keeps its `Duties`."""
_KINDS = (Lacking, Piece, ScoreTree, TrainTree, MeasureTree)
_REQUESTS: dict[str, type[WorkerRequest]] = {kind.__name__: kind for kind in _KINDS}
_COST_METRICS = ("prefill_ms", "peak_bytes", "decode_tok_per_s")


def written(request: WorkerRequest) -> str:
    """The text of a request, as `do` reads it."""
    return json.dumps({"request": type(request).__name__, "asked": plain(request)}, allow_nan=False)


def do(text: str, data: bytes, topic: str, number: int) -> None:
    """Do one request on the Dask worker that calls this, and publish the reply's text under the request's number.

    The reply is an event and not a Dask result: a result stays on the worker until it is fetched, and is lost when the
    worker dies.
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()

    def tell(n: int, note: str) -> None:
        task = worker.state.tasks.get(key)
        if task is None or task.state == "cancelled":
            raise MeasurementError("nobody waits for this job any more")
        if n:
            worker.log_event(topic, [number, json.dumps({"progress": [n, note]})])

    duties: Duties = worker.plugins[PLUGIN].duties
    worker.log_event(topic, [number, duties.reply(text, data, tell)])


def plugin(duties: Duties) -> Any:  # noqa: ANN401 - a `distributed.WorkerPlugin`
    """The plugin that Dask's worker keeps under the name `PLUGIN` while it runs."""
    from distributed import WorkerPlugin

    class DutiesPlugin(WorkerPlugin):  # type: ignore[misc]
        name = PLUGIN

        def __init__(self) -> None:
            self.duties = duties

        def teardown(self, worker: object) -> None:  # noqa: ARG002 - Dask's signature
            duties.end()

    return DutiesPlugin()


class Duties:
    """What one worker does."""

    def __init__(self, offer: Offer, store: Store) -> None:
        self._offer, self._store = offer, store
        self._child: Workers | None = None

    def end(self) -> None:
        """End the child that scores and trains."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def reply(self, text: str, data: bytes, tell: Listen) -> str:
        """Do a request and return the reply's text.

        `tell` is called with the progress of a training; a `MeasurementError` that it raises ends the training.
        """
        message = json.loads(text)
        try:
            request = read(_REQUESTS[message["request"]], message["asked"], "request")
            return json.dumps({"result": plain(self._do(request, data, tell))}, allow_nan=False)
        except _AskedError as error:
            return json.dumps({"error": str(error.cause), "type": type(error.cause).__name__})
        except HavocError as error:
            return json.dumps({"unable": str(error)})

    @singledispatchmethod
    def _do(self, request: WorkerRequest, data: bytes, tell: Listen) -> Any:  # noqa: ANN401 - each has its own result
        raise NotImplementedError(type(request), len(data), tell)

    @_do.register
    def _lacking(self, request: Lacking, _data: bytes, _tell: Listen) -> list[str]:
        return self._store.lacking(request.tree)

    @_do.register
    def _keep(self, request: Piece, data: bytes, _tell: Listen) -> None:
        self._store.keep(request.file, request.start, data)

    @_do.register
    def _score(self, request: ScoreTree, _data: bytes, _tell: Listen) -> Any:  # noqa: ANN401
        folder = self._store.folder_of(request.tree, is_linked=True)
        asked = request.answer or request.diverge
        assert asked is not None  # noqa: S101 - the search sends one of both
        job = replace(asked, mixtures=replace(asked.mixtures, place=_placed(asked.mixtures.place, folder)))
        function = ".jobs:answer" if request.answer else ".jobs:diverge"
        outcome = self._in_child(function, job, asked.mixtures.num_threads)
        if isinstance(outcome, HavocError):
            raise _AskedError(outcome)
        return outcome

    @_do.register
    def _train(self, request: TrainTree, data: bytes, tell: Listen) -> TrainedFiles:
        from ..adapt.expert import expert_path
        from ..adapt.training_state import state_path, trace_path

        folder, asked = self._store.folder_of(request.tree, is_linked=True), request.train
        with scratch_directory("havoc-training-") as left:
            expert, state = expert_path(left, request.domain), state_path(left, request.domain)
            if data:
                write_bytes(state, data)
            place = replace(_placed(asked.place, folder), out=folder, experts=left)
            job = replace(asked, place=place, metrics=left, task=_inside(folder, asked.task))
            outcome = self._in_child(".jobs:train", job, asked.num_threads, listen=tell)
            if isinstance(outcome, HavocError):
                words = str(outcome).replace(str(left), str(asked.place.experts))
                raise _AskedError(type(outcome)(words))
            files = {"expert": expert, "trace": trace_path(left, request.domain), "metrics": left / FILE_NAME}
            try:
                return TrainedFiles(**{name: read_bounded(path, max_bytes=MAX_BYTES) for name, path in files.items()})
            except OSError as error:
                raise unreadable(error, left) from error

    @_do.register
    def _measure(self, request: MeasureTree, _data: bytes, _tell: Listen) -> MeasuredOnce:
        self.end()  # the child's memory and threads would disturb the measurement
        device = identify_device(request.provider)
        if self._offer.device is None or device.fingerprint != request.fingerprint:
            raise IdentityError(
                f"its device is now {device.name} ({device.fingerprint[:12]}), not the one it offered: "
                "start the worker again"
            )
        artifact = self._store.folder_of(request.tree, is_linked=False)
        with held(lease_path(device)):
            try:
                cost = measure_cost(
                    artifact,
                    provider=request.provider,
                    num_threads=request.num_threads,
                    workload=request.workload,
                    device=device,
                    num_retries=request.num_retries,
                    wait_s=request.wait_s,
                )
            except HavocError as error:
                raise _AskedError(error) from error
        values = {metric: float(getattr(cost, metric)) for metric in _COST_METRICS}
        return MeasuredOnce(values=values, disturbance=cost.disturbance)

    def _in_child(self, function: str, job: object, num_threads: int, **listen: Listen) -> Any:  # noqa: ANN401
        """Give a job to the child, which is started if it has another number of threads or has ended."""
        if self._child is None or self._child.num_threads != num_threads:
            self.end()
            self._child = Workers(1, num_threads)
        try:
            (outcome,) = self._child.run(function, [job], **listen)
        except MeasurementError:  # raised, not yielded as an outcome: the child has ended, or its job is not wanted
            self.end()
            raise
        return outcome


class _AskedError(Exception):
    """The request failed, and would fail on another worker too."""

    def __init__(self, cause: HavocError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _inside(folder: Path, name: str) -> str:
    """The path of a name in `folder`; the name of a bundled base or task stays."""
    return str(folder / name) if (folder / name).exists() else name


def _placed(place: Place, folder: Path) -> Place:
    """The same place with all paths moved into `folder`."""
    recipe, inside = place.recipe, partial(_inside, folder)
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": inside(recipe.model.base)}),
            "data": recipe.data.model_copy(update={"source": inside(recipe.data.source)}),
            "experts": recipe.experts.model_copy(update={"tasks": tuple(map(inside, recipe.experts.tasks))}),
        }
    )
    return replace(place, recipe=recipe, out=folder / place.out, experts=folder / place.experts)
