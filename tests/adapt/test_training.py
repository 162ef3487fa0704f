"""Training by each method: it goes on exactly after an interruption, lists its steps, and gives the base back."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from havoc_core import storage
from havoc_core.adapt import reinforce
from havoc_core.adapt.basis import Basis
from havoc_core.adapt.expert import load_expert
from havoc_core.adapt.optimizer import MuGrokConfig
from havoc_core.adapt.reading import layer_of
from havoc_core.adapt.tasks.task import load_task
from havoc_core.adapt.tensor_file import digest_of
from havoc_core.adapt.training import train_expert
from havoc_core.adapt.training_state import (
    TrainingState,
    forget_training,
    load_state,
    save_state,
    state_path,
    trace_path,
)
from havoc_core.cli import main
from havoc_core.config import ExpertSettings
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.jobs import training_settings
from havoc_core.model.checkpoint import Base
from tests.adapt.interrupted import StopAfter, StoppedError

MATH = load_task("math")
SMALL = dataclasses.replace(
    training_settings(ExpertSettings(), MATH),
    num_steps=4,
    prompts_per_step=12,
    samples_per_prompt=4,
    num_train_rows=40,
    num_validation_rows=8,
    validate_every=2,
    optimizer=MuGrokConfig.from_phase(7),
)


def test_training_gives_the_base_back_bit_for_bit(base: Base, basis: Basis, tmp_path: Path) -> None:
    """An expert is a file of its own; the base model in memory is as before."""
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    one_step = dataclasses.replace(SMALL, num_steps=1)
    train_expert(base, basis, MATH, settings=one_step, checkpoint_dir=tmp_path)
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["reinforce", "next-token"])
def test_interrupted_training_ends_as_if_it_had_not_been(base: Base, basis: Basis, tmp_path: Path, method: str) -> None:
    """Stopped after two of four steps and started again: the same deltas, bit for bit, and every step listed once."""
    small = dataclasses.replace(SMALL, method=method)
    whole = train_expert(base, basis, MATH, settings=small, checkpoint_dir=tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(StoppedError):
        train_expert(base, basis, MATH, settings=small, checkpoint_dir=cut, progress=StopAfter(2))
    assert state_path(cut, "math").exists()
    again = train_expert(base, basis, MATH, settings=small, checkpoint_dir=cut)
    assert all(torch.equal(whole.deltas[name], again.deltas[name]) for name in whole.deltas)
    assert whole.settings["trace"] == again.settings["trace"]
    listed = [json.loads(line) for line in trace_path(cut, "math").read_text().splitlines()]
    assert [entry["step"] for entry in listed] == [1, 2, 3, 4]
    assert listed == list(whole.settings["trace"])
    assert trace_path(cut, "math").read_bytes() == trace_path(tmp_path / "whole", "math").read_bytes()


def test_a_finished_training_keeps_its_list_of_steps(base: Base, basis: Basis, tmp_path: Path) -> None:
    """The state goes once the expert is written; what happened step by step stays."""
    train_expert(base, basis, MATH, settings=dataclasses.replace(SMALL, num_steps=1), checkpoint_dir=tmp_path)
    forget_training(tmp_path, "math")
    assert [path.name for path in tmp_path.iterdir()] == ["training_math.jsonl"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a training of two small matrices after two steps."""
    folder = tmp_path_factory.mktemp("stopped")
    deltas = {"a": torch.randn(8), "b": torch.randn(16)}
    state = TrainingState(
        num_done=2,
        deltas=deltas,
        best={name: value.clone() for name, value in deltas.items()},
        best_score={"num_right": 1, "num_rows": 8, "step": 2},
        trace=[{"step": 1}, {"step": 2}],
        optimizer={"state": {0: {"momentum": torch.ones(8)}}, "lr": 0.1},
    )
    save_state(state, folder, "math", key="0" * 64)
    return folder


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(state_path(folder, "math"), "pt") as file:
        texts = {key: value for key, value in file.metadata().items() if key != "sha256"}
        return {key: file.get_tensor(key) for key in file.keys()}, texts  # noqa: SIM118 - not a dict


