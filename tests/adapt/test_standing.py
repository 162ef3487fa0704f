"""Where a search stands, by its journal: the same as the search itself says, and read while it is written."""

from __future__ import annotations

import dataclasses
import json
import random
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from havoc_core.adapt.candidate import COST_OBJECTIVES, Candidate, Evaluation
from havoc_core.adapt.front import front_of, objectives
from havoc_core.adapt.ledger import Ledger
from havoc_core.adapt.pace import Pace, Pacer, read_pace
from havoc_core.adapt.search import search
from havoc_core.adapt.standing import read_so_far
from havoc_core.errors import HavocError
from havoc_core.model.structure import Structure
from havoc_core.progress import LineProgress
from havoc_core.storage import Journal, canonical_json, read_journal

searches = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_search.py"))))
SETTINGS = dataclasses.replace(searches.SETTINGS, population=6, generations=4, max_kl=0.9)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of a finished search whose limit on the divergence some candidates break."""
    path = tmp_path_factory.mktemp("search") / "journal.jsonl"
    search(searches.Diverging(), settings=SETTINGS, journal_path=path)
    return path


def test_the_journal_says_what_the_search_says(journal: Path, tmp_path: Path) -> None:
    """Front, hypervolume and number of candidates are those of the result, read from the file alone."""
    result = search(searches.Diverging(), settings=SETTINGS, journal_path=tmp_path / "own.jsonl")
    found = read_so_far(journal)
    standing = found.standing
    assert [one.candidate for one in found.evaluations] == [one.candidate for one in result.evaluations]
    assert [one.kl_to_base for one in found.evaluations] == [one.kl_to_base for one in result.evaluations]
    assert found.origins == result.origins
    assert standing.front_size == len(result.front)
    assert standing.hypervolume == pytest.approx(result.convergence.hypervolume[-1])
    assert (standing.generation, standing.num_generations) == (3, 4)
    assert (standing.num_evaluated, standing.num_planned) == (len(result.evaluations), 24)
    assert (standing.num_costs, standing.num_costs_planned) == (8, 8)
    assert standing.num_rescored == len(result.rescored)
    best = max(one.mean_accuracy for one, is_in in zip(result.evaluations, result.feasible, strict=True) if is_in)
    assert (standing.best_accuracy, standing.is_best_feasible) == (best, True)
    assert json.loads(json.dumps(standing.to_json()))["best"]["structure"]


@pytest.mark.parametrize("kept", [0, 1, 3, 9, 15, 40])
def test_a_journal_that_is_being_written_is_read(journal: Path, tmp_path: Path, kept: int) -> None:
    """After any line, and in the middle of the next one; the file is left as it is."""
    lines = journal.read_bytes().splitlines(keepends=True)
    path = tmp_path / "journal.jsonl"
    for torn in (b"", lines[kept + 1][:-9], lines[kept + 1][:-1]):
        data = b"".join(lines[: kept + 1]) + torn
        path.write_bytes(data)
        found = read_so_far(path).standing
        assert path.read_bytes() == data
        assert found.num_costs == min(kept, 8)
        assert found.num_evaluated == sum(b'"kind":"evaluation"' in line for line in lines[: kept + 1])
    assert read_journal(path) == [json.loads(line[9:]) for line in lines[: kept + 1]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lines: [lines[0], b"00000000 {}\n", *lines[2:]], "line 2 is damaged"),
        (lambda lines: lines[1:], "not the journal of a search"),
        (lambda _: [], "not the journal of a search"),
    ],
    ids=["damaged", "headless", "empty"],
)
def test_what_is_no_journal_is_one_line(journal: Path, tmp_path: Path, spoil: object, words: str) -> None:
    """Damage that no writer leaves is not passed over."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(spoil(journal.read_bytes().splitlines(keepends=True))))  # type: ignore[operator]
    with pytest.raises(HavocError, match=words):
        read_so_far(path)


def test_a_line_of_another_version_is_one_line(journal: Path, tmp_path: Path) -> None:
    """Whole and with its checksum, and yet a search of this version it."""
    path = tmp_path / "journal.jsonl"
    own = Journal(path)
    for entry in read_journal(journal)[:20]:
        if entry.get("kind") == "evaluation":
            entry["origin"] = {"kind": "bred", "century": 3, "parents": []}
        own.append(entry)
    with pytest.raises(HavocError, match="a search of this version"):
        read_so_far(path)
    assert canonical_json(own.entries[-1])


