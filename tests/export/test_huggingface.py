"""`--to hf` writes a directory that transformers loads, with the folded model's logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from havoc_core.adapt.svf import compute_basis
from havoc_core.errors import HavocError
from havoc_core.export.huggingface import export_huggingface
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import open_source
from havoc_core.model import HavocModel
from havoc_core.model.config import HavocConfig

IDS = torch.arange(4, 44)[None]


@pytest.mark.parametrize("kind", ["text", "untied", "llama3-rope", "qwen2", "qwen3"])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 10_000])
def test_transformers_loads_it_with_the_same_logits(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, kind: str, max_shard_bytes: int
) -> None:
    """Whole or sharded, tied or not: AutoModelForCausalLM gives the artifact's logits, and HAVOC reads it back."""
    source = source_with(configs[kind])
    out = export_huggingface(source, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes == 10_000)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    session = DecoderSession.open(export_artifact(out, tmp_path / "a"))
    ours, _ = session.prefill(IDS.numpy())
    with torch.inference_mode():
        expected = theirs(IDS).logits
        difference = HavocModel.load_pretrained(out)(IDS) - expected
        assert difference.abs().max() < 1e-5 * expected.std()  # logits of many units: rounding grows with them
    assert torch.allclose(torch.from_numpy(ours), expected[:, -1], atol=1e-4)
    assert open_source(out).config == source.config


def test_experts_are_folded_in(text_base_directory: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The Hugging Face directory and the artifact of one mixture hold the same model; the tokenizer comes along."""
    source = open_source(text_base_directory)
    basis = compute_basis(source.tensors, base_hash=source.hash)
    from havoc_core.adapt.expert import Expert

    deltas = {name: torch.full((size,), 0.2) for name, size in basis.num_directions().items()}
    expert = Expert(domain="math", deltas=deltas, base_hash=source.hash, basis_hash=basis.hash)
    out = export_huggingface(source, tmp_path / "hf", experts=[expert], alpha=[0.8])
    theirs = AutoModelForCausalLM.from_pretrained(out)
    artifact = export_artifact(source, tmp_path / "a", experts=[expert], alpha=[0.8])
    ours, _ = DecoderSession.open(artifact).prefill(IDS.numpy())
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(ours), theirs(IDS).logits[:, -1], atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the quick", add_special_tokens=False).input_ids) == "the quick"
    assert json.loads((out / "mixture.json").read_text())["experts"][0]["alpha"] == 0.8


def test_a_directory_of_another_tool_is_not_replaced(text_base_directory: Path) -> None:
    """Writing over a base is refused: only a directory this command wrote is replaced."""
    with pytest.raises(HavocError, match="choose another --out"):
        export_huggingface(text_base_directory, text_base_directory)
    open_source(text_base_directory)


def test_fp16_halves_it(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """`weight_format="fp16"` stores and says float16."""
    source = source_with(configs["text"])
    full, half = (export_huggingface(source, tmp_path / name, weight_format=name) for name in ("fp32", "fp16"))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"


def test_sampling_settings_go_along(text_base_directory: Path, tmp_path: Path) -> None:
    """What the base says about sampling stays; every end of text of its two files is named."""
    base = Path(shutil.copytree(text_base_directory, tmp_path / "base"))
    (base / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [7, 2]}')
    out = export_huggingface(base, tmp_path / "hf")
    fields = json.loads((out / "generation_config.json").read_text())
    assert (fields["temperature"], fields["do_sample"], fields["eos_token_id"]) == (0.6, True, [2, 7])
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6
    assert json.loads((export_artifact(base, tmp_path / "a") / "genai_config.json").read_text())["model"][
        "eos_token_id"
    ] == [2, 7]


def test_what_fp16_cannot_hold_is_refused(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """1e5 does not silently become infinity, and NaN is written in no type."""
    source = source_with(configs["text"])
    source.tensors["model.norm.weight"][3] = 1e5
    with pytest.raises(HavocError, match=r"model\.norm\.weight: .* beyond float16"):
        export_huggingface(source, tmp_path / "hf", weight_format="fp16")
    export_huggingface(source, tmp_path / "hf")
    source.tensors["model.norm.weight"][3] = torch.nan
    with pytest.raises(HavocError, match="holds NaN"):
        export_huggingface(source, tmp_path / "hf")
    assert open_source(tmp_path / "hf").tensors["model.norm.weight"][3] == 1e5


def test_the_card_says_what_was_folded(text_base_directory: Path, tmp_path: Path) -> None:
    """Base with hash, mixture, licence; a preset's random weights are called so."""
    card = (export_huggingface(text_base_directory, tmp_path / "hf") / "README.md").read_text()
    assert open_source(text_base_directory).hash in card
    assert "library_name: transformers" in card
    random = (export_huggingface("pico", tmp_path / "random") / "README.md").read_text()
    assert "**The weights are random**" in random
