"""The search keeps its promises against a measurer whose true optimum is known."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import zlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pymoo.algorithms.moo.nsga2 import NSGA2

from havoc_core import storage
from havoc_core.adapt import search as searching
from havoc_core.adapt.candidate import COST_OBJECTIVES, Candidate, Cost, Evaluation, SearchSettings
from havoc_core.adapt.front import objectives
from havoc_core.adapt.search import SearchResult, search
from havoc_core.adapt.standing import Standing, standing_of
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.model.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

BEST = {"math": 1.0, "code": 0.5}
SPEED = {"fp32": 1.0, "int8": 0.6, "int4": 0.5}


class KnownLandscape:
    """Accuracy falls with the distance from BEST; cost depends on the format alone, with a little noise."""

    def __init__(
        self, *, fail_above: float = 9.0, throughput_noise: float = 0.001, best: Mapping[str, float] = BEST
    ) -> None:
        self._best = best
        self.num_answers = self.num_costs = 0
        self._fail_above, self._noise = fail_above, throughput_noise

    def costs(self, structures: Sequence[Structure]) -> Iterator[Cost | HavocError]:
        for structure in structures:
            try:
                yield self.cost(structure)
            except HavocError as error:
                yield error

    def cost(self, structure: Structure) -> Cost:
        self.num_costs += 1
        scale = SPEED[structure.weight_format]
        wobble = 1 + self._noise * (self.num_costs % 2)
        values = {"prefill_ms": 10 * scale * wobble, "peak_bytes": 1e6 * scale, "decode_tok_per_s": 100.0 * wobble}
        return Cost(values)

    def answers(
        self, candidates: Sequence[Candidate], *, sample: int
    ) -> Iterator[Mapping[str, tuple[bool, ...]] | HavocError]:
        for candidate in candidates:
            try:
                yield self.answer(candidate, sample)
            except HavocError as error:
                yield error

    def answer(self, candidate: Candidate, sample: int) -> Mapping[str, tuple[bool, ...]]:
        self.num_answers += 1
        if candidate.alpha[0] > self._fail_above:
            raise HavocError("alpha too large for this graph")
        lost = {"fp32": 0, "int8": 1, "int4": 8}[candidate.structure.weight_format]
        wanted = zip(candidate.alpha, self._best.items(), strict=True)
        num_right = {domain: max(0, 98 - lost - round(30 * abs(alpha - best))) for alpha, (domain, best) in wanted}
        return {domain: tuple(row < count - sample for row in range(100)) for domain, count in num_right.items()}


SETTINGS = SearchSettings(
    domains=("math", "code"),
    seed=3,
    population=10,
    generations=8,
    weight_formats=("fp32", "int8", "int4", "int4-cfp32"),
    alpha_bounds=(0.0, 2.0),
    normalize_alpha=False,
    num_repeats=1,
)


def test_search_comes_close_to_the_known_optimum(tmp_path: Path) -> None:
    """NSGA-II ends near the alpha that is best, and the front keeps cheaper formats beside it."""
    result = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    assert result.chosen.mean_accuracy > 0.9
    assert len({evaluation.candidate.structure.weight_format for evaluation in result.front}) > 1


def test_structures_are_given_by_name(tmp_path: Path) -> None:
    """Block sizes, zero points, quantizers and ranks are searched like formats; what is no structure is refused."""
    names = ("fp32", "int4a-hqq-b64", "int8-r0.50")
    settings = dataclasses.replace(SETTINGS, weight_formats=names)
    result = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    structures = {evaluation.candidate.structure for evaluation in result.evaluations}
    assert structures == {Structure.named(name) for name in names}
    with pytest.raises(HavocError, match="unknown structure 'int5'"):
        dataclasses.replace(SETTINGS, weight_formats=("fp32", "int5"))


def test_the_four_objectives_are_the_seeds() -> None:
    """Less latency, less memory, more throughput and more right answers are each better; nothing else is asked."""
    cost = {"prefill_ms": 10.0, "peak_bytes": 1e6, "decode_tok_per_s": 100.0, "kl_mean": 0.1}
    candidate = Candidate((1.0,), Structure())

    def asked(*, num_right: int = 5, **changes: float) -> list[float]:
        answers = {"math": tuple(row < num_right for row in range(10))}
        return objectives(Evaluation(candidate, answers, cost | changes), frozen=())

    better = ({"prefill_ms": 9.0}, {"peak_bytes": 9e5}, {"decode_tok_per_s": 101.0}, {"num_right": 6})
    for place, change in enumerate(better):
        moved = [new - old for new, old in zip(asked(**change), asked(), strict=True)]  # type: ignore[arg-type]
        assert [step < 0 for step in moved] == [place == other for other in range(4)]
        assert sum(step != 0 for step in moved) == 1
    assert asked(kl_mean=0.0) == asked()


def test_objective_inside_its_noise_is_frozen_and_named(tmp_path: Path) -> None:
    """Throughput is the same for every format here, so the search must not optimise its noise."""
    result = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    assert result.frozen == ("decode_tok_per_s",)
    assert result.to_json()["frozen"] == ["decode_tok_per_s"]


def test_chosen_value_is_the_second_score(tmp_path: Path) -> None:
    """The choice reports its score on fresh rows, not the one it was selected by."""
    result = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    screened = next(e for e in result.evaluations if e.candidate == result.chosen.candidate)
    assert result.chosen.mean_accuracy < screened.mean_accuracy


def test_failed_candidate_is_infeasible_with_its_reason(tmp_path: Path) -> None:
    """A candidate that cannot be measured never wins, and its reason is kept."""
    landscape = KnownLandscape(fail_above=0.5)
    result = search(landscape, settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    failed = result.to_json()["failed"]
    assert failed
    assert {entry["reason"] for entry in failed} == {"alpha too large for this graph"}
    assert all(evaluation.candidate.alpha[0] <= 0.5 for evaluation in result.front)


class FailingFinalists(KnownLandscape):
    """Sixty times slower than its limit, and some finalists cannot be scored on the fresh rows."""

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self._failing, self._num_again = failing, 0

    def cost(self, structure: Structure) -> Cost:
        return Cost({**super().cost(structure).values, "prefill_ms": 6000.0 * SPEED[structure.weight_format]})

    def answer(self, candidate: Candidate, sample: int) -> Mapping[str, tuple[bool, ...]]:
        self._num_again += sample
        if sample and self._num_again in self._failing:
            raise MeasurementError("the measuring process ended with code -9 without a result")
        return super().answer(candidate, sample)


class Diverging(KnownLandscape):
    """The farther the weights from 0, the farther the mixture from the base: 0.4 nats for each unit of alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[float, ...]] = []

    def divergences(self, alphas: Sequence[Sequence[float]]) -> Iterator[Mapping[str, float] | HavocError]:
        for alpha in alphas:
            self.asked.append(tuple(alpha))
            yield {"math": 0.4 * sum(alpha), "code": 0.1}


