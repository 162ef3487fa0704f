"""What the pipeline hands from the bench to the search: no figure is lost or made up on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from havoc_core import jobs, measuring
from havoc_core.adapt.candidate import Candidate
from havoc_core.config import Recipe
from havoc_core.cores import cpu_name
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.jobs import DivergeRequest, Place
from havoc_core.measuring import COST_RETRIES, BenchMeasurer, bind, limits_of, require_device, search_settings
from havoc_core.messages import plain
from havoc_core.model.checkpoint import load_base
from havoc_core.model.structure import Structure
from havoc_core.processes import Workers
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
        self.asked: list[tuple[str, Any]] = []
        self.is_ended = False
        self._answers = answers

    def __enter__(self) -> Recorded:  # noqa: PYI034 - a stand-in
        return self

    def __exit__(self, *_: object) -> None: ...

    def end(self) -> None:
        self.is_ended = True

    def run(self, function: str, requests: Sequence[Any], **_: object) -> Iterator[Any]:
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
    assert [(r.rows.split, r.rows.start, r.rows.size) for r in requests] == [
        ("search", 30 + 20 * sample, 20) for sample in (0, 0, 1, 1, 2, 2)
    ]
    assert [tuple(r.alpha) for r in requests[:2]] == [(1.0, 0.25), (0.5, 0.0)]
    assert [r.structure["weight_format"] for r in requests[:2]] == ["int8", "fp32"]
    assert {r.mixtures.rule for r in requests} == {"renorm"}


def test_divergences_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers share five alphas; a failed part fails its alphas alone."""

    def diverge(request: DivergeRequest) -> Any:
        if (9.0,) in request.alphas:
            return HavocError("not finite")
        return [{"math": alpha[0]} for alpha in request.alphas]

    workers = Recorded({".jobs:diverge": diverge})
    with measurer_with(workers, monkeypatch) as measurer:
        alphas = [(0.0,), (1.0,), (2.0,), (3.0,), (4.0,)]
        assert [one["math"] for one in measurer.divergences(alphas)] == [0.0, 1.0, 2.0, 3.0, 4.0]  # type: ignore[index]
        found = list(measurer.divergences([(0.0,), (9.0,), (2.0,)]))
    assert [isinstance(one, HavocError) for one in found] == [False, True, False]
    assert {request.rows.start for _, request in workers.asked} == {30}


ON_CARD = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"device": "cuda"})})


def test_one_worker_has_a_card_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many cores there are; on the CPU they are shared out."""
    monkeypatch.setattr(jobs, "processes_for", lambda *_, **__: 7)
    base: Any = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 1000))
    for device, num_processes in (("cpu", 7), ("cuda", 1)):
        assert jobs.training_workers(base, 9, num_threads=1, device=device).num_processes == num_processes  # type: ignore[arg-type]
        scoring = jobs.scoring_workers(base, 9, num_experts=2, num_threads=1, device=device)  # type: ignore[arg-type]
        assert scoring.num_processes == num_processes


@pytest.mark.parametrize(("recipe", "num_ended"), [(RECIPE, 0), (ON_CARD, 1)], ids=["cpu", "cuda"])
def test_no_worker_holds_a_card_while_a_cost_is_measured(
    recipe: Recipe, num_ended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the measured one, and memory that is not the artifact's would be counted against it."""
    ended: list[str] = []
    workers = Recorded({})
    monkeypatch.setattr(workers, "end", lambda: ended.append("workers"))
    monkeypatch.setattr(measuring, "scoring_workers", lambda *_, **__: workers)
    monkeypatch.setattr(measuring, "export_artifact", lambda *_, **__: ended.append("exported"))

    def measure_cost(*_: object, **__: object) -> Any:
        raise HavocError("measured")

    monkeypatch.setattr(measuring, "measure_cost", measure_cost)
    bound = bind(RECIPE)
    with BenchMeasurer(jobs.Place(recipe, Path(), Path()), None, num_experts=2, bound=bound) as measurer:  # type: ignore[arg-type]
        (failure,) = measurer.costs([Structure()])
        assert str(failure) == "measured"
        assert ended == [*["workers"] * num_ended, "exported"]


def test_answers_of_two_devices_never_share_a_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's journals are as they were; a card's name is in the settings that a journal belongs to."""
    base, bound = load_base("nano"), bind(RECIPE)
    ours = search_settings(RECIPE, base, [], bound)
    assert "answered_on" not in ours.measured
    assert measuring.answered_on(RECIPE) == {"device": "cpu", "name": cpu_name()}
    monkeypatch.setattr(measuring, "identify_device", lambda _: SimpleNamespace(kind="cuda", name="a card"))
    theirs = search_settings(ON_CARD, base, [], bound)
    assert theirs.measured == {**ours.measured, "answered_on": {"device": "cuda", "name": "a card"}}
    assert dataclasses.replace(theirs, measured=ours.measured) == ours


def test_a_device_is_tried_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch here, and by ONNX Runtime in a worker that then ends; the CPU needs neither."""
    asked: list[tuple[str, list[Any]]] = []

    def run(self: Workers, function: str, requests: list[Any], **_: object) -> Iterator[Any]:
        asked.append((function, requests))
        yield IdentityError("device cuda: it was tried")

    monkeypatch.setattr(Workers, "run", run)
    require_device(RECIPE)
    assert asked == []
    monkeypatch.setattr(measuring, "open_device", lambda _: None)
    with pytest.raises(IdentityError, match="it was tried"):
        require_device(ON_CARD)
    assert asked == [(".jobs:try_device", [jobs.DeviceRequest(device="cuda")])]


