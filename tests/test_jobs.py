"""Experts are trained and mixtures answer in worker processes: the same bytes whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from havoc_core import cores
from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.candidate import Candidate
from havoc_core.adapt.training_state import state_path
from havoc_core.config import Recipe
from havoc_core.errors import HavocError
from havoc_core.gate_split import GateJournal, score_rows
from havoc_core.jobs import Place
from havoc_core.measuring import BenchMeasurer, bind
from havoc_core.model.checkpoint import Base, load_base
from havoc_core.model.structure import Structure
from havoc_core.pipeline import train_experts
from havoc_core.progress import SILENT

RECIPE = Recipe.model_validate(
    {
        "experts": {
            "tasks": ["math", "code"],
            "num_steps": 2,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "num_validation_rows": 6,
            "max_new_tokens": 40,
        },
        "search": {"population": 4, "num_rows": 6},
        "gate": {"num_rows": 6},
    }
)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("nano")


def place_with(folder: Path, num_cores: int, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run's place on a machine that has so many cores."""
    monkeypatch.setattr(cores, "num_usable_cores", lambda: num_cores)
    monkeypatch.setattr(cores, "num_physical_cores", lambda: num_cores)
    return Place(RECIPE, folder, folder / "experts")


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place where two processes have trained both experts, one each."""
    with pytest.MonkeyPatch.context() as patch:
        place = place_with(tmp_path_factory.mktemp("whole"), 2, patch)
        train_experts(place, base, SILENT)
    return place


@pytest.mark.timeout(900)  # nine processes start, one after the other where there is one core
def test_experts_and_answers_do_not_depend_on_the_number_of_processes(
    base: Base, whole: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process or two: expert files equal byte for byte, and every row of search and gate answered alike."""
    files, answers, tables, moved = [], [], [], []
    for num_cores in (1, 2):
        place = place_with(tmp_path if num_cores == 1 else whole.out, num_cores, monkeypatch)
        _, experts = train_experts(place, base, SILENT)
        files.append({path.name: path.read_bytes() for path in place.experts.iterdir()})
        candidates = [Candidate((1.0, 0.5), Structure()), Candidate((0.0, 1.0), Structure(weight_format="int8"))]
        with BenchMeasurer(place, base, num_experts=2, bound=bind(RECIPE)) as measurer:
            assert measurer._workers.num_processes == num_cores
            answers.append(list(measurer.answers(candidates, sample=0)))
            moved.append(list(measurer.divergences([candidate.alpha for candidate in candidates])))
        table = score_rows(
            place,
            base,
            experts,
            alpha=(1.0, 0.5),
            mixture=answers[-1][0],
            journal=GateJournal(place, base, experts),
            progress=SILENT,
        )
        tables.append(table)
    assert files[0] == files[1]
    assert set(files[0]) == {
        "training_code.jsonl",
        "training_math.jsonl",
        "z_vectors_code.safetensors",
        "z_vectors_math.safetensors",
    }
    assert answers[0] == answers[1]
    assert not any(isinstance(given, HavocError) for given in answers[0])
    assert all(len(right) == 6 for given in answers[0] for right in given.values())
    assert tables[0] == tables[1]
    assert moved[0] == moved[1]
    assert all(nats >= 0 for kl_to_base in moved[0] for nats in kl_to_base.values())


@pytest.mark.timeout(900)
def test_a_run_goes_on_with_the_trainings_it_finds(
    base: Base, whole: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert has a state of its own: a finished one is read back, one that was cut goes on to the same bytes."""
    cut = place_with(tmp_path / "cut", 2, monkeypatch)
    shorter = RECIPE.model_copy(update={"experts": RECIPE.experts.model_copy(update={"tasks": ("math",)})})
    train_experts(Place(shorter, cut.out, cut.experts), base, SILENT)
    before = (cut.experts / "z_vectors_math.safetensors").stat().st_mtime_ns
    _, experts = train_experts(cut, base, SILENT)
    assert (cut.experts / "z_vectors_math.safetensors").stat().st_mtime_ns == before
    assert [expert.domain for expert in experts] == ["math", "code"]
    for path in whole.experts.iterdir():
        assert (cut.experts / path.name).read_bytes() == path.read_bytes()


def test_an_error_of_a_training_is_the_runs_error(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of other settings is refused by the worker, in one line and by the same class."""
    place = place_with(tmp_path, 1, monkeypatch)
    base_basis(base, tmp_path, SILENT)
    place.experts.mkdir()
    state_path(place.experts, "code").write_bytes(b"no state")
    with pytest.raises(HavocError, match="training_code.safetensors"):
        train_experts(place, base, SILENT)