def test_the_divergence_from_the_base_is_a_constraint(tmp_path: Path) -> None:
    """BEST lies at 0.6 nats: under a limit of 0.5 the choice is nearer to the base, and every figure is on record."""
    path = tmp_path / "journal.jsonl"
    settings = dataclasses.replace(SETTINGS, max_kl=0.5)
    landscape = Diverging()
    result = search(landscape, settings=settings, journal_path=path)
    free = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "free.jsonl")
    assert sum(free.chosen.candidate.alpha) > 1.3
    assert sum(result.chosen.candidate.alpha) <= 1.25
    assert set(result.feasible) == {True, False}
    for one, is_within in zip(result.evaluations, result.feasible, strict=True):
        assert is_within == (0.4 * sum(one.candidate.alpha) <= 0.5)
    assert all(one["kl_to_base"]["code"] == 0.1 for one in result.to_json()["candidates"])
    assert len(landscape.asked) == len(set(landscape.asked))  # it depends on alpha alone
    again = Diverging()
    assert search(again, settings=settings, journal_path=path).to_json() == result.to_json()
    assert again.asked == []


def test_a_divergence_that_is_no_number_fails_its_candidates(tmp_path: Path) -> None:
    """Infinite, or not measured at all: never within the limit, and the reason is kept."""

    class Exploding(Diverging):
        def divergences(self, alphas: Sequence[Sequence[float]]) -> Iterator[Mapping[str, float] | HavocError]:
            for alpha, nats in zip(alphas, super().divergences(alphas), strict=True):
                if alpha[0] > 1.5:
                    yield HavocError("the logits are not finite")
                else:
                    yield {"math": float("inf"), "code": 0.1} if alpha[0] > 1.0 else nats

    result = search(
        Exploding(), settings=dataclasses.replace(SETTINGS, max_kl=0.5), journal_path=tmp_path / "journal.jsonl"
    )
    reasons = {failure["reason"] for failure in result.to_json()["failed"]}
    assert any("not finite: {'math': inf" in reason for reason in reasons)
    assert all(one.candidate.alpha[0] <= 1.0 for one in result.evaluations if not one.reason)


