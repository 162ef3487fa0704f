"""A base from scratch: repeatable, resumable, and the bundled one is what its record says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from havoc_core.adapt.base_card import model_card
from havoc_core.adapt.optimizer import MuonGrokfast
from havoc_core.adapt.pretrain import PretrainSettings, optimizer_settings, pretrain
from havoc_core.adapt.tasks import sources
from havoc_core.adapt.tasks.names import DOMAINS
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import BUNDLED_NANO, load_base
from tests.adapt.interrupted import StopAfter, StoppedError

if TYPE_CHECKING:
    from pathlib import Path

TINY = PretrainSettings(
    num_steps=4, batch_size=8, rows_per_domain=40, num_tokenizer_rows=40, checkpoint_every=2, num_accuracy_rows=4
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain("nano", tmp_path_factory.mktemp("base"), settings=TINY)


def test_a_stopped_run_ends_as_if_it_had_not_been(base: Path, tmp_path: Path) -> None:
    """Stopped after three of four steps, it goes on from the checkpoint at two and writes the same bytes."""
    with pytest.raises(StoppedError):
        pretrain("nano", tmp_path, settings=TINY, progress=StopAfter(3, "loss"))
    assert not (tmp_path / "model.safetensors").exists()
    pretrain("nano", tmp_path, settings=TINY)
    assert (tmp_path / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert not (tmp_path / "pretraining.safetensors").exists()


def test_the_record_holds_recipe_data_curve_and_accuracy(base: Path) -> None:
    """What another person needs to make the same base, and how good it is."""
    record = json.loads((base / "pretraining.json").read_text())
    assert record["settings"]["num_steps"] == len(record["loss"]) == 4
    assert set(record["data"]) == set(record["accuracy"]) == set(DOMAINS)
    assert all(len(sha) == 64 for sha in record["data"].values())
    assert load_base(base).model.num_parameters() == record["num_parameters"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    """A run never goes on from weights that other data or settings made."""
    with pytest.raises(StoppedError):
        pretrain("nano", tmp_path, settings=TINY, progress=StopAfter(3, "loss"))
    other = PretrainSettings(num_steps=4, batch_size=8, rows_per_domain=40, num_tokenizer_rows=40, seed=1)
    with pytest.raises(HavocError, match="other settings or data"):
        pretrain("nano", tmp_path, settings=other)


def test_a_finished_base_is_not_overwritten(base: Path) -> None:
    """The weights of a finished base are not trained away."""
    with pytest.raises(HavocError, match="finished base"):
        pretrain("nano", base, settings=TINY)


def test_a_text_preset_is_refused(tmp_path: Path) -> None:
    """The corpus has pictures, so a preset that cannot see them is named."""
    with pytest.raises(HavocError, match="reads no images"):
        pretrain("edge-135m", tmp_path, settings=TINY)


def test_bundled_nano_was_trained_on_todays_train_split() -> None:
    """If generators or splits change, gate rows may have been trained on: then nano must be pretrained again."""
    record = json.loads((BUNDLED_NANO / "pretraining.json").read_text())
    settings = record["settings"]
    for domain in DOMAINS:
        rows = sources.rows(domain, "train", settings["rows_per_domain"], seed=settings["seed"])
        assert sources.rows_hash(rows) == record["data"][domain], domain


def test_bundled_nano_is_what_its_card_says() -> None:
    """The card is written from the record, and the package stays small."""
    record = json.loads((BUNDLED_NANO / "pretraining.json").read_text())
    assert (BUNDLED_NANO / "README.md").read_text() == model_card(record)
    assert load_base("nano").model.num_parameters() == record["num_parameters"] <= 6_000_000
    assert sum(path.stat().st_size for path in BUNDLED_NANO.iterdir()) <= 12_000_000
    with (BUNDLED_NANO / "model.safetensors").open("rb") as file:
        assert b'"dtype":"F16"' in file.read(2000)


def test_bundled_nano_can_be_improved() -> None:
    """It knows every domain, and leaves room: 65 to 88 % each on the search split."""
    record = json.loads((BUNDLED_NANO / "pretraining.json").read_text())
    assert set(record["accuracy"]) == set(DOMAINS)
    for domain, counts in record["accuracy"].items():
        assert 0.65 < counts["num_right"] / counts["num_rows"] < 0.88, domain


def test_training_is_repeatable(base: Path, tmp_path: Path) -> None:
    """The same recipe gives the same weights, bit for bit, with the same number of threads."""
    again = pretrain("nano", tmp_path / "again", settings=TINY)
    assert (again / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_the_optimizer_is_torchs_muon_and_adamw_bit_for_bit() -> None:
    """Matrices by `torch.optim.Muon`, embeddings and vectors by AdamW, under a changing rate; no filter in front."""
    settings = PretrainSettings()
    generator = torch.Generator().manual_seed(1)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (4, 6), (9, 5), (5,))] for _ in "ab")
    optimizer = MuonGrokfast(
        [{"params": ours[:2], "enable_muon": True}, {"params": ours[2:], "enable_muon": False}],
        optimizer_settings(settings),
    )
    muon = torch.optim.Muon(theirs[:2], lr=1.0, momentum=0.95, weight_decay=settings.weight_decay)
    adamw = torch.optim.AdamW(theirs[2:], lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    for scale in (0.5, 1.0, 0.2, 0.1):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for group in optimizer.param_groups:
            rate = settings.muon_learning_rate if group["route"] == "muon" else settings.adam_learning_rate
            group["lr"] = scale * rate
        muon.param_groups[0]["lr"] = scale * settings.muon_learning_rate
        adamw.param_groups[0]["lr"] = scale * settings.adam_learning_rate
        for each in (optimizer, muon, adamw):
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
