"""How a graph is written is chosen from a table, kept in the manifest, and read back or refused in one line."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from havoc_core.cli import main
from havoc_core.errors import HavocError
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.dialects import DIALECTS, choose_dialect
from havoc_core.export.runtime.options import CACHES, DEFAULT_OPTIONS, LOGITS, GraphOptions, options_of


@pytest.mark.parametrize(
    "options", [GraphOptions(dialect=d, cache=c, logits=n) for d, c, n in product(DIALECTS, CACHES, LOGITS)], ids=str
)
def test_the_manifest_gives_the_options_back(plain: Path, options: GraphOptions) -> None:
    """Written and read, every combination is the same; the defaults add no key."""
    fitted = options.fitted(256)
    manifest = dataclasses.replace(read_manifest(plain), graph=json.loads(json.dumps(fitted.to_json())))
    assert options_of(manifest) == fitted
    assert fitted.cache_len == (256 if options.cache == "static" else None)
    assert ("cache" in fitted.to_json()) == (options.cache == "static")


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"logits": "some"}, "logits of 'some'; there are"),
        ({"logits": ["last token"]}, "logits of"),
        ({"dialect": "latin"}, "unknown dialect 'latin'; known are standard, contrib"),
        ({"dialect": ["standard"]}, "unknown dialect"),
        ({"cache": "frozen"}, "unknown cache 'frozen'"),
        ({"cache_len": 64}, "a cache length of 64 needs a static cache"),
        ({"cache": "static", "cache_len": "64"}, "positive number of tokens, not '64'"),
        ({"cache": "static", "cache_len": True}, "positive number of tokens, not True"),
        ({"cache": "static", "cache_len": -1}, "positive number of tokens, not -1"),
    ],
)
def test_a_manifest_with_other_options_is_refused(plain: Path, graph: dict[str, Any], message: str) -> None:
    """Unknown words and wrong numbers are named, whatever their type."""
    manifest = read_manifest(plain)
    with pytest.raises(HavocError, match=message):
        options_of(dataclasses.replace(manifest, graph={**manifest.graph, **graph}))


def test_an_artifact_of_before_these_options_reads_as_the_default(plain: Path) -> None:
    """The first manifests had these four keys."""
    old = {"dialect": "standard", "opset": 23, "ir_version": 11, "logits": "last token"}
    assert options_of(dataclasses.replace(read_manifest(plain), graph=old)) == DEFAULT_OPTIONS
    assert read_manifest(plain).graph == old


@pytest.mark.parametrize("cache_len", [31, 257])
def test_a_cache_that_cannot_be_proved_or_used_is_refused(cache_len: int) -> None:
    """Too short for parity's sequences, or longer than the model can read."""
    with pytest.raises(HavocError, match=f"cache of {cache_len} tokens: .*32 to 256"):
        GraphOptions(cache="static", cache_len=cache_len).fitted(256)
    assert GraphOptions(cache="static").fitted(20).cache_len == 20


def test_auto_takes_what_the_provider_runs() -> None:
    """Contrib where its kernels are the better ones, standard where they are not or cannot take the heads."""
    chosen = {
        (device, dtype, cache): choose_dialect("auto", device=device, activation_dtype=dtype, head_dim=64, cache=cache)
        for device in ("cpu", "cuda")
        for dtype in ("fp32", "fp16")
        for cache in CACHES
    }
    assert {key for key, dialect in chosen.items() if dialect == "contrib"} == {
        ("cpu", "fp16", "dynamic"),
        ("cpu", "fp16", "static"),
        ("cuda", "fp16", "static"),
    }
    assert choose_dialect("auto", device="cuda", activation_dtype="fp16", head_dim=40, cache="static") == "standard"
    assert choose_dialect("contrib", device="cpu", activation_dtype="fp32", head_dim=64) == "contrib"
    with pytest.raises(HavocError, match="does not run in fp32 on CUDA"):
        choose_dialect("contrib", device="cuda", activation_dtype="fp32", head_dim=64)
    with pytest.raises(HavocError, match="16, this model's have 40"):
        choose_dialect("contrib", device="cpu", activation_dtype="fp32", head_dim=40)


def test_on_the_command_line(text_base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifact is written as asked and verified against its base; what does not fit together exits 2."""
    out = tmp_path / "a"
    words = ["export", str(text_base_directory), "--out", str(out), "--quiet"]
    asked = ["--dialect", "contrib", "--cache", "static", "--cache-len", "64", "--logits", "all"]
    assert main([*words, *asked]) == 0
    assert "contrib dialect, static cache of 64 tokens, logits of every token" in capsys.readouterr().out
    graph = read_manifest(out).graph
    assert graph == {
        "dialect": "contrib",
        "opset": 22,
        "ir_version": 10,
        "logits": "every token",
        "cache": "static",
        "cache_len": 64,
    }
    search = json.loads((out / "genai_config.json").read_text())["search"]
    assert (search["past_present_share_buffer"], search["max_length"]) == (True, 64)
    assert main(["verify", str(out), "--base", str(text_base_directory), "--quiet"]) == 0
    capsys.readouterr()
    for wrong in (["--cache-len", "64"], ["--dialect", "contrib", "--for", "cuda"], ["--to", "hf", "--logits", "all"]):
        assert main([*words[:3], str(tmp_path / "b"), "--quiet", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "b").exists()
