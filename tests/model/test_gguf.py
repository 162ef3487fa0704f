"""GGUF files as bases: transformers loading the same file has the same weights, ids and logits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from havoc_core import cli
from havoc_core.errors import HavocError
from havoc_core.model.base_tokenizer import load_tokenizer
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config_file import is_gguf, read_config
from havoc_core.model.gguf import GgufTensors
from havoc_core.model.gguf_header import BLOCK_TYPES
from havoc_core.model.rope import rope_frequencies
from havoc_core.model.tokenizer import Tokenizer
from havoc_core.model.weights import open_tensors, weight_hash
from tests import gguf_files as files

BLOCKS = [block.name for block in BLOCK_TYPES.values()]


def theirs_of(path: Path) -> transformers.PreTrainedModel:
    """The file as transformers loads it, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def their_tokenizer(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def texts(num_texts: int, special: tuple[str, ...] = ()) -> list[str]:
    """Texts of many scripts, code, digits, emoji, white space and special tokens, the same every time."""
    rng = random.Random(7)
    words = [word for line in files.CORPUS[:6] for word in line.split(" ")]
    spaces = [" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u3000", "\u00a0", ""]
    blocks = [(0x20, 0x7F), (0xA1, 0x250), (0x370, 0x590), (0x5D0, 0x700), (0x900, 0xE00), (0x1E00, 0x2100)]
    blocks += [(0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0xFF00, 0xFF60), (0x1F300, 0x1FA70)]
    found = []
    for index in range(num_texts):
        parts = []
        for _ in range(rng.randrange(1, 30)):
            low, high = rng.choice(blocks)
            scripted = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 5)))
            number = str(rng.randrange(10 ** rng.randrange(1, 9)))
            parts += [rng.choice([rng.choice(words), rng.choice(words), scripted, number]), rng.choice(spaces)]
        if special and index % 4 == 0:
            parts.insert(rng.randrange(len(parts)), rng.choice(special))
        found.append("".join(parts))
    return found


@pytest.mark.parametrize(
    ("architecture", "block"),
    [("llama", block) for block in BLOCKS]
    + [(name, block) for name in ("qwen2", "qwen3") for block in ("F32", "Q4_1", "Q4_K")],
)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_weights_are_those_of_transformers(architecture: str, block: str, is_tied: bool, tmp_path: Path) -> None:
    """Every block type and architecture: the same names, shapes and values, bit for bit, tied and not."""
    path = tmp_path / "model.gguf"
    written = files.write_gguf(path, architecture=architecture, block=block, is_tied=is_tied)
    ours, theirs = GgufTensors(path), theirs_of(path).state_dict()
    assert set(ours) == set(written)
    assert set(theirs) - {"lm_head.weight"} == set(ours) - {"lm_head.weight"}
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    if block == "F32":  # whatever transformers does, these are known
        assert [name for name in ours if not torch.equal(ours[name], written[name])] == []


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_the_files_own(block: str, tmp_path: Path) -> None:
    """`blocks` gives what is stored, rows in Hugging Face's order: the library reads the same values out of them."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, block=block)
    ours = GgufTensors(path)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
        full = f"model.layers.1.{name}.weight"
        blocks = ours.blocks(full)
        assert blocks.type.name == block
        data = blocks.rows.view({"F32": np.float32, "F16": np.float16}.get(block, np.uint8))
        values = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[block])
        assert np.array_equal(values, ours[full].numpy())
        stored = reader[files.stored_name(full)].data.reshape(len(blocks.rows), -1).view(np.uint8)
        assert sorted(map(bytes, stored)) == sorted(map(bytes, blocks.rows))
        assert np.array_equal(stored, blocks.rows) == (name not in {"self_attn.q_proj", "self_attn.k_proj"})


def test_block_sizes_are_the_librarys() -> None:
    """The header is read without the library; its sizes are the same."""
    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (block.name, (block.size, block.num_bytes)) == (kind.name, tuple(gguf.GGML_QUANT_SIZES[kind]))


@pytest.mark.parametrize("pre", ["smollm", "default", "gpt-2", "llama-bpe", "qwen2", "tekken"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_ids_are_those_of_transformers(pre: str, architecture: str, tmp_path: Path) -> None:
    """1,000 texts of many scripts: the same ids, and with special tokens where transformers takes them for text."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, architecture=architecture, pre=pre)
    ours, theirs = load_tokenizer(path, num_rows=4096), their_tokenizer(path)
    assert_same_ids(ours, theirs, texts(1000, special=(*files.SPECIAL, *files.WHOLE)))


