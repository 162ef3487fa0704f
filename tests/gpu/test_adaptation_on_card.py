"""Adaptation on a real NVIDIA card: experts, candidates and bases made there are the CPU's, by paired intervals.

Run by `make gpu` where torch was built for CUDA. `tests/adapt/test_on_a_card.py` tests the same code on any machine,
but for what only a card does: round in its own order, and keep memory.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from havoc_core import jobs
from havoc_core.adapt.basis import compute_basis
from havoc_core.adapt.expert import save_expert
from havoc_core.adapt.paired import paired_margin
from havoc_core.adapt.pretrain import PretrainSettings, pretrain
from havoc_core.adapt.svf import attach
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.evaluation import score
from havoc_core.adapt.tasks.task import load_task
from havoc_core.adapt.training import train_expert
from havoc_core.cli import main
from havoc_core.config import ExpertSettings, Recipe
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.devices import CUDA_PROVIDER
from havoc_core.jobs import training_settings
from havoc_core.messages import plain
from havoc_core.model.checkpoint import Base, load_base
from havoc_core.model.device import clear_cache, open_device
from havoc_core.model.scorer import TorchScorer
from havoc_core.model.structure import Structure
from havoc_core.progress import SILENT
from havoc_core.storage import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from havoc_core.adapt.basis import Basis
    from havoc_core.adapt.expert import Expert
    from havoc_core.adapt.tasks.task import Task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card and a torch built for CUDA"),
]
NUM_ROWS = 400
FARTHEST = 0.03
"""Share right by which two models that differ in rounding alone may differ on so many rows, whatever is proven."""
MATH = load_task("math")
SETTINGS = dataclasses.replace(training_settings(ExpertSettings(), MATH), num_steps=8, num_validation_rows=100)
DEVICES = ("cpu", "cuda")


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {device: load_base("nano", device=device) for device in DEVICES}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def basis(bases: dict[str, Base]) -> Basis:
    return compute_basis(bases["cpu"].tensors(), base_hash=bases["cpu"].weight_hash)


@pytest.fixture(scope="module")
def experts(bases: dict[str, Base], basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expert]:
    """Nano's math expert, trained in the same steps on each device."""
    return {
        device: train_expert(base, basis, MATH, settings=SETTINGS, checkpoint_dir=tmp_path_factory.mktemp(device))
        for device, base in bases.items()
    }


def answers(base: Base, task: Task) -> tuple[bool, ...]:
    rows = sources.rows(task, "search", NUM_ROWS, seed=1)
    return score(TorchScorer(base.model, base.tokenizer), task, rows).right


def require_equal(ours: tuple[bool, ...], theirs: tuple[bool, ...]) -> None:
    """Neither is proven better on the same rows, and they are near each other."""
    found = paired_margin({"task": ours}, {"task": theirs})
    print(f"{sum(ours)} and {sum(theirs)} right of {len(ours)}: {found}")
    assert found["low"] <= 0 <= found["high"]
    assert abs(found["margin"]) <= FARTHEST


@pytest.mark.parametrize("name", ["math", "code", "reasoning", "vision"])
def test_a_base_answers_as_on_the_cpu(bases: dict[str, Base], name: str) -> None:
    """On every task, pictures among them."""
    task = load_task(name)
    require_equal(*(answers(base, task) for base in bases.values()))


def test_an_expert_trained_there_is_as_good(bases: dict[str, Base], basis: Basis, experts: dict[str, Expert]) -> None:
    """Both answer on the CPU; both are better than the base, so that there is something to compare."""
    right = {}
    for device, expert in experts.items():
        with attach(bases["cpu"].model, basis) as adapter:
            adapter.load(expert.deltas)
            right[device] = answers(bases["cpu"], MATH)
    require_equal(right["cpu"], right["cuda"])
    assert sum(right["cuda"]) > sum(answers(bases["cpu"], MATH))
    made = experts["cuda"].settings["made_on"]
    assert (made["device"], made["name"], made["dtype"]) == ("cuda", torch.cuda.get_device_name(), "float32")


