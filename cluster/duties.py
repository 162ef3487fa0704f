"""The worker's side: one errand in, one reply out, both JSON text. Dask carries them, and calls `do` and nothing else.

A reply holds the `result`; or the `error` of what was asked, with its `type`; or why the worker was `unable` to do it,
which is no fault of what was asked: a child that died, a full disk, another card than before. Scoring is done by a
child process, which keeps base, experts and rows for the next errand; measuring by a fresh one each time, under the
device's lease.
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
from .errands import Lacking, MeasuredOnce, MeasureErrand, Piece, ScoreErrand
from .lease import held, lease_path

if TYPE_CHECKING:
    from pathlib import Path

    from ..jobs import MixedModels
    from .errands import Errand, Offer
    from .store import Store

PLUGIN = "havoc"
"""The name under which Dask's worker keeps its `Duties`."""
_ERRANDS: dict[str, type[Errand]] = {kind.__name__: kind for kind in (Lacking, Piece, ScoreErrand, MeasureErrand)}
_COST_METRICS = ("prefill_ms", "peak_bytes", "decode_tok_per_s")


def written(errand: Errand) -> str:
    """The text of an errand, as `do` reads it."""
    return json.dumps({"errand": type(errand).__name__, "asked": plain(errand)}, allow_nan=False)


def do(text: str, data: bytes, topic: str, number: int) -> None:
    """Do one errand on the Dask worker that calls this, and publish the reply's text under the errand's number.

    A result that waits on the worker to be fetched could die with it; an event is with the search or it is not.
    """
    from distributed import get_worker

    worker = get_worker()
    duties: Duties = worker.plugins[PLUGIN].duties
    worker.log_event(topic, [number, duties.reply(text, data)])


def plugin(duties: Duties) -> Any:  # noqa: ANN401 - a `distributed.WorkerPlugin`
    """What Dask's worker keeps as `PLUGIN` while it lives."""
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
        """Do an errand and return the reply's text."""
        message = json.loads(text)
        try:
            errand = read(_ERRANDS[message["errand"]], message["asked"], "errand")
            return json.dumps({"result": plain(self._do(errand, data))}, allow_nan=False)
        except _AskedError as error:
            return json.dumps({"error": str(error.cause), "type": type(error.cause).__name__})
        except HavocError as error:
            return json.dumps({"unable": str(error)})

    @singledispatchmethod
    def _do(self, errand: Errand, data: bytes) -> Any:  # noqa: ANN401 - each errand has a result of its own
        raise NotImplementedError(type(errand), len(data))

    @_do.register
    def _lacking(self, errand: Lacking, data: bytes) -> list[str]:  # noqa: ARG002
        return self._store.lacking(errand.tree)

    @_do.register
    def _keep(self, errand: Piece, data: bytes) -> None:
        self._store.keep(errand.file, errand.start, data)

    @_do.register
    def _score(self, errand: ScoreErrand, data: bytes) -> Any:  # noqa: ANN401, ARG002
        folder = self._store.folder_of(errand.tree, is_linked=True)
        asked = errand.answer or errand.diverge
        assert asked is not None  # noqa: S101 - the search sends one of both
        request = replace(asked, mixtures=_placed(asked.mixtures, folder))
        function = ".jobs:answer" if errand.answer else ".jobs:diverge"
        try:
            (outcome,) = self._workers(asked.mixtures.num_threads).run(function, [request])
        except MeasurementError:  # not yielded in its place: the child has ended
            self.end()
            raise
        if isinstance(outcome, HavocError):
            raise _AskedError(outcome)
        return outcome

    @_do.register
    def _measure(self, errand: MeasureErrand, data: bytes) -> MeasuredOnce:  # noqa: ARG002
        self.end()  # its memory and its threads are the neighbours that a measurement must not have
        device = identify_device(errand.provider)
        if self._offer.device is None or device.fingerprint != errand.fingerprint:
            raise IdentityError(f"its device is now {device.name} ({device.fingerprint[:12]}): start it again")
        artifact = self._store.folder_of(errand.tree, is_linked=False)
        with held(lease_path(device)):
            try:
                cost = measure_cost(
                    artifact,
                    provider=errand.provider,
                    num_threads=errand.num_threads,
                    workload=errand.workload,
                    device=device,
                    num_retries=errand.num_retries,
                    wait_s=errand.wait_s,
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
    """What was asked for failed, and would fail on another worker too."""

    def __init__(self, cause: HavocError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _placed(mixtures: MixedModels, folder: Path) -> MixedModels:
    """The same mixtures, with the paths of their place inside `folder`; names of bundled things stay what they are."""
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
