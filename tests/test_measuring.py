"""What the pipeline hands from the bench to the search and the score table: no figure is lost or made up on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core import measuring
from havoc_core.adapt.candidate import Candidate
from havoc_core.adapt.expert import Expert
from havoc_core.config import Recipe
from havoc_core.errors import HavocError
from havoc_core.jobs import Place
from havoc_core.measuring import BenchMeasurer, bind, limits_of, score_table
from havoc_core.model.structure import Structure
from havoc_core.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RECIPE = Recipe.model_validate(
    {
        "experts": {"tasks": ["math", "code"], "num_validation_rows": 30},
        "search": {"num_rows": 20, "rule": "renorm"},
        "gate": {"num_rows": 4},
    }
)
PLACE = Place(RECIPE, Path("out"), Path("experts"))


class Recorded:
    """Workers that note what they are asked and answer from a table."""

    num_processes, num_threads = 2, 1

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers = answers

    def __enter__(self) -> Recorded:  # noqa: PYI034 - a stand-in
        return self

    def __exit__(self, *_: object) -> None: ...

    def end(self) -> None: ...

    def run(self, function: str, requests: Sequence[dict[str, Any]], **_: object) -> Iterator[Any]:
        for request in requests:
            self.asked.append((function, request))
            yield self._answers[function](request)


def measurer_with(workers: Recorded, monkeypatch: pytest.MonkeyPatch) -> BenchMeasurer:
    monkeypatch.setattr(measuring, "scoring_workers", lambda *_, **__: workers)
    return BenchMeasurer(PLACE, None, num_experts=2, bound=bind(RECIPE))  # type: ignore[arg-type]


def test_limits_are_the_targets_own() -> None:
    """Every limit on what a search measures, in the metric's own unit; memory of any kind is its peak."""
    assert limits_of("host", ["math", "code"]) == {
        "prefill_ms": ("<", 100.0),
        "peak_bytes": ("<", 2e9),
        "decode_tok_per_s": (">", 50.0),
        "kl_mean": ("<", 0.15),
        "top1_share": (">", 0.8),
        "accuracy/math": (">", 0.85),
        "accuracy/code": (">", 0.85),
    }
    assert limits_of("gtx1660", [])["peak_bytes"] == ("<", 2e9)


def test_samples_are_disjoint_from_each_other_and_from_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample k begins behind the validation rows and k samples; the mixture goes to the worker as it was chosen."""
    workers = Recorded({".jobs:answer": lambda _: {"math": "10", "code": "01"}})
    with measurer_with(workers, monkeypatch) as measurer:
        candidates = [Candidate((1.0, 0.25), Structure(weight_format="int8")), Candidate((0.5, 0.0), Structure())]
        for sample in (0, 1, 2):
            found = list(measurer.answers(candidates, sample=sample))
            assert found == [{"math": (True, False), "code": (False, True)}] * 2
    requests = [request for _, request in workers.asked]
    assert [(r["split"], r["start"], r["size"]) for r in requests] == [
        ("search", 30 + 20 * sample, 20) for sample in (0, 0, 1, 1, 2, 2)
    ]
    assert [tuple(r["alpha"]) for r in requests[:2]] == [(1.0, 0.25), (0.5, 0.0)]
    assert [r["structure"]["weight_format"] for r in requests[:2]] == ["int8", "fp32"]
    assert {r["rule"] for r in requests} == {"renorm"}


def test_divergences_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers share five alphas; a failed part fails its alphas alone."""

    def diverge(request: dict[str, Any]) -> Any:
        if [9.0] in request["alphas"]:
            return HavocError("not finite")
        return [{"math": alpha[0]} for alpha in request["alphas"]]

    workers = Recorded({".jobs:diverge": diverge})
    with measurer_with(workers, monkeypatch) as measurer:
        alphas = [(0.0,), (1.0,), (2.0,), (3.0,), (4.0,)]
        assert [one["math"] for one in measurer.divergences(alphas)] == [0.0, 1.0, 2.0, 3.0, 4.0]  # type: ignore[index]
        found = list(measurer.divergences([(0.0,), (9.0,), (2.0,)]))
    assert [isinstance(one, HavocError) for one in found] == [False, True, False]
    assert {request["start"] for _, request in workers.asked} == {30}


def expert(domain: str, value: float) -> Expert:
    import torch

    return Expert(domain=domain, deltas={"w": torch.tensor([value, 0.0])}, base_hash="b", basis_hash="s")


def test_the_score_table_holds_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right rows, gains and divergences of each, from the jobs' answers; the base's twin is not asked."""
    right = {(0.0, 0.0): {"math": "1000", "code": "1100"}, (0.0, 1.0): {"math": "0000", "code": "1111"}}

    def answer(request: dict[str, Any]) -> dict[str, str]:
        (task,) = request["tasks"]
        return {task: right[tuple(request["alpha"])][task]}

    def diverge(request: dict[str, Any]) -> list[dict[str, float]]:
        return [{"math": sum(alpha), "code": 10 * sum(alpha)} for alpha in request["alphas"]]

    workers = Recorded({".jobs:answer": answer, ".jobs:diverge": diverge})
    monkeypatch.setattr(measuring, "scoring_workers", lambda *_, **__: workers)
    experts = [expert("math", 0.0), expert("code", 0.1)]
    mixture = {"math": (True, True, False, False), "code": (True, True, True, False)}
    table = score_table(PLACE, None, experts, alpha=(0.5, 0.75), mixture=mixture, progress=SILENT)  # type: ignore[arg-type]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["base", "math", "code", "mixture"]
    num_right = {name: [count["num_right"] for count in row["accuracy"].values()] for name, row in rows.items()}
    assert num_right == {"base": [1, 2], "math": [1, 2], "code": [0, 4], "mixture": [2, 3]}
    asked = [tuple(request["alpha"]) for function, request in workers.asked if function == ".jobs:answer"]
    assert sorted(set(asked)) == [(0.0, 0.0), (0.0, 1.0)]  # the math expert changes nothing
    assert all(request["split"] == "gate" for _, request in workers.asked)
    assert {name: row["kl_to_base"]["code"] for name, row in rows.items()} == {
        "base": 0.0,
        "math": 10.0,
        "code": 10.0,
        "mixture": 12.5,
    }
    assert {gain["expert"]: gain["margin"] for gain in table["gains"]} == {"math": 0.0, "code": 0.5}
    assert {pair["against"]: pair["margin"] for pair in table["paired"]} == pytest.approx(
        {"base": 0.25, "math": 0.25, "code": 0.125}
    )
    rules = [request["rule"] for function, request in workers.asked if function == ".jobs:diverge"]
    assert (set(rules[:-1]), rules[-1]) == (
        {"delta"},
        "renorm",
    )  # experts alone as they were trained, the mixture as it was mixed
