"""Bases as people have them: what transformers reads with a warning is read, what cannot work is said at the start."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from havoc_core import cli
from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.task import Prompt
from havoc_core.bench.accuracy import require_rows
from havoc_core.errors import HavocError
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config import HavocConfig
from havoc_core.model.generation import generate_text
from havoc_core.model.pretrained import generation_fields
from havoc_core.model.tokenizer import train_tokenizer
from havoc_core.model.transformer import HavocModel
from tests import gguf_files as files

chats = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "model" / "test_chat.py")))
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tied pico with a tokenizer of its own, and a table with room."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    HavocModel(HavocConfig.pico().replace(vocab_size=300)).save_pretrained(folder)
    train_tokenizer(files.CORPUS, 280).save(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def logits_of_both(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5, 45)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return load_base(folder).model(ids), theirs(ids).logits


def test_a_useless_padding_id_is_none(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-1, or one beyond the table: read as transformers reads it, said by import, and not written again."""
    for useless in (-1, 300):
        for name in ("config.json", "generation_config.json"):
            edit(base / name, pad_token_id=useless)
        loaded = load_base(base)
        assert loaded.config.pad_token_id is None
        assert generation_fields(loaded.config)["pad_token_id"] is None
        assert cli.main(["import", str(base), "--quiet"]) == 0
        assert f"none: pad_token_id {useless} of config.json" in capsys.readouterr().out
        assert cli.main(["generate", str(base), "--prompt", "Hello", "--max-new-tokens", "4"]) == 0
        out = base.parent / f"hf{useless}"
        assert cli.main(["export", str(base), "--to", "hf", "--out", str(out), "--quiet"]) == 0
        written = [json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")]
        assert [fields["pad_token_id"] for fields in written] == [None, None]
    edit(base / "config.json", pad_token_id="<pad>")
    with pytest.raises(HavocError, match="pad_token_id '<pad>' is not in"):
        load_base(base)


def test_a_padding_token_that_only_the_tokenizer_names(base: Path) -> None:
    """Its id is the tokenizer's; a name that the vocabulary has not is none, and the end of text pads."""
    edit(base / "config.json", pad_token_id=None)
    assert load_base(base).tokenizer.pad_id == 0
    edit(base / "tokenizer_config.json", pad_token="[PAD]")
    assert load_base(base).tokenizer.pad_id == load_base(base).tokenizer.eos_id
    edit(base / "tokenizer_config.json", eos_token="[EOS]")
    with pytest.raises(HavocError, match=r'eos_token "\[EOS\]" is not in tokenizer.json'):
        load_base(base)


def test_fields_without_effect_are_read(base: Path) -> None:
    """How it was trained, and where its own code lay."""
    edit(base / "config.json", gradient_checkpointing=False, auto_map={"AutoModel": "modeling.Model"})
    ours, theirs = logits_of_both(base)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_tied_head_may_be_the_only_table(base: Path) -> None:
    """Whichever of the two tensors there is: the same logits as transformers, the same hash, and it exports."""
    before = load_base(base)
    file = base / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[HEAD] = tensors.pop(TABLE)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    ours, theirs = logits_of_both(base)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert load_base(base).weight_hash == before.weight_hash
    assert TABLE in load_base(base).tensors()
    artifact = export_artifact(base, base.parent / "artifact")
    assert cli.main(["verify", str(artifact), "--base", str(base), "--quiet"]) == 0
    edit(base / "config.json", tie_word_embeddings=False)
    with pytest.raises(HavocError, match="model.embed_tokens.weight is missing"):
        load_base(base)


@pytest.mark.parametrize("verb", ["import", "export", "generate", "eval", "train"])
def test_an_id_beyond_the_table_is_refused_at_the_start(
    verb: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids may have a hole: the largest counts, not their number."""
    document = json.loads((base / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][-1], "id": 600, "content": "<far>"})
    vocab = document["model"]["vocab"]
    vocab["<far>"] = 600
    (base / "tokenizer.json").write_text(json.dumps(document))
    out = base.parent / "out"
    more = {"import": [], "export": ["--out", str(out)], "generate": ["--prompt", "a"], "eval": ["--domain", "math"]}
    more |= {"train": ["--domain", "math", "--out", str(out)]}
    assert cli.main([verb, str(base), *more[verb]]) == 2
    captured = capsys.readouterr()
    assert "id 600, the model's table 300 rows" in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_a_tokenizer_model_alone_is_said_before_any_work(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verbs that read text refuse it with what to do; export says so and goes on, bench refuses before it measures."""
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    artifact = base.parent / "artifact"
    for words in (
        ["generate", str(base), "--prompt", "a"],
        ["eval", str(base), "--domain", "math", "--n", "2"],
        ["train", str(base), "--domain", "math", "--out", str(artifact)],
    ):
        assert cli.main(words) == 2
        assert "tokenizer.model is not read" in capsys.readouterr().err
    assert cli.main(["export", str(base), "--out", str(artifact), "--quiet"]) == 0
    assert "AutoTokenizer.from_pretrained(DIR)" in capsys.readouterr().err
    with pytest.raises(HavocError, match=r"has no tokenizer.json .* \(--n 0\)"):
        require_rows(artifact, Scoring(num_rows=5))
    for words in (["bench", str(artifact), "--out", str(base.parent / "run")], ["eval", str(artifact), "--n", "2"]):
        assert cli.main(words) == 2
        assert "has no tokenizer.json" in capsys.readouterr().err
    assert not (base.parent / "run").exists()


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    """A base whose tokenizer drops a space at the beginning of a text."""
    torch.manual_seed(3)
    folder = chats.write_tokenizer(tmp_path / "base", "", kind="sentencepiece")
    config = HavocConfig.pico().replace(vocab_size=1100, initializer_range=0.3, pad_token_id=2)
    HavocModel(config).save_pretrained(folder)
    return folder


def test_completions_of_sentencepiece_keep_their_first_space(sentencepiece: Path) -> None:
    """Base and artifact write what transformers reads behind the prompt."""
    base = load_base(sentencepiece)
    session = DecoderSession.open(export_artifact(sentencepiece, sentencepiece.parent / "artifact"))
    theirs = transformers.AutoTokenizer.from_pretrained(sentencepiece)
    prompts = [Prompt(text) for text in files.CORPUS[:6]]
    ours = generate_text(base.model, base.tokenizer, prompts, max_new_tokens=12)
    assert session.generate_text(prompts, max_new_tokens=12) == ours
    num_spaces = 0
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([theirs(prompt.text)["input_ids"]])
        whole = base.model.generate(ids, max_new_tokens=12, temperature=0)[0].tolist()
        before, after = (theirs.decode(row, skip_special_tokens=True) for row in (ids[0].tolist(), whole))
        assert after == before + text
        num_spaces += text.startswith(" ")
    assert num_spaces > 0


def test_each_verb_takes_a_file(tmp_path: Path, run: Callable[..., str]) -> None:
    """A GGUF file stands wherever a base may: the verbs that read one say what it is."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, block="Q8_0", keys={"llama.context_length": 1024})
    assert "Q8_0" in run("import", path)
    assert "may pass" in run("plan", path, "--target", "host")
    scored = json.loads(run("eval", path, "--domain", "math", "--n", "2", "--max-new-tokens", "4", "--json"))
    assert scored["accuracy"]["math"]["num_rows"] == 2
    run("export", path, "--to", "hf", "--out", tmp_path / "hf")
    assert load_base(tmp_path / "hf").weight_hash == load_base(path).weight_hash


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command that must end well, and what it prints."""

    def call(*words: object) -> str:
        assert cli.main([*map(str, words)]) in {0, 1}
        return capsys.readouterr().out

    return call
