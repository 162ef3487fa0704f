"""A base from scratch on texts of one's own: any preset that holds their tokens, repeatable and resumable."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch

from havoc_core.adapt.pretrain_text import TextSettings, held_out_nats, pretrain_text
from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config import HavocConfig
from havoc_core.model.tokenizer import train_tokenizer
from havoc_core.model.transformer import HavocModel
from tests.adapt.interrupted import StopAfter, StoppedError

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = {
    "counting.txt": "".join(f"{n} and {n} make {2 * n}.\n" for n in range(400)),
    "small.txt": "A short one.\n" * 40,
}
TINY = TextSettings(num_steps=4, batch_size=4, window_tokens=32, checkpoint_every=2)
SHAPES = {
    "text": HavocConfig.nano().replace(num_layers=1, vision=None),
    "pictures": HavocConfig.nano().replace(num_layers=1),
    "small": HavocConfig.pico(),
}


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets that there are, shallow: nano's shape with and without eyes, and one with too few ids."""
    monkeypatch.setattr(HavocConfig, "preset", lambda name: SHAPES[name])


@pytest.mark.parametrize("shape", ["text", "pictures"])
def test_a_base_is_made_of_any_text(shape: str, tmp_path: Path) -> None:
    """Whether the preset reads pictures or not; it is loaded like any other, and its record says what it is made of."""
    progress = StopAfter(99, "loss")
    out = pretrain_text(shape, TEXTS, tmp_path / "base", settings=TINY, progress=progress)
    base, record = load_base(out), json.loads((out / "pretraining.json").read_text())
    assert base.config.vision == SHAPES[shape].vision
    assert set(record["data"]) == set(TEXTS)
    assert len(record["loss"]) == TINY.num_steps
    assert record["made_on"]["device"] == "cpu"
    assert 0 < record["held_out"]["nats_per_token"] < math.log(base.config.vocab_size) + 1
    card = (out / "README.md").read_text()
    assert f"costs it {record['held_out']['nats_per_token']:.3f} nats." in card
    assert "| counting.txt | " in card
    assert not (out / "pretraining.safetensors").exists()
    assert [name for name, _ in progress.stages] == ["tokenizer", "tokens of the texts", f"pretraining {shape}"]
    assert progress.stages[1][1] == len(TEXTS)


def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Stopped after three of four steps, it goes on from the checkpoint at two and writes the same bytes."""
    pretrain_text("text", TEXTS, tmp_path / "whole", settings=TINY)
    with pytest.raises(StoppedError):
        pretrain_text("text", TEXTS, tmp_path / "cut", settings=TINY, progress=StopAfter(3, "loss"))
    with pytest.raises(HavocError, match="other settings or data"):
        pretrain_text("text", {**TEXTS, "small.txt": "Another. " * 90}, tmp_path / "cut", settings=TINY)
    pretrain_text("text", TEXTS, tmp_path / "cut", settings=TINY)
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    with pytest.raises(HavocError, match="finished base"):
        pretrain_text("text", TEXTS, tmp_path / "cut", settings=TINY)


def test_the_ends_of_the_texts_are_held_out(tmp_path: Path) -> None:
    """No window reaches them: what stands there alone changes the record and not the weights. A digit is a token."""
    share = TextSettings(num_steps=2, batch_size=4, window_tokens=32, held_out_share=0.2)
    counting, tokenizer = TEXTS["counting.txt"], train_tokenizer(TEXTS.values(), 512)
    texts = {"ones": counting + "1" * 200, "twos": counting + "2" * 200, "other": counting.replace("and", "plus")}
    files, nats = {}, {}
    for name, text in texts.items():
        out = pretrain_text("text", {"a": text}, tmp_path / name, settings=share, tokenizer=tokenizer)
        files[name] = (out / "model.safetensors").read_bytes()
        nats[name] = json.loads((out / "pretraining.json").read_text())["held_out"]["nats_per_token"]
    assert files["ones"] == files["twos"] != files["other"]
    assert nats["ones"] != nats["twos"]


def test_held_out_nats_are_those_of_the_model() -> None:
    """By hand: the mean of -log p of each next token, window by window; one token predicts nothing."""
    model = HavocModel(SHAPES["text"]).eval()
    ids = torch.arange(5, 15)
    log_p = [torch.log_softmax(model(piece[None])[0], -1) for piece in ids.split(6)]
    by_hand = [-log_p[0][place, ids[place + 1]] for place in range(5)]
    by_hand += [-log_p[1][place, ids[6 + place + 1]] for place in range(3)]
    assert held_out_nats(model, ids, window=6) == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    assert held_out_nats(model, ids[:1], window=6) is None


def test_a_preset_with_too_few_ids_is_refused(tmp_path: Path) -> None:
    """256 bytes and 4 special tokens are needed whatever the text; nothing is written."""
    with pytest.raises(HavocError, match="not 64 ids"):
        pretrain_text("small", TEXTS, tmp_path / "base", settings=TINY)
    assert not (tmp_path / "base").exists()


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    """With both numbers; nothing is written."""
    with pytest.raises(HavocError, match=r"texts have \d+ tokens .*window takes 32"):
        pretrain_text("text", {"a": "Hello."}, tmp_path / "base", settings=TINY)
    assert not (tmp_path / "base").exists()


def test_the_command_learns_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`havoc pretrain PRESET --text FILE...`, and what it refuses: two files of one name, none with text, no UTF-8."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    words = ["pretrain", "text", "--steps", "1", "--quiet", "--out", str(tmp_path / "base"), "--text"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "small.txt").write_text("Another of that name.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for files, refusal in (
        (["small.txt", "other/small.txt"], "two texts have the file name small.txt"),
        (["empty.txt"], "hold no text"),
        (["latin.txt"], "latin.txt: not UTF-8 (byte 3)"),
        (["absent.txt"], "absent.txt"),
    ):
        assert main([*words, *(str(tmp_path / file) for file in files)]) == 2
        assert refusal in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    assert main([*words, *(str(tmp_path / name) for name in TEXTS)]) == 0
    assert load_base(tmp_path / "base").config.num_layers == 1