class Clock:
    """Every measurement takes so long, and nothing else takes any time."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


class Slow(searches.KnownLandscape):
    """Ten seconds a cost, three an answer."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def cost(self, structure):
        self._clock.now_s += 10
        return super().cost(structure)

    def answer(self, candidate, sample):
        self._clock.now_s += 3
        return super().answer(candidate, sample)


def test_pace_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of work by kind, over two runs whose pause does not count; the rest follows from them."""
    clock, path = Clock(), tmp_path / "journal.jsonl"
    settings = dataclasses.replace(SETTINGS, max_kl=None, num_repeats=2)
    monkeypatch.setattr("havoc_core.adapt.search.Ledger", lambda *words: Ledger(*words, clock=clock))
    search(Slow(clock), settings=settings, journal_path=path)
    pace = read_pace(tmp_path)
    assert (pace.s_per_cost, pace.s_per_sample) == (10.0, 3.0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:21]))  # the opening, 8 costs, a generation of 6 with 2 samples each
    standing = read_so_far(path).standing
    assert (standing.num_evaluated, standing.generation) == (6, 0)
    assert standing.evaluations_per_min == pytest.approx(10.0)
    assert standing.left_s == pytest.approx((18 * 2 + 3) * 3.0)
    path.write_bytes(b"".join(lines[:17]))  # the first sample of all six, the second of two of them
    assert read_so_far(path).standing.num_evaluated == 2
    clock.now_s += 1e6  # nobody was at work
    search(Slow(clock), settings=settings, journal_path=path)
    assert read_pace(tmp_path).s_per_sample == 3.0


def test_a_divergence_is_part_of_its_candidates_time(tmp_path: Path) -> None:
    """Its seconds count for the samples that are answered after it, and it is no sample itself."""
    clock = Clock()
    pacer = Pacer(tmp_path, clock=clock)
    for kind, seconds in (("cost", 7.0), ("divergence", 4.0), ("evaluation", 1.0), ("evaluation", 1.0)):
        clock.now_s += seconds
        pacer.count(kind)
    assert (pacer.pace.s_per_cost, pacer.pace.s_per_sample) == (7.0, 3.0)
    assert read_pace(tmp_path) == pacer.pace


def test_a_damaged_pace_is_none(tmp_path: Path) -> None:
    """It decides nothing, so it stops nothing: unknown until it is counted again."""
    for text in ("{", "[]", "null", '{"cost_s": "x"}', '{"num_costs": -1}', '{"speed": 1}'):
        (tmp_path / "pace.json").write_text(text)
        assert read_pace(tmp_path) == Pace()
    Pacer(tmp_path, clock=time.monotonic).count("cost")
    assert read_pace(tmp_path).num_costs == 1


def test_the_search_tells_its_standing(tmp_path: Path) -> None:
    """Plain lines in a log name generation, front, hypervolume, best feasible and pace."""
    import io

    stream, clock = io.StringIO(), Clock()

    class Ticking(searches.KnownLandscape):
        def answer(self, candidate, sample):
            clock.now_s += 20
            return super().answer(candidate, sample)

    progress = LineProgress(stream, clock=clock)
    settings = dataclasses.replace(SETTINGS, max_kl=None)
    search(Ticking(), settings=settings, journal_path=tmp_path / "journal.jsonl", progress=progress)
    line = next(line for line in stream.getvalue().splitlines() if "generation 3 of 4" in line)
    for words in ("candidates, ", "front ", "hypervolume ", "best feasible ", "evaluations a minute "):
        assert words in line


def test_the_front_is_what_nothing_dominates() -> None:
    """By its definition, in the order of evaluation, equal points side by side."""
    draw = random.Random(1)
    costs = [dict.fromkeys(COST_OBJECTIVES, float(draw.randint(1, 3))) for _ in range(60)]
    evaluations = [
        Evaluation(
            Candidate((float(place), 0.0), Structure()),
            {"math": tuple(row < draw.randint(1, 4) for row in range(4)), "code": (True,)},
            {**cost, "prefill_ms": float(draw.randint(1, 4))},
            kl_to_base={"math": 0.1, "code": 0.1},
        )
        for place, cost in enumerate(costs)
    ]
    points = [objectives(one, ()) for one in evaluations]
    expected = [
        one
        for one, point in zip(evaluations, points, strict=True)
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
    ]
    assert 1 < len(expected) < 60
    assert front_of(evaluations, SETTINGS, ()) == expected
