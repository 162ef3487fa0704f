"""Text to token ids and back, through the `tokenizers` library and its `tokenizer.json`.

Text from outside never becomes a special token: "<eos>" typed by a user is five characters. Own tokenizers are
byte-level BPE with every digit its own token, so no text is unknown and 37 + 5 is read digit by digit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import HavocError
from ..storage import explained, read_json, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE)
NUM_BYTES = 256


def load_tokenizer(directory: str | Path, *, num_rows: int) -> Tokenizer | None:
    """The tokenizer of a base, None where it has none; one with more ids than the model's `num_rows` is refused."""
    file = Path(directory) / "tokenizer.json"
    if not file.exists() and not file.is_symlink():
        return None
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > num_rows:
        raise HavocError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model's table {num_rows} rows"
        )
    return tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """A loaded `tokenizer.json` with the ids of its special tokens; None where there is no such token."""

    backend: tokenizers.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int
    image_id: int | None

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; special tokens are those `tokenizer_config.json` names, else `config.json`."""
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise HavocError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
        try:
            backend = tokenizers.Tokenizer.from_buffer(file.read_bytes())
        except OSError as error:
            raise explained(error, file) from error
        except Exception as error:  # the Rust binding raises bare Exception for every kind of damage
            raise HavocError(f"{file}: not a tokenizer ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        ids = {role: _special_id(backend, file.parent, role) for role in ("pad", "bos", "eos", "image")}
        if ids["eos"] is None:
            raise HavocError(
                f"{file.parent}: neither tokenizer_config.json nor config.json names the end-of-text token"
            )
        pad_id = ids["eos"] if ids["pad"] is None else ids["pad"]
        return cls(backend, pad_id=pad_id, bos_id=ids["bos"], eos_id=ids["eos"], image_id=ids["image"])

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers' AutoTokenizer reads."""
        write_text(Path(directory) / "tokenizer.json", self.backend.to_str(pretty=True))
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id, "image": self.image_id}
        names = {
            f"{role}_token": self.backend.id_to_token(token_id)
            for role, token_id in ids.items()
            if token_id is not None
        }
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        write_json(Path(directory) / "tokenizer_config.json", fields)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special token is added or recognised."""
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the Rust binding raises bare Exception
            raise HavocError(f"the tokenizer cannot read the text ({error})") from error

    def encode_prompt(self, text: str, num_patches: int = 0) -> list[int]:
        """Ids a model is prompted with: [bos] + [image] * num_patches + text."""
        if num_patches and self.image_id is None:
            raise HavocError("this tokenizer has no image token: the model reads text only")
        bos = [] if self.bos_id is None else [self.bos_id]
        images = [] if self.image_id is None else [self.image_id] * num_patches
        return [*bos, *images, *self.encode(text)]

    def encode_continuation(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of what follows it, encoded together."""
        cut = len(prompt.rstrip())
        first = self.encode(prompt[:cut])
        whole = self.encode(prompt + continuation)
        return first, whole[len(first) :]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids, as `decode`."""
        return list(self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` ids at most: 4 special tokens, 256 bytes, then merges.

    Deterministic for the same texts in the same order.
    """
    if vocab_size < len(SPECIAL_TOKENS) + NUM_BYTES:
        raise HavocError(
            f"vocab_size must hold {len(SPECIAL_TOKENS)} special tokens and {NUM_BYTES} bytes, not {vocab_size} ids"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.encode_special_tokens = True
    return Tokenizer(backend, pad_id=0, bos_id=1, eos_id=2, image_id=3)


def _special_id(backend: tokenizers.Tokenizer, directory: Path, role: str) -> int | None:
    named = _fields(directory / "tokenizer_config.json").get(f"{role}_token")
    name = named.get("content") if isinstance(named, dict) else named
    if isinstance(name, str):
        token_id = backend.token_to_id(name)
        if token_id is None:
            raise HavocError(
                f"{directory / 'tokenizer_config.json'}: {role}_token {json.dumps(name)} is not in tokenizer.json"
            )
        return token_id
    config = _fields(directory / "config.json")
    vision = config.get("vision")
    images = vision if isinstance(vision, dict) else {}
    numbered: Any = images.get("image_token_id") if role == "image" else config.get(f"{role}_token_id")
    first = numbered[0] if isinstance(numbered, list) and numbered else numbered
    return first if type(first) is int else None


def _fields(file: Path) -> dict[str, Any]:
    fields = read_json(file) if file.exists() else {}
    return fields if isinstance(fields, dict) else {}
