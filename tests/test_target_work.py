"""A run measures what its first target's limits speak of: that work, with those threads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core import measuring
from havoc_core.bench.measure import MeasuredCost as BenchCost
from havoc_core.config import Recipe
from havoc_core.jobs import Place
from havoc_core.measuring import BenchMeasurer, bind, search_settings
from havoc_core.model.checkpoint import load_base
from havoc_core.model.structure import Structure

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.alone

TARGET = """
[short]
extends = "host"
[short.workload]
prompt_tokens = 48
context_tokens = 48
decode_tokens = 5
[short.protocol]
num_threads = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "short.toml"
    path.write_text(TARGET)
    return Recipe.model_validate({"experts": {"tasks": ["math"]}, "gate": {"targets": [str(path)]}})


def test_the_first_targets_work_is_bound_and_keyed(recipe: Recipe) -> None:
    """Another prompt length is another search: its journal is not taken over."""
    bound = bind(recipe)
    assert (bound.workload.prompt_tokens, bound.workload.decode_tokens, bound.num_threads) == (48, 5, 1)
    base = load_base("nano")
    longer = dataclasses.replace(bound, workload=bound.workload.model_copy(update={"prompt_tokens": 49}))
    assert search_settings(recipe, base, [], bound) != search_settings(recipe, base, [], longer)


def test_costs_are_of_that_work(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench itself measures the prompt of 48 tokens, and the format's cost stands beside the times."""
    taken: list[BenchCost] = []
    measure_cost = measuring.measure_cost

    def watched(*args: Any, **options: Any) -> BenchCost:
        taken.append(measure_cost(*args, **options))
        return taken[-1]

    monkeypatch.setattr(measuring, "measure_cost", watched)
    place = Place(recipe, tmp_path, tmp_path / "experts", num_threads=1)
    with BenchMeasurer(place, load_base("nano"), num_experts=1, bound=bind(recipe)) as measurer:
        monkeypatch.setattr(measuring, "COST_WAIT_S", 0.0)
        (cost,) = measurer.costs([Structure(weight_format="int4")])
    assert taken[0].record.workload.prompt_tokens == 48
    assert taken[0].record.protocol.num_threads == 1
    assert cost.values["prefill_ms"] == taken[0].prefill_ms
    assert cost.values["kl_mean"] > 0
    assert 0.5 < cost.values["top1_share"] <= 1