def test_a_flipped_bit_in_a_state_is_found(stopped: Path, tmp_path: Path) -> None:
    """Anywhere: in a delta it gave another expert unnoticed, in the header a defect with exit code 70."""
    data, key = state_path(stopped, "math").read_bytes(), contents(stopped)[1]["key"]
    assert load_state(stopped, "math", key=key) is not None
    rng = random.Random(4)
    for place in [*rng.sample(range(len(data)), 20), *rng.sample(range(600), 20), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        state_path(tmp_path, "math").write_bytes(damaged)
        with pytest.raises(HavocError, match="remove it") as caught:
            load_state(tmp_path, "math", key=key)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("progress", "{}"),
        ("progress", '{"done": 7, "best": {}, "trace": []}'),
        ("progress", "[]"),
        ("progress", "nothing"),
        ("optimizer", '{"tensor": "nowhere"}'),
        ("optimizer", '{"a": 1, "b": 2}'),
        ("optimizer", "[" * 50_000),
    ],
)
def test_a_state_of_another_shape_is_one_line(stopped: Path, tmp_path: Path, name: str, text: str) -> None:
    """Whoever computes the digest anew as well still brings about one line of error."""
    forge(stopped, tmp_path, {name: text})
    with pytest.raises(HavocError, match="remove it"):
        load_state(tmp_path, "math", key=contents(stopped)[1]["key"])


def forge(stopped: Path, folder: Path, changes: dict[str, str]) -> None:
    """Write a state with some texts replaced and a right digest."""
    tensors, texts = contents(stopped)
    texts |= changes
    digest = storage.sha256_json({"tensors": digest_of(tensors), **texts})
    state_path(folder, "math").write_bytes(safetensors.torch.save(tensors, {**texts, "sha256": digest}))


def test_a_state_that_fits_no_optimizer_is_one_line(base: Base, basis: Basis, tmp_path: Path) -> None:
    """Read whole, and of no use for this training."""
    with pytest.raises(StoppedError):
        train_expert(base, basis, MATH, settings=SMALL, checkpoint_dir=tmp_path, progress=StopAfter(1))
    forge(tmp_path, tmp_path, {"optimizer": '{"dict": [["state", {"value": 1}]]}'})
    with pytest.raises(HavocError, match="not a state of this training"):
        train_expert(base, basis, MATH, settings=SMALL, checkpoint_dir=tmp_path)


def test_two_trainings_of_one_expert_in_one_folder_are_refused(base: Base, basis: Basis, tmp_path: Path) -> None:
    """The last one won; now the second is refused, while another expert's may go on beside it."""
    with storage.only_one(tmp_path, "training_math"):
        with pytest.raises(HavocError, match="training_math .*another process"):
            train_expert(base, basis, MATH, settings=SMALL, checkpoint_dir=tmp_path)
        with storage.only_one(tmp_path, "training_code"):
            assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_training_of_another_method_is_refused(base: Base, basis: Basis, tmp_path: Path) -> None:
    """A state goes on only with the settings it was made with."""
    with pytest.raises(StoppedError):
        train_expert(base, basis, MATH, settings=SMALL, checkpoint_dir=tmp_path, progress=StopAfter(2))
    with pytest.raises(HavocError, match="other settings"):
        other = dataclasses.replace(SMALL, method="next-token")
        train_expert(base, basis, MATH, settings=other, checkpoint_dir=tmp_path)


def test_the_method_is_recorded(base: Base, basis: Basis, tmp_path: Path) -> None:
    """Not the word auto but what it stood for."""
    expert = train_expert(base, basis, MATH, settings=dataclasses.replace(SMALL, num_steps=1), checkpoint_dir=tmp_path)
    assert expert.settings["method"] == "reinforce"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("samples_per_prompt", 1, "at least 2"),
        ("num_steps", 0, "num_steps is 0: it must be at least 1"),
        ("max_draws", 0, "at least 1"),
        ("signal_prompts", 13, "expected 0 to prompts_per_step, 12"),
        ("temperature", 0.0, "above 0"),
    ],
)
def test_settings_that_cannot_train_are_refused(field: str, value: float, words: str) -> None:
    """One line with the number and what it must be."""
    with pytest.raises(HavocError, match=words):
        dataclasses.replace(SMALL, **{field: value})


