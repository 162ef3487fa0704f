"""Trains experts on the workers of a cluster, one job an expert; the results are those of `jobs.train` on one machine.

Any worker that scores also trains. Base, basis and tasks are sent once to each worker, whichever experts it trains. The
files of an expert are written here as soon as its training ends, the expert last. If a worker is lost, another one
starts its training again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from .. import storage
from ..adapt.expert import expert_path
from ..adapt.training_state import forget_training, state_path, trace_path
from ..errors import HavocError
from ..jobs import Place, TrainRequest
from ..measuring import recipe_tasks
from ..messages import read
from ..processes import results_of
from ..progress import duration
from ..track.metrics_file import MetricsFile, points_of
from .fleet import Fleet, FleetJob, Worker, WorkerLostError
from .measurer import shipped
from .worker_requests import TrainedFiles, TrainTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model.checkpoint import Base
    from ..processes import Listen


def train_on_workers(fleet: Fleet, place: Place, base: Base, domains: Sequence[str], *, listen: Listen) -> None:
    """Train the experts of some of the recipe's tasks, given by their names; `place.out` holds the basis.

    `listen` is told of the steps of all trainings; the steps of a lost worker are taken back by a negative number.
    Raises the first error of a training, and what `Fleet.run` raises; experts that are finished by then are kept.
    """
    if not any(worker.offer.scores for worker in fleet.workers.values()):
        where = fleet.address.text
        raise HavocError(
            f"none of the {len(fleet.workers)} workers at {where} can train: start `havoc worker {where}` in an "
            "installation with [lab]"
        )
    fleet.noted = storage.Journal(place.experts / "cluster.jsonl").append
    trainer = _Trainer(fleet, place, base, listen)
    for _ in results_of(fleet.run([trainer.job(domain) for domain in domains])):
        pass


class _Trainer:
    """The trainings of one recipe on a fleet."""

    def __init__(self, fleet: Fleet, place: Place, base: Base, listen: Listen) -> None:
        self._fleet, self._place, self._listen = fleet, place, listen
        (self._tree, self._sources), self._recipe = shipped(place, base)
        domains = [task.name for task in recipe_tasks(place.recipe)]
        self._names = dict(zip(domains, self._recipe.experts.tasks, strict=True))

    def job(self, domain: str) -> FleetJob:
        def do(worker: Worker) -> None:
            with storage.only_one(self._place.experts, f"training_{domain}"):
                self._train(domain, worker)

        return FleetJob(fits=lambda worker: worker.offer.scores, do=do, needs="trains (an installation with [lab])")

    def _train(self, domain: str, worker: Worker) -> None:
        began_s, told = time.monotonic(), 0

        def listen(n: int, note: str) -> None:
            nonlocal told
            told += n
            self._fleet.soon(lambda: self._listen(n, note))

        request = TrainTree(
            tree=self._tree,
            domain=domain,
            train=TrainRequest(
                place=Place(self._recipe, Path(), self._place.experts),
                metrics=Path(),
                num_threads=self._place.num_threads or 1,
                task=self._names[domain],
            ),
        )
        try:
            self._fleet.send(worker, self._tree, self._sources)
            found = self._fleet.ask(worker, request, self._begun(domain), listen=listen)
        except WorkerLostError:
            listen(-told, f"train {domain}: its worker is lost")
            raise
        except HavocError as error:
            raise type(error)(f"worker {worker.name}: {error}") from error
        self._keep(domain, read(TrainedFiles, found))
        took = duration(time.monotonic() - began_s)
        self._fleet.say(f"{domain} was trained by worker {worker.name} in {took}", trained=domain, worker=worker.name)

    def _begun(self, domain: str) -> bytes:
        """The state of a training that began on this machine, if there is one: the worker goes on with it."""
        path = state_path(self._place.experts, domain)
        try:
            return path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise storage.unreadable(error, path) from error

    def _keep(self, domain: str, files: TrainedFiles) -> None:
        """Write the files of an expert; its own file is the last, because it says that the others are there."""
        experts = self._place.experts
        storage.write_bytes(trace_path(experts, domain), files.trace)
        metrics = MetricsFile(self._place.out, warn=self._fleet.say)
        for point in points_of(files.metrics):
            metrics.log(*point)
        storage.write_bytes(expert_path(experts, domain), files.expert)
        forget_training(experts, domain)
