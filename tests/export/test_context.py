"""`havoc generate --context N`: longer than the base was made for, by an explicit word and with a warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from havoc_core.cli import main
from havoc_core.export.package import export_artifact
from havoc_core.model.checkpoint import load_base

LONG = "What is 1 + 1? " * 250
SHORT = "Question: What is 2 + 2?\nAnswer:\n"


def generated(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["generate", "nano", "--max-new-tokens", "3", *words])
    return code, *capsys.readouterr()


def test_beyond_the_context_is_said_and_done(capsys: pytest.CaptureFixture[str]) -> None:
    """Refused without the switch, answered with it, with one warning; what fits is answered as it always was."""
    context = load_base("nano").config.max_seq_len
    code, _, error = generated(capsys, "--prompt", LONG)
    assert (code, f"exceed the model's context of {context}" in error) == (2, True)
    code, out, error = generated(capsys, "--prompt", LONG, "--context", "4096", "--json")
    assert (code, json.loads(out)["runtime"]) == (0, "torch")
    assert "(RoPE)" in error
    assert error.count("\n") == 1
    plain = generated(capsys, "--prompt", SHORT)
    assert generated(capsys, "--prompt", SHORT, "--context", "4096")[1] == plain[1]


def test_its_own_positions_keep_their_angles() -> None:
    """Logits of a text that fits are the same bits; only more positions are there."""
    ids = torch.arange(4, 60)[None]
    own, longer = load_base("nano"), load_base("nano", context=5000)
    assert longer.config.max_seq_len == 5000
    assert longer.weight_hash == own.weight_hash
    with torch.inference_mode():
        assert torch.equal(own.model(ids), longer.model(ids))


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A context that the base has anyway, and an artifact, whose graph ends where it ends: one line each, exit 2."""
    code, _, error = generated(capsys, "--prompt", SHORT, "--context", "10")
    assert (code, "a context of 10 tokens: this base" in error) == (2, True)
    artifact = export_artifact("pico", tmp_path / "artifact")
    assert main(["generate", str(artifact), "--prompt", "a", "--context", "4096"]) == 2
    assert "give the base" in capsys.readouterr().err