def test_non_finite_losses_are_skipped_counted_and_end_the_run(
    base: Base, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN never reaches the deltas; ten in a row end the training."""
    steps = []

    def broken(*_: object, **__: object) -> tuple[torch.Tensor, float]:
        steps.append(1)
        return torch.tensor(float("nan"), requires_grad=True), float("nan")

    monkeypatch.setattr(reinforce, "policy_loss", broken)
    with pytest.raises(MeasurementError, match="10 times in a row"):
        train_expert(
            base, basis, MATH, settings=dataclasses.replace(SMALL, num_steps=20, max_draws=1), checkpoint_dir=tmp_path
        )
    assert len(steps) == 10


def test_the_step_that_led_to_a_loss_of_no_number_is_taken_back(
    base: Base, basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step begins where that one had begun, and the training goes on to its end."""
    met: list[dict[str, torch.Tensor]] = []
    policy_loss = reinforce.policy_loss

    def sometimes_broken(*args: Any, **options: Any) -> tuple[torch.Tensor | None, float]:
        met.append(args[1].snapshot())
        return (torch.tensor(float("nan"), requires_grad=True), 0.0) if len(met) == 3 else policy_loss(*args, **options)

    monkeypatch.setattr(reinforce, "policy_loss", sometimes_broken)
    settings = dataclasses.replace(
        SMALL, num_steps=5, prompts_per_step=6, num_validation_rows=2, validate_every=5, max_draws=1, signal_prompts=0
    )
    expert = train_expert(base, basis, MATH, settings=settings, checkpoint_dir=tmp_path)
    losses = [step["loss"] for step in expert.settings["trace"]]
    assert losses[2] is None
    assert any(loss is not None for loss in losses[3:])

    def distance(one: int, other: int) -> float:
        return max(float((met[one][name] - met[other][name]).abs().max()) for name in met[one])

    assert distance(1, 2) > 0
    assert distance(1, 3) == 0


def test_a_finished_expert_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`havoc train` refuses before any work, in one line that says how to train anew."""
    finished = tmp_path / "z_vectors_math.safetensors"
    finished.write_bytes(b"an expert")
    assert main(["train", "nano", "--task", "math", "--out", str(tmp_path)]) == 2
    assert "finished expert: use --force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [finished.name]
    assert finished.read_bytes() == b"an expert"


def test_train_takes_method_rate_and_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command line says stands in the expert; a method the task cannot have is refused before any work."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[experts]\nprompts_per_step = 2\nnum_validation_rows = 2\nnum_train_rows = 4\nmax_new_tokens = 8"
    )
    words = ["train", "nano", "--task", "math", "--recipe", str(recipe), "--steps", "1", "--quiet", "--json"]
    out = tmp_path / "out"
    assert main([*words, "--method", "next-token", "--learning-rate", "0.5", "--threads", "1", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "next-token"
    settings = load_expert(out / "z_vectors_math.safetensors").settings
    assert (settings["method"], settings["optimizer"]["fallback_lr"]) == ("next-token", 0.5)
    assert main([*words, "--method", "expected-reward", "--out", str(tmp_path / "other")]) == 2
    assert "needs a task of choices" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("trained_layers", "words"), [(5, "the base has 4 layers"), (0, "at least one layer")])
def test_layers_that_are_not_there_are_refused(
    base: Base, basis: Basis, tmp_path: Path, trained_layers: int, words: str
) -> None:
    """With both numbers."""
    with pytest.raises(HavocError, match=words):
        settings = dataclasses.replace(SMALL, trained_layers=trained_layers)
        train_expert(base, basis, MATH, settings=settings, checkpoint_dir=tmp_path)


def test_untrained_layers_keep_delta_0(base: Base, basis: Basis, tmp_path: Path) -> None:
    """The expert of the last layer is a whole expert file: every matrix of the basis has its vector."""
    settings = dataclasses.replace(SMALL, trained_layers=1, method="next-token", num_steps=2)
    expert = train_expert(base, basis, MATH, settings=settings, checkpoint_dir=tmp_path)
    assert set(expert.deltas) == set(basis.matrices)
    assert not any(delta.any() for name, delta in expert.deltas.items() if layer_of(name) < 3)


def test_a_state_too_far_from_the_base_is_not_kept(base: Base, basis: Basis, tmp_path: Path) -> None:
    """The limit on the KL divergence rules states out, however right they are; what it was stands in the trace."""
    fast = dataclasses.replace(
        SMALL, num_steps=2, validate_every=1, optimizer=dataclasses.replace(SMALL.optimizer, fallback_lr=0.05)
    )
    free = train_expert(base, basis, MATH, settings=fast, checkpoint_dir=tmp_path / "free")
    trace = free.settings["trace"]
    assert trace[-1]["kl_to_base"] > trace[0]["kl_to_base"] > 0
    strict = dataclasses.replace(fast, max_kl=trace[0]["kl_to_base"] / 2)
    bound = train_expert(base, basis, MATH, settings=strict, checkpoint_dir=tmp_path / "bound")
    assert [step["loss"] for step in bound.settings["trace"]] == [step["loss"] for step in trace]
    assert bound.is_base
    assert bound.score == {**bound.score, "step": 0}