def test_sentencepiece_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """The kind `llama`: no merges in the file, bytes for unknown letters, a space in front of a text."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, vocabulary="llama", chat=None)
    ours, theirs = load_tokenizer(path, num_rows=4096), their_tokenizer(path)
    assert ours.encode_prompt("Hello")[0] == ours.bos_id
    assert_same_ids(ours, theirs, texts(1000))
    for text in texts(200):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def assert_same_ids(ours: Tokenizer, theirs: Any, many: list[str]) -> None:
    theirs.split_special_tokens = True
    theirs.backend_tokenizer.encode_special_tokens = True
    plain = ours.without_chat()
    wrong = [text for text in many if plain.encode_prompt(text) != theirs(text)["input_ids"]]
    assert wrong == []
    assert len(many) > 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_are_as_near_to_float64_as_transformers(architecture: str, tmp_path: Path) -> None:
    """Our error against a float64 forward pass is at most twice that of transformers in fp32."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, architecture=architecture, block="Q4_1")
    assert_near_float64(path, num_tokens=200)


def assert_near_float64(path: Path, *, num_tokens: int) -> None:
    base = load_base(path)
    theirs = theirs_of(path) if is_gguf(path) else their_directory(path)
    ids = torch.randint(base.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours_BTV, theirs_BTV = base.model(ids), theirs(ids).logits
        exact_BTV = float64_logits(base.model, ids)
    ours_error = (ours_BTV.double() - exact_BTV).abs().max().item()
    their_error = (theirs_BTV.double() - exact_BTV).abs().max().item()
    print(f"largest error of a logit: ours {ours_error:.2e}, transformers {their_error:.2e}")
    assert their_error < 1e-2 * exact_BTV.std().item()  # both compute the same model
    assert ours_error <= 2 * their_error


def their_directory(path: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def float64_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The same model in float64, RoPE's angles too."""
    exact = type(model)(model.config)
    exact.load_state_dict(model.state_dict())
    exact = exact.double().eval()
    angles_SF = np.outer(np.arange(model.config.max_seq_len), rope_frequencies(model.config.attention))
    cos_SF, sin_SF = torch.from_numpy(np.cos(angles_SF)), torch.from_numpy(np.sin(angles_SF))
    tables = {"cos_SH": torch.cat((cos_SF, cos_SF), dim=-1), "sin_SH": torch.cat((-sin_SF, sin_SF), dim=-1)}
    for module in exact.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            assert torch.allclose(buffer, tables[name], atol=1e-6)
            setattr(module, name, tables[name])
    return exact(ids)


def test_import_writes_the_directory_that_transformers_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`havoc import FILE --out DIR`: the same weights, hash, ids and chat as the file, in transformers and here."""
    path, out = tmp_path / "model.gguf", tmp_path / "directory"
    files.write_gguf(path, block="Q4_0")
    assert cli.main(["import", str(path), "--out", str(out), "--quiet"]) == 0
    assert "Q4_0" in capsys.readouterr().out
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names <= {file.name for file in out.iterdir()}
    assert weight_hash(open_tensors(out)) == weight_hash(GgufTensors(path)) == load_base(path).weight_hash
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        from_directory, from_file = their_directory(out)(ids).logits, theirs_of(path)(ids).logits
    assert torch.equal(from_directory, from_file)
    theirs, ours, file = transformers.AutoTokenizer.from_pretrained(out), load_base(out).tokenizer, load_base(path)
    message = [{"role": "user", "content": "  Hi 12!\n"}]
    chat_ids = theirs.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert chat_ids == ours.encode_prompt("  Hi 12!\n") == file.tokenizer.encode_prompt("  Hi 12!\n")
    assert ours.eos_ids == file.tokenizer.eos_ids == (2,)
    assert load_base(out).config.replace(bos_token_id=1) == file.config.replace(bos_token_id=1)


def test_import_writes_nothing_when_it_fails(tmp_path: Path) -> None:
    """A file whose values are NaN is refused by name, and no directory is left."""
    path, out = tmp_path / "model.gguf", tmp_path / "directory"
    files.write_gguf(path, block="F32", without="model.norm.weight", extra={"output_norm.weight": np.full(256, np.nan)})
    assert cli.main(["import", str(path), "--out", str(out), "--quiet"]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_every_end_of_text_stops(tmp_path: Path) -> None:
    """The end of a turn and of a message are ends beside the end of text, in the configuration too."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, keys={"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 0})
    base = load_base(path)
    assert base.tokenizer.eos_ids == (2, 3, 0)
    assert base.config.eos_token_ids == (2, 3, 0)
    assert load_base(path, is_chat=False).tokenizer.chat is None


