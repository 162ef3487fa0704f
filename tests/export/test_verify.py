"""`havoc verify` checks all it can, says what it could not check, and uses what it was given or refuses it."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from havoc_core.adapt.expert import Expert, save_expert
from havoc_core.errors import printable
from havoc_core.export import commands
from havoc_core.export.package import export_artifact
from tests.commands import run
from tests.export.listed import relist


def checks(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    document = json.loads(capsys.readouterr().out)
    return [check["name"] for check in document["checks"]], document["notes"]


def test_with_base_and_experts_everything_is_checked(
    mixed: Path, base_directory: Path, experts_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hashes, graph, fingerprint, and the fold from the artifact's own experts or from those given."""
    for words in ((), ("--experts", experts_directory)):
        assert run("verify", mixed, "--base", base_directory, *words, "--json", "--quiet") == 0
        assert checks(capsys) == (["hashes", "manifest", "graph", "provider", "fingerprint", "fold"], [])


def test_without_the_base_it_says_what_is_missing(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verified as far as it goes, and a note that names the base."""
    assert run("verify", plain, "--json") == 0
    names, notes = checks(capsys)
    assert names == ["hashes", "manifest", "graph", "provider", "fingerprint"]
    assert notes[0].startswith("not folded again: give --base DIR (it is reader, ")


@pytest.mark.parametrize("preset", ["pico", "nano"])
def test_what_havoc_holds_itself_needs_no_base(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset's random weights and the bundled nano are folded again unasked."""
    export_artifact(preset, tmp_path / "a")
    assert run("verify", tmp_path / "a", "--json", "--quiet") == 0
    assert checks(capsys) == (["hashes", "manifest", "graph", "provider", "fingerprint", "fold"], [])


def test_another_base_called_nano_is_another_base(
    text_base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory of one's own may have that name: not compared with the bundled one and called forged."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / "nano"))
    export_artifact(base, tmp_path / "a")
    assert run("verify", tmp_path / "a", "--json") == 0
    assert "give --base DIR (it is nano" in checks(capsys)[1][0]


def test_experts_that_cannot_be_used_are_refused(
    plain: Path,
    mixed: Path,
    base_directory: Path,
    experts_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A missing folder, experts for an artifact without any, or without its base: one line, exit code 2."""
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((plain, "--experts", "/missing"), "the artifact was made without experts; leave the option out"),
        ((mixed, "--experts", "/missing"), "--experts /missing: no such directory"),
        ((mixed, "--experts", experts_directory), "folding again needs the base too: give --base DIR"),
        (
            (mixed, "--base", base_directory, "--experts", tmp_path / "empty"),
            "z_vectors_math.safetensors: no such file",
        ),
        ((mixed, "--base", "/missing"), "/missing: not a directory"),
    ):
        capsys.readouterr()
        assert run("verify", *words, "--quiet") == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert (shown.out, len(shown.err.splitlines())) == ("", 1)


def test_other_experts_are_exit_code_5(
    mixed: Path, base_directory: Path, experts: list[Expert], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts of the same base that are not those of the artifact."""
    for expert, name in zip(experts, ("code", "math"), strict=True):
        save_expert(Expert(**{**vars(expert), "domain": name}), tmp_path)
    assert run("verify", mixed, "--base", base_directory, "--experts", tmp_path, "--quiet") == 5
    assert "made from math expert" in capsys.readouterr().err


def test_without_torch_it_says_so(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device itself: all but the fold; a base that is given cannot be used and is refused."""
    monkeypatch.setattr(commands, "_has_torch", lambda: False)
    assert run("verify", plain, "--json") == 0
    assert checks(capsys)[1] == ["not folded again: this installation has no torch"]
    assert run("verify", plain, "--base", "nano") == 2
    assert 'pip install "havoc-core[lab]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "x.onnx"])
def test_a_file_that_a_runtime_would_obey_is_listed_or_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Put beside an artifact without one, it would change what the model reads or says, unhashed."""
    out = export_artifact("pico", tmp_path / "a")
    (out / name).write_text("{}")
    assert run("verify", out) == 2
    assert f"{name}: not listed in manifest.json" in capsys.readouterr().err
    (out / name).unlink()
    (out / "notes.txt").write_text("mine")
    assert run("verify", out, "--quiet") == 0


def test_alpha_without_its_expert_is_a_damaged_manifest(mixed: Path, tmp_path: Path) -> None:
    """A mixture that names a weight for an expert it does not name."""
    artifact = Path(shutil.copytree(mixed, tmp_path / "a"))
    document = json.loads((artifact / "manifest.json").read_text())
    document["mixture"]["alpha"]["vision"] = 1.0
    (artifact / "manifest.json").write_text(json.dumps(document))
    assert run("verify", artifact) == 2


def forged(artifact: Path, out: Path, change: Callable[[dict[str, Any]], object], name: str = "manifest.json") -> Path:
    """A copy whose JSON file `name` is changed, and whose manifest lists it as it is now."""
    copy = Path(shutil.copytree(artifact, out))
    document = json.loads((copy / name).read_text())
    change(document)
    (copy / name).write_text(json.dumps(document))
    if name != "manifest.json":
        relist(copy, name)
    return copy


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("manifest.json", lambda d: d.update(num_parameters=1), "says num_parameters 1, config.json says"),
        ("manifest.json", lambda d: d["base"].update(random_weights=True), "says random_weights True"),
        ("manifest.json", lambda d: d["graph"].update(opset=9), "says opset 9, an export says 23"),
        ("manifest.json", lambda d: d["graph"].update(extra="x"), "says extra 'x', an export says None"),
        ("config.json", lambda d: d.update(eos_token_id=[7]), "config.json: not what an export of base reader holds"),
        ("config.json", lambda d: d.update(max_position_embeddings=128), "model.onnx: not the graph that this version"),
        ("tokenizer_config.json", lambda d: d.update(eos_token="the"), "tokenizer_config.json: not what an export"),
        ("generation_config.json", lambda d: d.update(eos_token_id=7), "generation_config.json: not what an export"),
        ("genai_config.json", lambda d: d["model"].update(context_length=9), "genai_config.json: not what an export"),
        ("mixture.json", lambda d: d["base"].update(hash="0" * 64), "mixture.json says"),
    ],
    ids="count randomness opset extra end context tokenizer generation genai mixture".split(),
)
def test_what_stands_beside_the_weights_is_derived_again_too(
    plain: Path,
    text_base_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    """Another tokenizer, another end, another size, each with right hashes: exit code 5 and the file's name."""
    artifact = forged(plain, tmp_path / "a", change, name)
    assert run("verify", artifact, "--base", text_base_directory, "--quiet") == 5
    assert said in capsys.readouterr().err


def test_a_file_that_no_export_writes_is_not_verified(
    plain: Path, text_base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat template that the base does not have, listed and hashed; or a tokenizer that went missing."""
    artifact = Path(shutil.copytree(plain, tmp_path / "a"))
    (artifact / "chat_template.jinja").write_text("{{ 'another voice' }}")
    relist(artifact, "chat_template.jinja")
    assert run("verify", artifact, "--base", text_base_directory, "--quiet") == 5
    assert "chat_template.jinja: an export" in capsys.readouterr().err


def test_a_base_may_be_called_otherwise_today(plain: Path, text_base_directory: Path, tmp_path: Path) -> None:
    """Its folder was moved, and its licence added: the same weights are the same base."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / "renamed"))
    (base / "LICENSE").write_text("free")
    assert run("verify", plain, "--base", base, "--quiet") == 0


@pytest.mark.parametrize("preset", ["pico", "nano"])
def test_random_weights_cannot_be_denied(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What HAVOC holds itself is folded again whatever the manifest says about it."""
    artifact = export_artifact(preset, tmp_path / "made")
    copy = forged(artifact, tmp_path / "a", lambda d: d["base"].update(random_weights=not d["base"]["random_weights"]))
    assert run("verify", copy, "--quiet") == 5
    assert "says random_weights" in capsys.readouterr().err


HOSTILE = ["<script>alert(1)<", "a|b`c`[x](javascript:1)", "\x1b[31mred", "x\ny: [evil]", "__loud__ *words* &amp;"]

LABELS = (
    "base mixture structure graph size parity format hashes manifest graph provider fingerprint note verified".split()
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_steers_neither_page_nor_terminal(
    text_base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A base's folder may be called anything: on the model card and in what is printed it is only a name."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / name))
    assert run("export", base, "--out", tmp_path / "a", "--quiet") == 0
    assert run("verify", tmp_path / "a", "--quiet") == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines if printable(name) in line] == ["base", "note"]
    assert [line.split()[0] for line in lines[1:]] == LABELS
    assert run("export", base, "--to", "hf", "--out", tmp_path / "hf", "--quiet") == 0
    for card in ((tmp_path / out / "README.md").read_text() for out in ("a", "hf")):
        assert not any(letter in card for letter in ("\x1b", "<script", "\nalert", "\ny:"))
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---", 2)[2])
        assert not any(tag in page for tag in ("<script", 'href="javascript', "<code>c<", "<em>words", "<strong>loud"))
        assert html.escape(printable(name), quote=False) in page.replace("&quot;", '"')
