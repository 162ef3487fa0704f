"""The worker's side: it gets one request and sends one reply, both JSON text. Dask carries them and calls only `do`.

A reply holds one of three things: the `result`; the `error` that the request itself caused, with its `type`; or the
reason why this worker was `unable` to do it (its child died, its disk is full, it has another card than before).
A child process scores and keeps base, experts and rows for the next request. Each measurement runs in a fresh process
that holds the device's lease.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

from ..bench.device import identify_device
from ..bench.measure import measure_cost
from ..errors import HavocError, IdentityError, MeasurementError
from ..messages import plain, read
from ..processes import Workers
from .lease import held, lease_path
from .worker_requests import Lacking, MeasuredOnce, MeasureTree, Piece, ScoreTree

if TYPE_CHECKING:
    from pathlib import Path

    from ..jobs import MixedModels
    from .store import Store
    from .worker_requests import Offer, WorkerRequest

PLUGIN = "havoc"
"""The name under which Dask's worker keeps its `Duties`."""
_REQUESTS: dict[str, type[WorkerRequest]] = {kind.__name__: kind for kind in (Lacking, Piece, ScoreTree, MeasureTree)}
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
    duties: Duties = worker.plugins[PLUGIN].duties
    worker.log_event(topic, [number, duties.reply(text, data)])


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
        self._scoring: Workers | None = None

    def end(self) -> None:
        """End the child that scores."""
        if self._scoring is not None:
            self._scoring.end()
            self._scoring = None

    def reply(self, text: str, data: bytes = b"") -> str:
        """Do a request and return the reply's text."""
        message = json.loads(text)
        try:
            request = read(_REQUESTS[message["request"]], message["asked"], "request")
            return json.dumps({"result": plain(self._do(request, data))}, allow_nan=False)
        except _AskedError as error:
            return json.dumps({"error": str(error.cause), "type": type(error.cause).__name__})
        except HavocError as error:
            return json.dumps({"unable": str(error)})

    @singledispatchmethod
    def _do(self, request: WorkerRequest, data: bytes) -> Any:  # noqa: ANN401 - each request has its own result
        raise NotImplementedError(type(request), len(data))

    @_do.register
    def _lacking(self, request: Lacking, data: bytes) -> list[str]:  # noqa: ARG002
        return self._store.lacking(request.tree)

    @_do.register
    def _keep(self, request: Piece, data: bytes) -> None:
        self._store.keep(request.file, request.start, data)

    @_do.register
    def _score(self, request: ScoreTree, data: bytes) -> Any:  # noqa: ANN401, ARG002
        folder = self._store.folder_of(request.tree, is_linked=True)
        asked = request.answer or request.diverge
        assert asked is not None  # noqa: S101 - the search sends one of both
        job = replace(asked, mixtures=_placed(asked.mixtures, folder))
        function = ".jobs:answer" if request.answer else ".jobs:diverge"
        try:
            (outcome,) = self._workers(asked.mixtures.num_threads).run(function, [job])
        except MeasurementError:  # raised, not yielded as an outcome: the child has ended
            self.end()
            raise
        if isinstance(outcome, HavocError):
            raise _AskedError(outcome)
        return outcome

    @_do.register
    def _measure(self, request: MeasureTree, data: bytes) -> MeasuredOnce:  # noqa: ARG002
        self.end()  # the scoring child's memory and threads would disturb the measurement
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

    def _workers(self, num_threads: int) -> Workers:
        if self._scoring is None or self._scoring.num_threads != num_threads:
            self.end()
            self._scoring = Workers(1, num_threads)
        return self._scoring


class _AskedError(Exception):
    """The request failed, and would fail on another worker too."""

    def __init__(self, cause: HavocError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _placed(mixtures: MixedModels, folder: Path) -> MixedModels:
    """The same mixtures with all paths moved into `folder`; names of bundled bases and tasks stay."""
    place = mixtures.place
    recipe = place.recipe

    def inside(name: str) -> str:
        return str(folder / name) if (folder / name).exists() else name

    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": inside(recipe.model.base)}),
            "data": recipe.data.model_copy(update={"source": inside(recipe.data.source)}),
            "experts": recipe.experts.model_copy(update={"tasks": tuple(map(inside, recipe.experts.tasks))}),
        }
    )
    place = replace(place, recipe=recipe, out=folder / place.out, experts=folder / place.experts)
    return replace(mixtures, place=place)
