"""Costs that a cluster measures: how often a disturbed one is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from havoc_core.adapt.ledger import NUM_COST_REPEATS
from havoc_core.cluster.fleet import FleetJob
from havoc_core.cluster.measurer import FleetMeasurer
from havoc_core.cluster.worker_requests import MeasuredOnce, MeasureTree
from havoc_core.config import Recipe
from havoc_core.jobs import Place
from havoc_core.measuring import COST_RETRIES, bind
from havoc_core.messages import plain
from havoc_core.model.checkpoint import load_base
from havoc_core.model.structure import Structure

RECIPE = Recipe.model_validate({"gate": {"targets": ["host"]}, "search": {"weight_formats": ["fp32"]}})


class OneWorker:
    """A fleet of one worker whose measurements are scripted; it keeps what it was asked."""

    def __init__(self, device: Any, disturbances: Sequence[str]) -> None:
        offer = SimpleNamespace(device=device, token="one", scores=False)
        self.worker = SimpleNamespace(offer=offer, name="one", quarantine="")
        self.workers = {"one": self.worker}
        self.asked: list[MeasureTree] = []
        self._disturbances = iter(disturbances)
        self.noted: Any = None

    def run(self, jobs: Sequence[FleetJob]) -> Iterator[Any]:
        return (job.do(self.worker) for job in jobs)  # type: ignore[arg-type]

    def send(self, *_: Any) -> None: ...

    def say(self, *_: Any, **__: Any) -> None: ...

    def ask(self, _: Any, request: MeasureTree) -> Any:
        self.asked.append(request)
        values = {"prefill_ms": 2.0, "decode_tok_per_s": 4.0, "peak_bytes": 3.0}
        return plain(MeasuredOnce(values=values, disturbance=next(self._disturbances, "")))


@pytest.mark.parametrize(("disturbances", "second"), [((), COST_RETRIES), (("a neighbour",), 0)])
def test_later_costs_are_not_repeated_once_one_stayed_disturbed(
    tmp_path: Path, disturbances: tuple[str, ...], second: int
) -> None:
    """The search ranks nothing by speed any more, so no later cost is worth a wait."""
    bound = bind(RECIPE)
    fleet = OneWorker(bound.device, disturbances)
    place = Place(RECIPE, tmp_path, tmp_path / "experts", 1)
    with FleetMeasurer(fleet, place, load_base("pico"), bound=bound) as measurer:  # type: ignore[arg-type]
        costs = list(measurer.costs([Structure()] * NUM_COST_REPEATS))
    assert len(costs) == NUM_COST_REPEATS
    assert [request.num_retries for request in fleet.asked] == [COST_RETRIES, *[second] * (len(fleet.asked) - 1)]
    assert len(fleet.asked) > 1
