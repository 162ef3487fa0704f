"""Directories: bit for bit there and back, and every kind of damage named in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from havoc_core.errors import HavocError
from havoc_core.model import HavocConfig, HavocModel, VisionConfig, load_base, train_tokenizer
from havoc_core.model.hf_config import to_hf
from havoc_core.model.weights import weight_hash

CONFIGS = {
    "tied": HavocConfig.pico(),
    "untied": HavocConfig.pico().replace(tie_word_embeddings=False),
    "vision": HavocConfig.pico(vision=VisionConfig(patch_size=2, image_token_id=3)),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> HavocModel:
    torch.manual_seed(0)
    return HavocModel(request.param).eval()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    HavocModel(HavocConfig.pico()).save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / "model.safetensors"
    state = safetensors.torch.load_file(file)
    edit(state)
    safetensors.torch.save_file(state, file)


@pytest.mark.parametrize("use_safetensors", [True, False], ids=["safetensors", "pt"])
def test_bit_for_bit(model: HavocModel, tmp_path: Path, use_safetensors: bool) -> None:
    """Config, weights, tie and logits come back exactly, in eval mode and trainable."""
    model.save_pretrained(tmp_path, use_safetensors=use_safetensors)
    assert (tmp_path / ("model.safetensors" if use_safetensors else "model.pt")).is_file()
    loaded = HavocModel.load_pretrained(tmp_path)
    assert loaded.config == model.config
    ours, theirs = model.named_tensors(), loaded.named_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.randint(4, 64, (2, 7))
    assert torch.equal(loaded(ids), model(ids))


def test_saving_twice_gives_the_same_bytes(model: HavocModel, tmp_path: Path) -> None:
    """A save is repeatable, and so is the save of what was loaded."""
    model.save_pretrained(tmp_path / "first")
    HavocModel.load_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_names_are_hugging_face_names(model: HavocModel, tmp_path: Path) -> None:
    """The file holds exactly the tensors of the plan, a tied head not among them."""
    from havoc_core.model.tensors import tensor_shapes

    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(model.config)


def test_half_precision_on_disk_is_fp32_in_memory(tmp_path: Path) -> None:
    """fp16 takes half the disk, says so in config.json, and loads as the fp32 of its values."""
    model = HavocModel(HavocConfig.pico())
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    for name, tensor in HavocModel.load_pretrained(tmp_path).named_tensors().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.named_tensors()[name].half().float())


def test_two_forms_in_one_directory_are_refused(directory: Path) -> None:
    """A .pt beside safetensors would never be read: the save is refused before anything is written."""
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(HavocError, match=r"already holds model\.safetensors"):
        HavocModel(HavocConfig.pico()).save_pretrained(directory, use_safetensors=False)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_shards_are_one_model(directory: Path, tmp_path: Path) -> None:
    """Tensors split over files by an index load as from one file."""
    whole = safetensors.torch.load_file(directory / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(whole)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: whole[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "config.json").write_bytes((directory / "config.json").read_bytes())
    loaded = HavocModel.load_pretrained(sharded).named_tensors()
    assert all(torch.equal(loaded[name], whole[name]) for name in names)
    assert weight_hash(sharded) == weight_hash(directory)


def test_a_missing_head_is_not_made_up(directory: Path) -> None:
    """Untied by the config but without lm_head: an error that says so, not random logits."""
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(HavocError, match=r"lm_head\.weight is missing: .*tie_word_embeddings"):
        HavocModel.load_pretrained(directory)


def test_a_tied_head_may_be_stored_if_it_is_equal(directory: Path) -> None:
    """A redundant copy of the table is accepted; another table is not."""
    embedding = "model.embed_tokens.weight"
    edit_tensors(directory, lambda state: state.update({"lm_head.weight": state[embedding].clone()}))
    HavocModel.load_pretrained(directory)
    edit_tensors(directory, lambda state: state["lm_head.weight"].add_(1.0))
    with pytest.raises(HavocError, match=r"lm_head\.weight .* model\.embed_tokens\.weight"):
        HavocModel.load_pretrained(directory)


def test_former_buffers_are_left_out(directory: Path) -> None:
    """inv_freq, which old Llama checkpoints carry, is ignored."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = HavocModel.load_pretrained(directory).named_tensors()
    edit_tensors(directory, lambda state: state.update({name: torch.ones(4)}))
    after = HavocModel.load_pretrained(directory).named_tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"model\.norm\.weight is missing$"),
        (lambda state: [state.pop(name) for name in list(state)[:3]], r"is missing \(and 2 more\)"),
        (lambda state: state.update(surprise=torch.ones(2)), "tensor surprise is not part of this model"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has shape \[31\], the config says \[32\]",
        ),
        (lambda state: state["model.norm.weight"].fill_(torch.nan), r"model\.norm\.weight holds NaN or Inf"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is I8; quantized",
        ),
    ],
    ids=["missing", "three missing", "extra", "shape", "nan", "quantized"],
)
def test_wrong_tensors_are_named(directory: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    """What is missing, extra, ill-shaped, not finite or quantized is named, by load and by load_base."""
    edit_tensors(directory, edit)
    for load in (HavocModel.load_pretrained, load_base):
        with pytest.raises(HavocError, match=message):
            load(directory)


def damage_header(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def damage_json(data: bytes) -> bytes:
    return data[:8] + b"?" + data[9:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-10],
        lambda data: data[:4],
        lambda _: b"",
        damage_header,
        damage_json,
        lambda data: data + b"x",
    ],
    ids=["cut off", "only a stump", "empty", "huge header", "broken header", "too long"],
)
def test_broken_safetensors_are_refused(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    """A damaged file is one line with its name, and exit code 2."""
    file = directory / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(HavocError, match=rf"^{re.escape(str(file))}: not a whole safetensors file") as caught:
        HavocModel.load_pretrained(directory)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    "content", [{"model.norm.weight": Hostile()}, [1, 2], {"a": 3}, None], ids=["code", "list", "number", "no-pickle"]
)
def test_pt_files_run_no_code(tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pt that is not tensors by name is refused, and nothing in it is executed."""
    HavocModel(HavocConfig.pico()).save_pretrained(tmp_path, use_safetensors=False)
    torch.save(content, tmp_path / "model.pt") if content is not None else (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(HavocError, match=r"model\.pt: (not a file of plain tensors|must hold tensors by name)"):
        HavocModel.load_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_base_knows_its_hash(directory: Path) -> None:
    """The hash of a base is the hash of its tensors; one changed bit is another base."""
    base = load_base(directory)
    assert base.weight_hash == weight_hash(base.model.named_tensors()) == weight_hash(base.tensors())
    assert (base.directory, base.is_random, base.config) == (directory, False, HavocConfig.pico())
    edit_tensors(directory, lambda state: state["model.norm.weight"][0].add_(1e-6))
    assert load_base(directory).weight_hash != base.weight_hash


def test_a_preset_is_random_and_says_so() -> None:
    """A preset has random weights, the same each time, and no tokenizer to pretend with."""
    base = load_base("pico")
    assert base.is_random
    assert base.weight_hash == load_base("pico").weight_hash == weight_hash(base.tensors())
    with pytest.raises(HavocError, match="no tokenizer"):
        _ = base.tokenizer


def test_a_base_brings_its_tokenizer(directory: Path) -> None:
    """The tokenizer is loaded; one with more ids than the table has rows is refused."""
    train_tokenizer(["a few words"], 261).save(directory)
    with pytest.raises(HavocError, match="id 260, the model's table 64 rows"):
        load_base(directory)
    other = directory / "large"
    HavocModel(HavocConfig.pico().replace(vocab_size=300)).save_pretrained(other)
    train_tokenizer(["a few words"], 261).save(other)
    assert load_base(other).tokenizer.decode(load_base(other).tokenizer.encode("words")) == "words"


def test_what_is_no_base_is_named(tmp_path: Path) -> None:
    """Neither a directory nor a preset; or a directory without weights or config."""
    with pytest.raises(HavocError, match=r"\.gguf"):
        load_base(str(tmp_path / "absent"))
    with pytest.raises(HavocError, match=r"config\.json: no such file"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(HavocConfig.pico())))
    with pytest.raises(HavocError, match=r"model\.safetensors .*model\.safetensors\.index\.json"):
        load_base(tmp_path)


# --- what other tools write


def in_old_spelling(directory: Path) -> None:
    """Rewrite config.json as transformers before version 5 wrote it."""
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": fields.pop("dtype")}
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(fields))


FOREIGN: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "llama3 rope": (
        transformers.LlamaConfig,
        {
            "head_dim": 20,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "tied qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3 with its own head_dim": (transformers.Qwen3Config, {"head_dim": 16}),
}


@torch.no_grad()
@pytest.mark.parametrize("is_old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", FOREIGN)
def test_their_shards_in_either_spelling(tmp_path: Path, name: str, is_old: bool) -> None:
    """Sharded by transformers, config old or new: the same logits below 1e-5, far beyond the original context."""
    kind, changes = FOREIGN[name]
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(kind(**sizes, **changes), dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    if is_old:
        in_old_spelling(tmp_path)
    ids = torch.randint(0, 97, (2, 200), generator=torch.Generator().manual_seed(1))
    theirs_BTV = theirs(ids).logits
    assert theirs_BTV.std() > 0.1
    assert (HavocModel.load_pretrained(tmp_path)(ids) - theirs_BTV).abs().max() < 1e-5


def test_opening_a_base_imports_no_compiler() -> None:
    """Weights drawn on the meta device, only to be replaced, cost a second: they import `torch._dynamo`."""
    code = """
import sys
from havoc_core.model import load_base
logits = load_base("nano").model(__import__("torch").tensor([[1, 5]]))
assert logits.isfinite().all() and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