def test_the_first_step_is_the_cpus(experts: dict[str, Expert]) -> None:
    """Rewards differ where a sample differs; the base's validation before any step does not by much."""
    ours, theirs = (experts[device].settings["trace"] for device in DEVICES)
    assert len(ours) == len(theirs) == SETTINGS.num_steps
    assert theirs[0]["reward"] == pytest.approx(ours[0]["reward"], abs=0.15)
    assert all(step["loss"] is None or abs(step["loss"]) < 100 for step in theirs)


def test_a_base_learns_there_as_here(tmp_path: Path) -> None:
    """The same initial weights and rows: the losses of the first steps agree to a thousandth."""
    settings = PretrainSettings(
        num_steps=10, batch_size=16, rows_per_domain=200, num_tokenizer_rows=100, num_accuracy_rows=4
    )
    losses = {}
    for device in DEVICES:
        pretrain("nano", tmp_path / device, settings=settings, device=device)  # type: ignore[arg-type]
        record = read_json(tmp_path / device / "pretraining.json")
        losses[device], made_on = record["loss"], record["made_on"]
        assert made_on["device"] == device
    assert losses["cuda"][:3] == pytest.approx(losses["cpu"][:3], rel=1e-3)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2)


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_a_candidate_answers_there_as_here(
    basis: Basis, experts: dict[str, Expert], tmp_path: Path, weights: str
) -> None:
    """In every format that a search may choose; the memory it took is given back before the next one."""
    basis.save(tmp_path / "basis.safetensors")
    save_expert(experts["cpu"], tmp_path)
    right = {}
    for device in DEVICES:
        recipe = Recipe.model_validate({"model": {"device": device}, "experts": {"tasks": ["math"]}})
        place = jobs.Place(recipe, tmp_path, tmp_path)
        asked = jobs.AnswerRequest(
            mixtures=jobs.MixedModels(place=place, num_threads=4, rule="delta"),
            rows=jobs.RowRange(split="search", start=0, size=NUM_ROWS),
            tasks=("math",),
            alpha=(1.0,),
            structure=Structure.named(weights).to_fields(),
        )
        marks = jobs.answer(plain(asked), SILENT)["math"]
        right[device] = tuple(mark == "1" for mark in marks)
        jobs.diverge(
            plain(jobs.DivergeRequest(mixtures=asked.mixtures, rows=asked.rows, alphas=((1.0,), (0.5,)))), SILENT
        )
    require_equal(right["cpu"], right["cuda"])


def test_what_a_candidate_left_is_given_back() -> None:
    """Torch keeps what it allocated until it is told; then the card has it back."""
    device = open_device("cuda")
    clear_cache(device)
    before = torch.cuda.memory_reserved()
    left = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    del left
    assert torch.cuda.memory_reserved() - before >= 256 << 20
    clear_cache(device)
    assert torch.cuda.memory_reserved() <= before


def test_an_artifact_is_proven_on_the_card_too(tmp_path: Path) -> None:
    """Every case of the CPU once more, under the card's name, within the same limit."""
    name = torch.cuda.get_device_name()
    structure = Structure(weight_format="int8", compute="int8")
    cases = read_manifest(
        export_artifact("nano", tmp_path / "artifact", structure=structure, also_on={CUDA_PROVIDER: name})
    ).parity["cases"]
    on_card = [case for case in cases if case["name"].startswith(f"{name}, ")]
    assert len(on_card) >= 5
    assert {case["measure"] for case in on_card} == {"torch fp32"}


def test_the_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train`, `eval` and `export`, as a user types them."""
    out: Any = tmp_path / "experts"
    words = ["--task", "math", "--method", "next-token", "--steps", "2", "--device", "cuda", "--out", str(out)]
    assert main(["train", "nano", *words, "--quiet"]) == 0
    assert main(["eval", "nano", "--task", "math", "--n", "8", "--device", "cuda", "--quiet"]) == 0
    assert f"answered on {torch.cuda.get_device_name()} (cuda)" in capsys.readouterr().out
    assert main(["export", "nano", "--device", "cuda", "--out", str(tmp_path / "artifact"), "--quiet"]) == 0