class Rounded(KnownLandscape):
    """int4 loses more to rounding than a target allows, and is the only one that loses much."""

    def cost(self, structure: Structure) -> Cost:
        format_cost = {"kl_mean": {"fp32": 0.0, "int8": 0.01, "int4": 0.3}[structure.weight_format], "top1_share": 0.9}
        return Cost({**super().cost(structure).values, **format_cost})


def test_what_a_format_costs_in_answers_is_a_constraint(tmp_path: Path) -> None:
    """The lightest format is over the limit on kl_mean, so the next one is the choice; objectives stay three."""
    limits = {"kl_mean": ("<", 0.15), "peak_bytes": ("<", 0.7e6)}
    settings = dataclasses.replace(SETTINGS, limits=limits)
    result = search(Rounded(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert result.chosen.candidate.structure.weight_format == "int8"
    chosen = next(one for one in result.to_json()["candidates"] if one["key"] == result.chosen.candidate.key())
    assert set(chosen["cost"]) == set(COST_OBJECTIVES)
    assert chosen["format_cost"] == pytest.approx({"kl_mean": 0.01, "top1_share": 0.9})


def test_a_limit_that_nobody_meets_chooses_nobody(tmp_path: Path) -> None:
    """Latency is over its limit in every format: the choice is the most accurate, and none counts as feasible.

    The format that missed the limit least was chosen before, at ten points less.
    """
    settings = dataclasses.replace(SETTINGS, limits={"prefill_ms": ("<", 1.0), "kl_mean": ("<", 0.5)})
    result = search(Rounded(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert result.unmet == ("prefill_ms",)
    assert result.to_json()["unmet"] == ["prefill_ms"]
    best = max(one.mean_accuracy for one in result.rescored)
    assert result.chosen.mean_accuracy == best
    assert result.chosen.candidate.structure.weight_format != "int4"
    assert not any(result.feasible)


OUT_OF_REACH = dataclasses.replace(SETTINGS, limits={"prefill_ms": ("<", 100.0)})


@pytest.mark.parametrize("failing", [(1,), (2,), (3,), (1, 3)])
def test_a_failed_finalist_is_never_chosen(failing: tuple[int, ...], tmp_path: Path) -> None:
    """However far the measured ones are from the limits; and `front.json` names the choice among the candidates."""
    result = search(FailingFinalists(*failing), settings=OUT_OF_REACH, journal_path=tmp_path / "journal.jsonl")
    assert result.chosen.reason == ""
    assert result.chosen.mean_accuracy > 0
    document = result.to_json()
    assert document["chosen"] in {candidate["key"] for candidate in document["candidates"]}
    again = [candidate["rescored_accuracy"] for candidate in document["candidates"]]
    assert {} not in again


def test_without_any_second_score_there_is_no_choice(tmp_path: Path) -> None:
    """All finalists failed: an error that says how, with an exit code that is not 0."""
    with pytest.raises(MeasurementError, match=r"none of the . best candidates .* code -9"):
        search(FailingFinalists(1, 2, 3, 4, 5), settings=OUT_OF_REACH, journal_path=tmp_path / "journal.jsonl")


def test_nsga2_ranks_every_failure_below_everything_measured(tmp_path: Path) -> None:
    """Measured candidates, each sixty times over its limit, survive; failed ones do not, though they miss by "1"."""
    seen: list[Any] = []

    class Watched(FailingFinalists):
        def answer(self, candidate: Candidate, sample: int) -> Mapping[str, tuple[bool, ...]]:
            if candidate.alpha[0] > 1.0 and not sample:
                raise HavocError("alpha too large for this graph")
            return super().answer(candidate, sample)

    class Spy(NSGA2):
        def _advance(self, *args: Any, **kwargs: Any) -> Any:
            answer = super()._advance(*args, **kwargs)
            seen.append((self.pop.get("CV").ravel(), self.pop.get("F")[:, -1]))
            return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.adapt.breeding.NSGA2", Spy)
        search(Watched(), settings=OUT_OF_REACH, journal_path=tmp_path / "journal.jsonl")
    violations, objectives = seen[-1]
    is_failed = objectives >= 1e9
    assert not is_failed.any()  # in eight generations every failure has been replaced by something measured
    assert violations.max() < 1e6
    first_violations, first_objectives = seen[1]
    assert first_violations[first_objectives >= 1e9].min(initial=1e12) > first_violations[first_objectives < 1e9].max()


def test_limits_are_constraints(tmp_path: Path) -> None:
    """A memory limit that only int4 meets makes int4 the choice, however accurate fp32 is."""
    settings = dataclasses.replace(SETTINGS, seed=0, population=12, generations=4, limits={"peak_bytes": ("<", 0.55e6)})
    result = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert result.chosen.candidate.structure.weight_format == "int4"


@pytest.mark.parametrize("num_kept", [1, 2, 5, 9, 30])
def test_killed_search_repeats_no_finished_evaluation_and_ends_the_same(tmp_path: Path, num_kept: int) -> None:
    """Cut the journal after any line, with a torn one behind it: the rest is measured once, the result is identical."""
    path = tmp_path / "journal.jsonl"
    whole = search(KnownLandscape(), settings=SETTINGS, journal_path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:num_kept]) + lines[num_kept][:20])
    landscape = KnownLandscape()
    landscape.num_costs = sum(b'"kind":"cost"' in line for line in lines[:num_kept])
    before = landscape.num_costs
    again = search(landscape, settings=SETTINGS, journal_path=path)
    assert again.to_json() == whole.to_json()
    assert landscape.num_answers + landscape.num_costs - before == len(lines) - num_kept
    assert path.read_bytes().splitlines() == [line.rstrip(b"\n") for line in lines]


def test_finished_search_is_read_back_without_measuring(tmp_path: Path) -> None:
    """The same command on a finished journal measures nothing."""
    path = tmp_path / "journal.jsonl"
    whole = search(KnownLandscape(), settings=SETTINGS, journal_path=path)
    landscape = KnownLandscape()
    assert search(landscape, settings=SETTINGS, journal_path=path).to_json() == whole.to_json()
    assert landscape.num_answers == landscape.num_costs == 0


@pytest.mark.parametrize("changes", [{"population": 8, "generations": 2}, {"measured": {"base": "another"}}], ids=str)
def test_journal_of_another_search_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """Settings, and what is measured on what, are part of the journal: results of two searches never mix."""
    path = tmp_path / "journal.jsonl"
    search(KnownLandscape(), settings=SETTINGS, journal_path=path)
    with pytest.raises(HavocError, match="other settings"):
        search(KnownLandscape(), settings=dataclasses.replace(SETTINGS, **changes), journal_path=path)


def test_unusable_cost_is_refused(tmp_path: Path) -> None:
    """A zero or missing cost is an error, never a very good candidate."""

    class Zero(KnownLandscape):
        def cost(self, structure: Structure) -> Cost:
            return Cost({**super().cost(structure).values, "peak_bytes": 0.0})

    with pytest.raises(HavocError, match="peak_bytes"):
        search(Zero(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")


def test_front_document_is_plain_json(tmp_path: Path) -> None:
    """`front.json` holds every candidate with alpha, structure, cost and both scores."""
    result = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    chosen = next(c for c in document["candidates"] if c["key"] == document["chosen"])
    assert set(chosen["cost"]) == set(COST_OBJECTIVES)
    assert chosen["rescored_accuracy"] is not None


def test_structure_that_cannot_be_measured_is_infeasible(tmp_path: Path) -> None:
    """One format that does not export loses its candidates, with its reason, and the search goes on."""

    class NoInt4(KnownLandscape):
        def cost(self, structure: Structure) -> Cost:
            if structure.weight_format == "int4":
                raise HavocError("int4 does not agree with torch")
            return super().cost(structure)

    result = search(NoInt4(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    assert {entry["reason"] for entry in result.to_json()["failed"]} == {"int4 does not agree with torch"}
    assert all(evaluation.candidate.structure.weight_format != "int4" for evaluation in result.front)


def _line(entry: dict[str, object]) -> bytes:
    body = storage.canonical_json(entry)
    return b"%08x %s\n" % (zlib.crc32(body), body)


WRONG_VALUES = [None, True, 0, -1, 1.5, "", "x", "2", [], [1], {}, {"math": 1}, {"math": "01"}, {"prefill_ms": "x"}]


def test_a_journal_whose_lines_have_another_shape_is_one_line_of_error(tmp_path: Path) -> None:
    """Checksums are right, contents are not: refused with the line, or harmless; never a crash (306 inputs were)."""
    settings = dataclasses.replace(SETTINGS, population=4, generations=1)
    path = tmp_path / "journal.jsonl"
    search(KnownLandscape(), settings=settings, journal_path=path)
    entries = storage.Journal(path).entries
    kinds = [entry.get("kind") for entry in entries]
    picked = [kinds.index("cost"), kinds.index("evaluation")]
    num_refused = 0
    for place in (0, *picked):
        for key in entries[place]:
            for value in (*WRONG_VALUES, ...):
                changed = dict(entries[place])
                changed.pop(key)
                if value is not ...:
                    changed[key] = value
                path.write_bytes(b"".join(map(_line, [*entries[:place], changed, *entries[place + 1 :]])))
                try:
                    search(KnownLandscape(), settings=settings, journal_path=path)
                except HavocError as error:
                    num_refused += 1
                    assert "\n" not in str(error)
    assert num_refused > 50


def test_where_each_candidate_came_from_is_on_record(tmp_path: Path) -> None:
    """In the journal and in `front.json`: generation, how it was made, and parents that are candidates themselves."""
    path = tmp_path / "journal.jsonl"
    document = search(KnownLandscape(), settings=SETTINGS, journal_path=path).to_json()
    origins = {candidate["key"]: candidate["origin"] for candidate in document["candidates"]}
    entries = [
        entry for entry in storage.Journal(path).entries if entry["kind"] == "evaluation" and not entry["sample"]
    ]
    assert {entry["key"].partition(":")[0]: entry["origin"] for entry in entries} == origins
    bred = [origin for origin in origins.values() if origin["kind"] == "bred"]
    assert len(bred) == SETTINGS.population * (SETTINGS.generations - 1)
    assert {parent for origin in bred for parent in origin["parents"]} <= set(origins)
    assert {origin["generation"] for origin in bred} == set(range(1, SETTINGS.generations))


def keys(result: SearchResult, kind: str) -> set[str]:
    pairs = zip(result.evaluations, result.origins, strict=True)
    return {one.candidate.key() for one, origin in pairs if origin.kind == kind}


@pytest.mark.parametrize(("best", "added"), [({"math": 1.0, "code": 1.0}, "bred"), (BEST, "seeded")])
def test_the_best_of_the_other_kind_is_scored_again_too(tmp_path: Path, best: Mapping[str, float], added: str) -> None:
    """Where the one finalist by rank was seeded, the best bred is another; where it was bred, the best seed is."""
    settings = dataclasses.replace(SETTINGS, num_finalists=1)
    result = search(KnownLandscape(best=best), settings=settings, journal_path=tmp_path / "journal.jsonl")
    first, second = (one.candidate.key() for one in result.rescored)
    assert first not in keys(result, added)
    scores = {one.candidate.key(): one.mean_accuracy for one in result.evaluations}
    assert scores[second] == max(scores[key] for key in keys(result, added))
    assert result.bred_against_seeded is not None
    assert result.bred_against_seeded[added] == second


def test_breeding_is_judged_on_rows_that_chose_nothing(tmp_path: Path) -> None:
    """The best bred and the best seeded candidate are both scored again, and compared row by row."""
    result = search(KnownLandscape(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
    verdict = result.bred_against_seeded
    assert verdict is not None
    scores = {one.candidate.key(): one.mean_accuracy for one in result.rescored}
    assert verdict["bred"] == max(scores.keys() & keys(result, "bred"), key=scores.__getitem__)
    assert verdict["seeded"] == max(scores.keys() - keys(result, "bred"), key=scores.__getitem__)
    assert verdict["margin"] == pytest.approx(scores[verdict["bred"]] - scores[verdict["seeded"]])
    assert verdict["margin"] > 0.05  # BEST is far from every point it starts from
    assert verdict["is_proven"]


def test_a_first_generation_alone_breeds_nothing(tmp_path: Path) -> None:
    """Then there is no verdict on breeding, and nothing has settled."""
    settings = dataclasses.replace(SETTINGS, generations=1)
    result = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert result.bred_against_seeded is None
    assert not result.convergence.is_converged


def test_convergence_is_told_by_the_hypervolume(tmp_path: Path) -> None:
    """It never shrinks; a long search settles, one of three generations is too short to tell."""
    long = search(
        KnownLandscape(), settings=dataclasses.replace(SETTINGS, generations=25), journal_path=tmp_path / "long.jsonl"
    ).convergence
    assert list(long.hypervolume) == sorted(long.hypervolume)
    assert len(long.hypervolume) == 25
    assert long.is_converged
    short = search(
        KnownLandscape(), settings=dataclasses.replace(SETTINGS, generations=3), journal_path=tmp_path / "short.jsonl"
    ).convergence
    assert not short.is_converged


def test_repeats_score_each_candidate_on_more_rows(tmp_path: Path) -> None:
    """Three samples are one average, and the finalists meet a fourth."""
    met: set[int] = set()

    class Watched(KnownLandscape):
        def answers(self, candidates: Sequence[Candidate], *, sample: int) -> Iterator[Any]:
            met.add(sample)
            return super().answers(candidates, sample=sample)

    settings = dataclasses.replace(SETTINGS, num_repeats=3, generations=2)
    result = search(Watched(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert met == {0, 1, 2, 3}
    assert {len(right) for one in result.evaluations for right in one.answers.values()} == {300}
    assert {len(right) for one in result.rescored for right in one.answers.values()} == {100}


class Disturbed(KnownLandscape):
    """A neighbour made the costs of int8 twenty times too high."""

    def cost(self, structure: Structure) -> Cost:
        cost = super().cost(structure)
        if structure.weight_format != "int8":
            return cost
        return Cost({**cost.values, "prefill_ms": 200.0}, "other processes used 90% of the CPU")


def test_a_cost_that_was_disturbed_is_not_believed(tmp_path: Path) -> None:
    """Speed plays no part then, as an objective or as a limit; memory still does, and nobody counts as within."""
    limits = {"prefill_ms": ("<", 100.0), "peak_bytes": ("<", 0.7e6)}
    settings = dataclasses.replace(SETTINGS, limits=limits)
    result = search(Disturbed(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert {"prefill_ms", "decode_tok_per_s"} <= set(result.frozen)
    assert result.to_json()["disturbance"] == "other processes used 90% of the CPU"
    assert result.chosen.candidate.structure.weight_format == "int8"  # the most accurate one that fits into memory
    assert not any(result.feasible)
    quiet = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "quiet.jsonl")
    assert any(quiet.feasible)
    assert "prefill_ms" not in quiet.frozen


def test_costs_of_another_device_are_held_against_no_limit(tmp_path: Path) -> None:
    """They rank candidates, and no candidate is within the limits by them."""
    settings = dataclasses.replace(
        SETTINGS, limits={"peak_bytes": ("<", 1.0)}, evidence="measured_other_device", generations=2
    )
    result = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "journal.jsonl")
    assert result.to_json()["evidence"] == "measured_other_device"
    assert not any(result.feasible)
    assert len(result.front) > 1  # the limit that all miss by far would have left one


class Counting:
    """A progress that counts: the total that was announced, what was advanced, and the notes."""

    def __init__(self) -> None:
        self.total, self.num_done = 0, 0
        self.notes: list[str] = []
        self.left_s: list[float | None] = []
        self.figures: list[Mapping[str, str]] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, *, unit: str = "") -> Iterator[Counting]:
        self.total = total or 0
        yield self

    def advance(self, n: int = 1, note: str = "") -> None:
        self.num_done += n
        self.notes.append(note)

    def tell(self, figures: Mapping[str, str], *, left_s: float | None = None) -> None:
        self.figures.append(figures)
        self.left_s.append(left_s)


def test_the_progress_announced_is_the_progress_made(tmp_path: Path) -> None:
    """Costs of every structure, every candidate, then the finalists, of which the best bred may be one more."""
    settings, counted = dataclasses.replace(SETTINGS, population=6, generations=3), Counting()
    result = search(KnownLandscape(), settings=settings, journal_path=tmp_path / "journal.jsonl", progress=counted)
    assert counted.total == 2 * 4 + 6 * 3 + settings.num_finalists
    assert 0 <= counted.num_done - counted.total <= 2
    assert counted.notes.count("candidates") == len(result.evaluations) == 18
    assert counted.notes.count("finalists on fresh rows") == len(result.rescored)
    assert len(counted.figures) == len(result.evaluations) + len(result.rescored)


class Named(KnownLandscape):
    """Every candidate fails, each with a reason of its own."""

    def answer(self, candidate: Candidate, sample: int) -> Mapping[str, tuple[bool, ...]]:
        self.num_answers += 1
        raise HavocError(f"failure {self.num_answers}")


def test_a_search_in_which_every_candidate_fails_tells_the_first_reason(tmp_path: Path) -> None:
    """One line: how many, and what went wrong first."""
    settings = dataclasses.replace(SETTINGS, population=4, generations=1)
    with pytest.raises(HavocError, match="none of the 4 candidates .*: failure 1$"):
        search(Named(), settings=settings, journal_path=tmp_path / "journal.jsonl")


def test_every_generation_is_recorded(tmp_path: Path) -> None:
    """Its figures when it was evaluated, and its hypervolume in the end, which never falls."""
    recorded: list[tuple[str, int | None, Mapping[str, float | None]]] = []
    settings = dataclasses.replace(SETTINGS, population=6, generations=3)
    result = search(
        KnownLandscape(),
        settings=settings,
        journal_path=tmp_path / "journal.jsonl",
        record=lambda axis, step, metrics: recorded.append((axis, step, metrics)),
    )
    figures = [(step, metrics) for _, step, metrics in recorded if "adas/hypervolume" not in metrics]
    volumes = [(step, metrics["adas/hypervolume"]) for _, step, metrics in recorded if "adas/hypervolume" in metrics]
    assert [step for step, _ in figures] == [step for step, _ in volumes] == [0, 1, 2]
    assert [volume for _, volume in volumes] == list(result.convergence.hypervolume)
    assert volumes[-1][1] >= volumes[0][1] > 0
    assert figures[-1][1]["adas/pareto_front_size"] == len(result.front)


def test_telling_where_a_search_stands_takes_two_percent_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standing that took 2 s is worked out again after 100 s; in between generation and counts alone are renewed."""
    now, asked = [0.0], []

    def slow(*words: Any, **named: Any) -> Standing:
        asked.append((now[0], named["num_costs"]))
        now[0] += 2
        return standing_of(*words, **named)

    class TenSeconds(KnownLandscape):
        def answer(self, candidate: Candidate, sample: int) -> Mapping[str, tuple[bool, ...]]:
            now[0] += 10
            return super().answer(candidate, sample)

    monkeypatch.setattr(searching, "standing_of", slow)
    monkeypatch.setattr(searching, "time", SimpleNamespace(monotonic=lambda: now[0]))
    counted, settings = Counting(), dataclasses.replace(SETTINGS, population=6, generations=3)
    search(TenSeconds(), settings=settings, journal_path=tmp_path / "journal.jsonl", progress=counted)
    assert [second - first for (first, _), (second, _) in itertools.pairwise(asked)] == [102.0] * 2
    assert {num_costs for _, num_costs in asked} == {8}
    told = [figures["generation"] for figures in counted.figures[:18]]
    assert told == ["1 of 3"] * 6 + ["2 of 3"] * 6 + ["3 of 3"] * 6
    assert len({figures["best feasible"] for figures in counted.figures[:18]}) > 1


def test_where_no_structure_can_be_measured_the_first_says_why(tmp_path: Path) -> None:
    """One line, before any candidate is asked."""

    class Full(KnownLandscape):
        def cost(self, structure: Structure) -> Cost:
            raise HavocError(f"no room for {structure}")

    with pytest.raises(MeasurementError, match="none of the structures .*; fp32 .*: no room for fp32-fp32$"):
        search(Full(), settings=SETTINGS, journal_path=tmp_path / "journal.jsonl")
