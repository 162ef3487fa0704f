"""The verbs of this room, as a person types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from havoc_core.export.source import Source
from tests.commands import run


def test_export_verify_generate(base_directory: Path, experts_directory: Path, tmp_path: Path, capsys) -> None:
    """The three verbs in a row: table or JSON on stdout, progress on stderr, the same text from base and artifact."""
    out = tmp_path / "artifact"
    assert run("export", base_directory, "--experts", experts_directory, "--alpha", "0.5,0.5", "--out", out) == 0
    shown = capsys.readouterr()
    assert "mixture     math 0.5, code 0.5 (rule delta)" in shown.out
    assert "write weights" in shown.err
    assert run("verify", out, "--base", base_directory, "--json", "--quiet") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks] == ["hashes", "manifest", "graph", "provider", "fingerprint", "fold"]
    assert run("verify", out) == 0
    assert "again: give --base DIR" in capsys.readouterr().out
    plain = tmp_path / "plain"
    assert run("export", base_directory, "--out", plain, "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["mixture"]["alpha"] == {}
    completions = []
    for model in (base_directory, plain):
        assert run("generate", model, "--prompt", "What is 12", "--max-new-tokens", 8, "--json") == 0
        completions.append(json.loads(capsys.readouterr().out))
    assert completions[0]["completion"] == completions[1]["completion"]
    assert [item["runtime"] for item in completions] == ["torch", "onnxruntime"]


def test_generate_reads_an_image(base_directory: Path, tmp_path: Path, capsys) -> None:
    """A picture goes in by --image; one that is missing or no PNG is one line and exit code 2."""
    out = tmp_path / "artifact"
    assert run("export", base_directory, "--out", out, "--quiet") == 0
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "x.png")
    assert run("generate", out, "--prompt", "what?", "--image", tmp_path / "x.png", "--max-new-tokens", 3) == 0
    Image.new("RGB", (16, 8), (9, 9, 9)).save(tmp_path / "x.jpg")
    assert run("generate", out, "--prompt", "what?", "--image", tmp_path / "x.jpg", "--max-new-tokens", 3) == 0
    (tmp_path / "y.png").write_text("no")
    for name in ("y.png", "z.png"):
        capsys.readouterr()
        assert run("generate", out, "--prompt", "what?", "--image", tmp_path / name) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((9, 8), "9 x 8 pixels is not a multiple of the patch size 8"),
        ((512, 512), "the picture takes 4096 tokens"),
        (None, "a picture cannot be decoded (its format is unknown, or it is not a picture)"),
    ],
    ids=["odd", "large", "text"],
)
def test_a_picture_that_does_not_fit_is_named(
    base_directory: Path, tmp_path: Path, capsys, size: tuple[int, int] | None, message: str
) -> None:
    """One line with the file's name; where it is too large, what would fit."""
    picture = tmp_path / "shot.png"
    picture.write_text("text") if size is None else Image.new("RGB", size).save(picture)
    assert run("generate", base_directory, "--prompt", "one", "--image", picture) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"havoc: error: {picture}: ")
    assert err.count("\n") == 1
    assert message in err
    assert ("pixels fit" in err) == (size == (512, 512))


def test_a_preset_is_not_imported(capsys) -> None:
    """The line says what a preset is, and what import reads."""
    assert run("import", "nano") == 2
    assert "nano is a preset" in capsys.readouterr().err


def test_the_device_chooses_the_dialect(text_base_directory: Path, tmp_path: Path, capsys) -> None:
    """`--for` alone is enough; a dialect that is given stays. A rank that factors nothing is a warning."""
    formats = ("--weights", "fp16", "--activations", "fp16")
    words = ("export", text_base_directory, *formats, "--quiet", "--out", tmp_path / "a")
    assert run(*words, "--for", "cuda") == 0
    assert "standard dialect" in capsys.readouterr().out
    assert run(*words, "--replace", "--for", "cuda", "--cache", "static") == 0
    assert "contrib dialect" in capsys.readouterr().out
    assert run(*words, "--replace", "--for", "cuda", "--dialect", "standard", "--rank", "0.99") == 0
    out = capsys.readouterr().out
    assert "standard dialect" in out
    assert "warning     --rank changed nothing" in out


def test_import_says_what_a_directory_is(base_directory: Path, tmp_path: Path, capsys) -> None:
    """Architecture, size and hash of a good directory; the reason for a bad one."""
    assert run("import", base_directory, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["architecture"] == "HavocForCausalLM"
    assert document["vision"] == "patches of 8 pixels"
    assert run("import", base_directory) == 0
    assert "parameters" in capsys.readouterr().out
    assert run("import", tmp_path) == 2
    assert "config.json: no such file" in capsys.readouterr().err


def test_to_hf(text_base_directory: Path, tmp_path: Path, capsys) -> None:
    """`--to hf` writes what `import` reads; integer weights are refused there."""
    assert run("export", text_base_directory, "--to", "hf", "--out", tmp_path / "hf", "--quiet") == 0
    assert run("import", tmp_path / "hf") == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert run("export", text_base_directory, "--to", "hf", "--weights", "int4", "--out", tmp_path / "no") == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alpha", "1,1"], "--experts DIR is missing"),
        (["--experts", "EXPERTS"], "--alpha is missing"),
        (["--experts", "nowhere", "--alpha", "1"], "--experts nowhere: no such directory"),
        (["--experts", "EXPERTS", "--alpha", "1"], "one weight for each expert: 1 given, "),
        (["--weights", "fp32", "--activations", "fp16"], "fp16"),
    ],
    ids=["no-experts", "no-alpha", "no-folder", "short-alpha", "rounded"],
)
def test_half_a_request_is_refused(
    base_directory: Path, experts_directory: Path, tmp_path: Path, capsys, words: list[str], message: str
) -> None:
    """One line, exit code 2, nothing written."""
    words = [str(experts_directory) if word == "EXPERTS" else word for word in words]
    assert run("export", base_directory, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_verify_refuses_what_is_not_the_artifact(source: Source, base_directory: Path, tmp_path: Path, capsys) -> None:
    """A changed byte is exit code 5, no artifact is 2."""
    out = tmp_path / "artifact"
    assert run("export", base_directory, "--out", out, "--quiet") == 0
    content = bytearray((out / "model.onnx").read_bytes())
    content[100] ^= 1
    (out / "model.onnx").write_bytes(content)
    capsys.readouterr()
    assert run("verify", out) == 5
    assert "the file was changed" in capsys.readouterr().err
    assert run("verify", tmp_path / "none") == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_quantized_base_is_neither_imported_nor_exported(
    text_base_directory: Path, tmp_path: Path, dtype: torch.dtype, capsys
) -> None:
    """Integers that stand for weights would be folded as they are: a wrong model without a word."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / "base"))
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(dtype)
    save_file(state, base / "model.safetensors")
    for words in (("import", base), ("export", base, "--out", tmp_path / "out")):
        assert run(*words) == 2
        assert "quantized checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "given"), [(["--prompt", "-"], b"\xff\xfe"), (["--prompt", b"\xff"], b"")], ids=["stdin", "argument"]
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_prompt_that_is_no_text(words: list, given: bytes, locale: str) -> None:
    """Bytes that are not UTF-8, from either side and in any locale, are one line and exit code 2."""
    command = [sys.executable, "-m", "havoc_core", "generate", "nano", *words]
    found = subprocess.run(command, input=given, capture_output=True, env={**os.environ, "LC_ALL": locale})
    assert (found.returncode, found.stderr) == (2, b"havoc: error: --prompt: the text is not UTF-8\n")
