"""Text through the tokenizer and back, and special tokens that text cannot forge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from havoc_core.errors import HavocError
from havoc_core.model.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

CORPUS = ["def add(a, b):\n    return a + b", "What is 12 + 345? #### 357", "The cat is taller than the dog."] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 320)


@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    """Byte-level: every text, in every script, decodes to itself."""
    shared = test_any_text_comes_back.tokenizer
    assert shared.decode(shared.encode(text)) == text


test_any_text_comes_back.tokenizer = train_tokenizer(CORPUS, 320)


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    """<pad> <bos> <eos> <image> are ids 0 to 3, and the vocabulary has at most the size asked for."""
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (0, 1, 2, 3)
    assert 260 < tokenizer.vocab_size <= 320


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    """A number is as many tokens as it has digits."""
    assert len(tokenizer.encode("31415926")) == 8


def test_a_token_across_the_cut_belongs_to_the_continuation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One token that holds the prompt's end and all of the continuation: the cut is where the token begins."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    said = json.loads(path.read_text())
    number = max(entry["id"] for entry in said["added_tokens"]) + 1000
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    said["added_tokens"].append({"id": number, "content": "Answer: 12", **plain})
    path.write_text(json.dumps(said))
    wide = Tokenizer.load(tmp_path)
    prompt_ids, ids = wide.encode_continuation("What is 12?\nAnswer:", " 12")
    assert ids == [wide.backend.token_to_id("Answer: 12")]
    assert prompt_ids + ids == wide.encode_prompt("What is 12?\nAnswer: 12")
    assert wide.encode_continuation("What is 12?\nAnswer:", " 34")[0] == wide.encode_prompt("What is 12?\nAnswer:")


def test_text_cannot_forge_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The text "<eos>" stays text, before and after a save."""
    tokenizer.save(tmp_path)
    for each in (tokenizer, Tokenizer.load(tmp_path)):
        ids = each.encode("a<eos><image><pad>b")
        assert not set(ids) & {0, 1, 2, 3}
        assert each.decode(ids) == "a<eos><image><pad>b"


def test_prompts_begin_with_bos_and_patches(tokenizer: Tokenizer) -> None:
    """[bos] + [image] * patches + text; decoding leaves the specials out."""
    ids = tokenizer.encode_prompt("12 cats", num_patches=3)
    assert ids == [1, 3, 3, 3, *tokenizer.encode("12 cats")]
    assert tokenizer.decode([*ids, 2, 0, 0]) == "12 cats"
    assert tokenizer.decode_batch([ids, [1, *tokenizer.encode("x"), 2]]) == ["12 cats", "x"]


def test_training_is_repeatable(tmp_path: Path) -> None:
    """The same texts give the same file, byte for byte."""
    for name in ("first", "second"):
        train_tokenizer(CORPUS, 300).save(tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second"))
    assert first == second


def test_saved_and_loaded_agree(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ids and special tokens survive the disk."""
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.image_id) == (0, 1, 2, 3)


def test_transformers_reads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """AutoTokenizer loads the directory and finds the same ids."""
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(CORPUS[1], add_special_tokens=False)["input_ids"] == tokenizer.encode(CORPUS[1])
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def foreign_directory(tmp_path: Path, **configs: object) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|end|>": 1, "<s>": 2}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, fields in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    return tmp_path


def test_foreign_names_are_found(tmp_path: Path) -> None:
    """tokenizer_config.json names the special tokens, as text or as an object; a missing pad is the end token."""
    fields = {"eos_token": {"content": "<|end|>", "special": True}, "bos_token": "<s>"}
    loaded = Tokenizer.load(foreign_directory(tmp_path, tokenizer_config=fields))
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id, loaded.image_id) == (1, 2, 1, None)


def test_numbers_of_the_config_serve_without_names(tmp_path: Path) -> None:
    """Without tokenizer_config.json the ids of config.json hold; the first of several end tokens."""
    loaded = Tokenizer.load(foreign_directory(tmp_path, config={"eos_token_id": [1, 2], "bos_token_id": None}))
    assert (loaded.bos_id, loaded.eos_id) == (None, 1)
    assert loaded.encode_prompt("a") == [0]
    with pytest.raises(HavocError, match="has no image token"):
        loaded.encode_prompt("a", num_patches=1)


def test_broken_directories_are_named(tmp_path: Path) -> None:
    """A missing or broken file, an unknown or missing end token: one line each."""
    with pytest.raises(HavocError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HavocError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(HavocError, match="names the end-of-text token"):
        Tokenizer.load(foreign_directory(tmp_path))
    with pytest.raises(HavocError, match=r'eos_token "</s>" is not in tokenizer\.json'):
        Tokenizer.load(foreign_directory(tmp_path, tokenizer_config={"eos_token": "</s>"}))


def test_too_few_ids_are_refused() -> None:
    """The bytes and the special tokens need 260 ids."""
    with pytest.raises(HavocError, match="256 bytes, not 259 ids"):
        train_tokenizer(CORPUS, 259)


def test_vision_null_in_the_config_is_no_image_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A text model may say `"vision": null`."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"vision": None, "eos_token_id": 2}))
    assert Tokenizer.load(tmp_path).image_id is None


def test_a_tokenizer_that_cannot_encode_is_one_line() -> None:
    """A word list whose unknown word is not in it fails only when it meets text."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}, unk_token="none"))
    with pytest.raises(HavocError, match="cannot read the text"):
        Tokenizer(backend, pad_id=0, bos_id=None, eos_id=0, image_id=None).encode("hello")