def test_rope_frequencies_of_llama_3_become_its_scaling(tmp_path: Path) -> None:
    """llama.cpp stores the frequencies and not the numbers they come of; those of another kind are refused."""
    path, head_dim = tmp_path / "model.gguf", 32
    named = {
        "rope_type": "llama3",
        "rope_theta": 1e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(rope_parameters=named, head_dim=head_dim, max_position_embeddings=512)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    plain = 1e5 ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = (plain / rotary.inv_freq.double().numpy()).astype(np.float32)
    files.write_gguf(path, extra={"rope_freqs.weight": factors})
    scaling = read_config(path).attention.rope_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32.0, 1.0, 4.0)
    assert load_base(path).config.attention.rope_scaling == scaling
    files.write_gguf(path, extra={"rope_freqs.weight": factors * 1.5})
    with pytest.raises(HavocError, match="rope_freqs.weight scales RoPE"):
        load_base(path)


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
        ("llama", {"llama.rope.scaling.factor": 2.0}, "rope.scaling.factor = 2.0 is not supported"),
        ("qwen2", {"qwen2.expert_count": 8}, "qwen2.expert_count = 8 is not supported"),
        ("llama", {"llama.logit_scale": 2.0}, "unknown key llama.logit_scale"),
        ("llama", {"llama.attention.sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ("llama", {"llama.rope.dimension_count": 16}, "rope.dimension_count 16 is not the head's size of 32"),
        ("llama", {"llama.block_count": None}, "llama.block_count is missing"),
        ("llama", {"llama.block_count": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ("llama", {"llama.block_count": 1}, "tensor model.layers.1.input_layernorm.weight is not part of this model"),
        ("llama", {"llama.feed_forward_length": 256}, r"has shape \[512, 256\], the config says \[256, 256\]"),
        ("llama", {"llama.attention.head_count": [8, 4]}, "must be a whole number of at least 1"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ("llama", {"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id names no token"),
        ("llama", {"tokenizer.ggml.merges": ["a"]}, "tokenizer.ggml.merges holds 'a', which is not a pair"),
        ("llama", {"tokenizer.ggml.merges": ["qq zz"]}, "describes no tokenizer"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b" * 5000]}, "tokenizer.ggml.tokens holds one of 5,000 characters"),
        ("llama", {"tokenizer.ggml.token_type": [1]}, "token_type has 1 values"),
        ("llama", {"split.count": 3}, "is one of 3 parts"),
        ("llama", {"general.alignment": 3}, "general.alignment 3"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    architecture: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One line that names the file and the key."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, architecture=architecture, keys=keys)
    with pytest.raises(HavocError, match=message) as refused:
        load_base(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    """Gemma has other norms: its file is refused."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(HavocError, match="'gemma' .*: .*llama, qwen2, qwen3"):
        load_base(path)


def test_a_file_without_a_tokenizer_reads_no_text(tmp_path: Path) -> None:
    """It can be exported; text is refused with the reason."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, keys={"tokenizer.ggml.model": None})
    with pytest.raises(HavocError, match="metadata holds no tokenizer"):
        load_base(path).tokenizer  # noqa: B018


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Opening a file and asking for one tensor leaves the others on disk."""
    path = tmp_path / "model.gguf"
    files.write_gguf(path, block="F16")
    ours = GgufTensors(path)
    rows = ours.blocks("model.embed_tokens.weight").rows
    assert isinstance(rows, np.memmap)
    assert ours["model.norm.weight"].dtype == torch.float32
    assert ours.shape("model.embed_tokens.weight") == tuple(ours["model.embed_tokens.weight"].shape)


@pytest.mark.real
@pytest.mark.timeout(3600)
def test_real_file_is_as_transformers_reads_it(real_model: Path) -> None:
    """Weights, ids of 1,000 texts, and logits of the real file; logits alone of a directory."""
    if is_gguf(real_model):
        ours, theirs = GgufTensors(real_model), theirs_of(real_model).state_dict()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        base = load_base(real_model)
        assert_same_ids(base.tokenizer, their_tokenizer(real_model), texts(1000, special=("<|im_end|>", "<s>")))
    assert_near_float64(real_model, num_tokens=256)