def test_a_card_that_onnx_runtime_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch can: experts would be trained for hours, and no candidate answered."""
    request = plain(jobs.DeviceRequest(device="cpu"))
    assert jobs.try_device(request, SILENT) == cpu_name()
    monkeypatch.setattr("havoc_core.bench.doctor.provider_problem", lambda provider: f"{provider} was tried")
    with pytest.raises(IdentityError, match="device cpu: CPUExecutionProvider was tried; ONNX Runtime"):
        jobs.try_device(request, SILENT)


def test_no_worker_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One alpha is one request, however many workers there are."""
    workers = Recorded({".jobs:diverge": lambda request: [{"math": alpha[0]} for alpha in request.alphas]})
    with measurer_with(workers, monkeypatch) as measurer:
        assert list(measurer.divergences([(3.0,)])) == [{"math": 3.0}]
    assert [request.alphas for _, request in workers.asked] == [((3.0,),)]


def test_a_candidate_that_failed_is_given_as_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on with the others."""
    failure = HavocError("not finite")
    workers = Recorded({".jobs:answer": lambda request: failure if request.alpha == (9.0,) else {"math": "1"}})
    with measurer_with(workers, monkeypatch) as measurer:
        candidates = [Candidate((9.0,), Structure()), Candidate((1.0,), Structure())]
        assert list(measurer.answers(candidates, sample=0)) == [failure, {"math": (True,)}]


def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are ended, and the exported structures are gone."""
    workers = Recorded({})
    with measurer_with(workers, monkeypatch) as measurer:
        folder = measurer._folder
        assert folder.is_dir()
        assert not workers.is_ended
    assert workers.is_ended
    assert not folder.exists()


def test_another_device_is_measured_only_where_the_recipe_allows_it(tmp_path: Path) -> None:
    """By its name it is refused; allowed, its figures never count as the target's."""
    path = tmp_path / "own.toml"
    path.write_text('[own]\nextends = "host"\n[own.device]\nkind = "cpu"\nnames = ["a CPU that nobody has"]\n')
    path.write_text(path.read_text().replace('kind = "cpu"\n', 'kind = "cpu"\nis_this_machine = false\n'))
    own = RECIPE.model_copy(update={"gate": RECIPE.gate.model_copy(update={"targets": (str(path),)})})
    with pytest.raises(IdentityError, match="target own: .*; search on that device, or give --on-this-machine"):
        bind(own)
    allowed = own.model_copy(update={"search": own.search.model_copy(update={"on_this_machine": True})})
    assert bind(allowed).evidence == "measured_other_device"
    assert bind(RECIPE).evidence == "measured_target"


def test_the_first_target_is_what_is_searched_for() -> None:
    """Its limits are the constraints and its name is in the journal's key; a second one is only judged by."""
    both = RECIPE.model_copy(update={"gate": RECIPE.gate.model_copy(update={"targets": ("host", "ci")})})
    base: Any = SimpleNamespace(weight_hash="0" * 64)
    settings = search_settings(both, base, [], bind(both))
    assert settings.measured["target"] == "host"
    assert settings.limits == limits_of("host", ["math", "code"]) != limits_of("ci", ["math", "code"])


@pytest.mark.parametrize(("disturbance", "second"), [("a neighbour", 0), ("", COST_RETRIES)])
def test_a_structure_is_exported_once_and_measured_as_it_is(
    monkeypatch: pytest.MonkeyPatch, disturbance: str, second: int
) -> None:
    """Its times are the bench's, what it costs in answers is its manifest's, and the bound work is what is measured.

    Once a cost stayed disturbed, later ones are not repeated: the search ranks nothing by speed any more.
    """
    bound, asked, exported = bind(RECIPE), [], []
    export_artifact = measuring.export_artifact

    def measured(artifact: Path, **options: Any) -> Any:
        asked.append((artifact, options))
        return SimpleNamespace(prefill_ms=2.0, peak_bytes=3, decode_tok_per_s=4.0, disturbance=disturbance)

    def watched(base: Any, artifact: Path, **options: Any) -> Path:
        exported.append(artifact)
        return export_artifact(base, artifact, **options)

    monkeypatch.setattr(measuring, "measure_cost", measured)
    monkeypatch.setattr(measuring, "export_artifact", watched)
    monkeypatch.setattr(measuring, "scoring_workers", lambda *_, **__: Recorded({}))
    with BenchMeasurer(PLACE, load_base("nano"), num_experts=1, bound=bound) as measurer:
        cost, again = measurer.costs([Structure(weight_format="int8")] * 2)
        format_cost = read_manifest(exported[0]).format_cost
    assert len(exported) == 1
    assert [artifact for artifact, _ in asked] == exported * 2
    options = asked[0][1]
    assert (options["device"], options["provider"], options["workload"]) == (
        bound.device,
        bound.provider,
        bound.workload,
    )
    assert format_cost is not None
    assert cost == again
    assert cost.values == {
        "prefill_ms": 2.0,
        "peak_bytes": 3.0,
        "decode_tok_per_s": 4.0,
        "kl_mean": format_cost["kl_mean"],
        "top1_share": format_cost["top1_share"],
    }
    assert cost.disturbance == disturbance
    assert [options["num_retries"] for _, options in asked] == [COST_RETRIES, second]
