"""The gate split: the table holds what was answered, and what was answered once is not asked again."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from havoc_core import gate_split
from havoc_core.adapt.expert import Expert
from havoc_core.bench.accuracy import AccuracyRun
from havoc_core.config import Recipe
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.gate_split import GateJournal, score_artifact, score_rows
from havoc_core.jobs import Place
from havoc_core.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECIPE = Recipe.model_validate(
    {"experts": {"tasks": ["math", "code"]}, "search": {"rule": "renorm"}, "gate": {"num_rows": 4}}
)
RIGHT = {
    (0.0, 0.0): {"math": "1000", "code": "1100"},
    (1.0, 0.0): {"math": "1110", "code": "0100"},
    (0.0, 1.0): {"math": "0000", "code": "1111"},
}
MIXTURE = {"code": (True, True, True, False), "math": (True, True, False, False)}  # as a journal gives it back
BASE: Any = SimpleNamespace(weight_hash="b", model=SimpleNamespace(num_parameters=lambda: 1000))


class Answering:
    """Workers that answer from `RIGHT`, note what they are asked, and die at request number `dies_at`."""

    num_processes, num_threads = 2, 1

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._dies_at = dies_at

    def __enter__(self) -> Answering:  # noqa: PYI034 - a stand-in
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: str, requests: Sequence[Any], **_: object) -> Iterator[Any]:
        for request in requests:
            if len(self.asked) == self._dies_at:
                raise MeasurementError("killed")
            self.asked.append((function, request))
            if function == ".jobs:diverge":
                yield [{"math": sum(alpha), "code": 10 * sum(alpha)} for alpha in request.alphas]
            else:
                (task,), start = request.tasks, request.rows.start
                yield {task: RIGHT[tuple(request.alpha)][task][start : start + request.rows.size]}

    def answered(self) -> list[tuple[tuple[float, ...], str, int]]:
        """Each part that was asked: alpha, task, first row."""
        return [
            (tuple(request.alpha), request.tasks[0], request.rows.start)
            for function, request in self.asked
            if function == ".jobs:answer"
        ]


def expert(domain: str, value: float) -> Expert:
    return Expert(domain=domain, deltas={"w": torch.tensor([value, 0.0])}, base_hash="b", basis_hash="s")


EXPERTS = [expert("math", 0.2), expert("code", 0.1)]


def table_of(
    folder: Path, workers: Answering, monkeypatch: pytest.MonkeyPatch, experts: Sequence[Expert] = EXPERTS
) -> dict[str, Any]:
    monkeypatch.setattr(gate_split, "scoring_workers", lambda *_, **__: workers)
    monkeypatch.setattr(gate_split, "PART_ROWS", 3)
    place = Place(RECIPE, folder, folder / "experts")
    journal = GateJournal(place, BASE, experts)
    return score_rows(place, BASE, experts, alpha=(0.5, 0.75), mixture=MIXTURE, journal=journal, progress=SILENT)


def test_the_table_holds_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right rows, gains and divergences of each, from the jobs' answers; the base's twin is not asked."""
    workers = Answering()
    table = table_of(tmp_path, workers, monkeypatch, [expert("math", 0.0), expert("code", 0.1)])
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["base", "math", "code", "mixture"]
    assert {tuple(row["accuracy"]) for row in table["rows"]} == {("math", "code")}  # the recipe's order
    num_right = {name: [count["num_right"] for count in row["accuracy"].values()] for name, row in rows.items()}
    assert num_right == {"base": [1, 2], "math": [1, 2], "code": [0, 4], "mixture": [2, 3]}
    assert {alpha for alpha, _, _ in workers.answered()} == {(0.0, 0.0), (0.0, 1.0)}  # the math expert changes nothing
    assert all(request.rows.split == "gate" for _, request in workers.asked)
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
    rules = [request.mixtures.rule for function, request in workers.asked if function == ".jobs:diverge"]
    # experts alone as they were trained, the mixture as it was mixed
    assert (set(rules[:-1]), rules[-1]) == ({"delta"}, "renorm")


def test_what_was_answered_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind any answer, the next run asks exactly the rest, and its table is the one of a run in one piece."""
    one_piece = Answering()
    expected = table_of(tmp_path / "whole", one_piece, monkeypatch)
    parts = one_piece.answered()
    assert len(parts) == len(set(parts)) == 3 * 2 * 2  # contestants, tasks, parts of 3 and 1 rows
    for num_answered in range(len(parts) + 1):
        folder = tmp_path / str(num_answered)
        first, second = Answering(dies_at=num_answered), Answering()
        with pytest.raises(MeasurementError, match="killed"):
            table_of(folder, first, monkeypatch)
        assert table_of(folder, second, monkeypatch) == expected
        assert first.answered() + second.answered() == parts


def test_answers_of_other_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal counts for the base, experts and rows that it was written for."""
    table_of(tmp_path, Answering(), monkeypatch)
    with pytest.raises(HavocError, match="other experts"):
        table_of(tmp_path, Answering(), monkeypatch, [expert("math", 0.2), expert("code", 0.3)])


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"kind": "part", "name": "base", "task": "math", "start": 0, "right": "12"},
        {"kind": "part", "name": "base", "task": "math", "start": "x", "right": "1"},
        {"kind": "part", "name": "base", "task": "math", "start": 0, "right": 5},
        {"kind": "artifact", "run": 3},
        {
            "kind": "artifact",
            "run": {"files": {}, "manifest_sha256": "", "tasks": {}, "right": {"a": "1"}, "num_cut": {}},
        },
    ],
)
def test_a_line_that_no_scoring_writes_is_one_error(
    entry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line with a good checksum and another shape ends in one clear line."""
    table_of(tmp_path, Answering(), monkeypatch)
    body = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    with (tmp_path / "gate.jsonl").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(body), body))
    with pytest.raises(HavocError, match="HAVOC did not write"):
        table_of(tmp_path, Answering(), monkeypatch)


def test_a_part_of_another_length_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to fewer rows than a part has stand for nothing."""
    expected = table_of(tmp_path, Answering(), monkeypatch)
    GateJournal(Place(RECIPE, tmp_path, tmp_path), BASE, EXPERTS).keep("base", "math", 0, "11")
    again = Answering()
    assert table_of(tmp_path, again, monkeypatch) == expected
    assert again.answered() == [((0.0, 0.0), "math", 0)]


def test_the_artifact_is_scored_once_for_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are read back for exactly its files and manifest; another artifact is scored."""
    there = {"manifest.json": "m", "model.onnx": "a"}
    scored: list[Path] = []

    def run_accuracy(artifact: Path, *_: object, **__: object) -> AccuracyRun:
        scored.append(artifact)
        files = {name: sha for name, sha in there.items() if name != "manifest.json"}
        return AccuracyRun(files=files, manifest_sha256=there["manifest.json"], tasks={}, right={})

    monkeypatch.setattr(gate_split, "run_accuracy", run_accuracy)
    monkeypatch.setattr("havoc_core.bench.judge.gate.hash_artifact", lambda _: dict(there))
    place = Place(RECIPE, tmp_path, tmp_path / "experts")
    runs = []
    for model, manifest in (("a", "m"), ("a", "m"), ("b", "m"), ("b", "n"), ("b", "n"), ("a", "m")):
        there |= {"model.onnx": model, "manifest.json": manifest}
        runs.append(score_artifact(place, BASE, tmp_path, GateJournal(place, BASE, EXPERTS), SILENT))
    assert [run.files["model.onnx"] + run.manifest_sha256 for run in runs] == ["am", "am", "bm", "bn", "bn", "am"]
    assert len(scored) == 3
