"""Text to token ids and back, through the `tokenizers` library and its `tokenizer.json`.

Text from outside never becomes a special token: "<eos>" typed by a user is five characters. The base decides the text
around a prompt: its chat template if it has one, else the additions of its post-processor. HAVOC's own tokenizers are
byte-level BPE with one token for each digit, so no text is unknown and 37 + 5 is read digit by digit. They begin each
text with <bos>.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ..errors import HavocError
from ..storage import explained, read_bounded, read_json, write_bytes
from .chat import ChatTemplate, find_chat_template

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAD, BOS, EOS, IMAGE = "<pad>", "<bos>", "<eos>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE)
NUM_BYTES = 256


_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Noncharacters of Unicode: one that a text does not hold is put into the special tokens that the text spells."""

_ANCHORS = ("\n", "a", ".", "0")
"""Texts to put before another: the first one that does not merge with it is used."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded `tokenizer.json` with the ids of its special tokens; None if there is no such token.

    `more_eos_ids` also end a text, besides `eos_id`. `chat` is the template for prompts; None: plain text.
    """

    backend: tokenizers.Tokenizer
    pad_id: int
    bos_id: int | None
    eos_id: int
    image_id: int | None
    more_eos_ids: tuple[int, ...] = ()
    chat: ChatTemplate | None = None

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; special tokens are those `tokenizer_config.json` names, else `config.json`.

        A text ends at the token that these name, and at every id of `config.json` and `generation_config.json`.
        """
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise HavocError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_bounded(file))
        except HavocError:
            raise
        except OSError as error:
            raise explained(error, file) from error
        except Exception as error:  # the Rust binding raises bare Exception for every kind of damage
            raise HavocError(f"{file}: not a tokenizer ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        ids = {role: _special_id(backend, file.parent, role) for role in ("pad", "bos", "eos", "image")}
        ends = _ends(file.parent)
        eos_id = ids["eos"] if ids["eos"] is not None else next(iter(ends), None)
        if eos_id is None:
            raise HavocError(
                f"{file.parent}: neither tokenizer_config.json nor config.json names the end-of-text token"
            )
        return cls(
            backend,
            pad_id=eos_id if ids["pad"] is None else ids["pad"],
            bos_id=ids["bos"],
            eos_id=eos_id,
            image_id=ids["image"],
            more_eos_ids=tuple(token_id for token_id in ends if token_id != eos_id),
            chat=find_chat_template(file.parent, _special_names(file.parent)),
        )

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and the `tokenizer_config.json` that transformers' AutoTokenizer reads."""
        for name, content in self.files().items():
            write_bytes(Path(directory) / name, content)

    def files(self) -> dict[str, bytes]:
        """The files of `save`, by name; the chat template is in `tokenizer_config.json`."""
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id, "image": self.image_id}
        names = {
            f"{role}_token": self.backend.id_to_token(token_id)
            for role, token_id in ids.items()
            if token_id is not None
        }
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        if self.chat is not None:
            fields |= self.chat.variables | {"chat_template": self.chat.source}
        config = json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
        return {"tokenizer.json": self.backend.to_str(pretty=True).encode(), "tokenizer_config.json": config}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def largest_id(self) -> int:
        """The largest id; a vocabulary with holes has fewer ids than this says."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id at which a text ends."""
        return (self.eos_id, *self.more_eos_ids)

    def without_chat(self) -> Tokenizer:
        """The same tokenizer for plain text: prompts do not go through the chat template."""
        return replace(self, chat=None)

    def encode(self, text: str) -> list[int]:
        """Ids of only the text: no special token is added or recognised."""
        return _encoded(self.backend, text)

    def encode_prompt(self, text: str, num_patches: int = 0) -> list[int]:
        """Ids of a prompt for the model.

        With a chat template: one message of the user, up to the beginning of the model's answer. Else the text with
        the additions of the tokenizer's own post-processor: a beginning of text, or nothing. The image tokens of
        `num_patches` patches come after the beginning of text.
        """
        if num_patches and self.image_id is None:
            raise HavocError("this tokenizer has no image token: the model reads text only")
        ids = self._prompt_ids(*self._framed(text))
        start = 1 if ids[:1] == [self.bos_id] else 0
        images = [] if self.image_id is None else [self.image_id] * num_patches
        return [*ids[:start], *images, *ids[start:]]

    def encode_continuation(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, as from `encode_prompt`, and of a continuation after it.

        Spaces at the end of the prompt belong to the continuation; both are encoded together and split after the number
        of ids of the prompt alone, as in lm-evaluation-harness (`_encode_pair`). If one token reaches from the prompt
        to the end of the continuation, nothing would be left: then the split is at the first different id.
        """
        framed, mark = self._framed(prompt)
        prompt_ids = self._prompt_ids(framed.rstrip(), mark)
        if self.chat is not None and mark:
            continuation = self._marked(continuation, mark)
        whole = self._prompt_ids(framed + continuation, mark)
        if len(whole) <= len(prompt_ids):
            pairs = enumerate(zip(prompt_ids, whole, strict=False))
            prompt_ids = prompt_ids[: next((place for place, (ours, theirs) in pairs if ours != theirs), len(whole))]
        return prompt_ids, whole[len(prompt_ids) :]

    def _framed(self, text: str) -> tuple[str, str]:
        """The prompt as text, and the mark inside every special token in the user's own words.

        A chat template writes its own special tokens, and only those may be recognised.
        """
        if self.chat is None:
            return text, ""
        mark = next((mark for mark in _MARKS if mark not in text), "")
        if not mark:
            raise HavocError("the text holds all noncharacters from U+FDD0 to U+FDEF; leave one of them out")
        return self.chat.render(self._marked(text, mark)), mark

    def _marked(self, text: str, mark: str) -> str:
        return self._special_text.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    def _prompt_ids(self, framed: str, mark: str) -> list[int]:
        if self.chat is None:
            return _encoded(self.backend, framed, is_framed=True)
        if mark not in framed:
            return _encoded(self._template_backend, framed)
        ids: list[int] = []
        for piece in self._special_text.split(framed):
            token_id = self._special_ids.get(piece)
            ids += [token_id] if token_id is not None else self._encoded_behind(piece.replace(mark, ""), ids)
        return ids

    def _encoded_behind(self, text: str, ids: Sequence[int]) -> list[int]:
        """Ids of plain text after other text: SentencePiece puts a space only before the first text."""
        if ids and self._marks_beginnings:
            for anchor in _ANCHORS:
                before, whole = self.encode(anchor), self.encode(anchor + text)
                if whole[: len(before)] == before:
                    return whole[len(before) :]
        return self.encode(text)

    @cached_property
    def _template_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer with recognition of special tokens: it reads the output of the template."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        tokens = self.backend.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in tokens if token.special}

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "((?!))")

    @cached_property
    def _marks_beginnings(self) -> bool:
        """Whether a text after a special token is read differently than alone."""
        special, token_id = next(iter(self._special_ids.items()))
        return _encoded(self._template_backend, special + "a") != [token_id, *self.encode("a")]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_completion(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
        """Text of the new ids as it continues the prompt: SentencePiece drops a space at the beginning of a text."""
        before, whole = self.decode(prompt_ids), self.decode([*prompt_ids, *new_ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(new_ids)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Text of each row of ids, as `decode`."""
        return list(self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` ids at most: 4 special tokens, 256 bytes, then merges.

    A prompt begins with <bos>.
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
    backend.post_processor = around(bos=(BOS, 1), eos=None)
    backend.encode_special_tokens = True
    return Tokenizer(backend, pad_id=0, bos_id=1, eos_id=2, image_id=3)


def _encoded(backend: tokenizers.Tokenizer, text: str, *, is_framed: bool = False) -> list[int]:
    try:
        return list(backend.encode(text, add_special_tokens=is_framed).ids)
    except Exception as error:  # the Rust binding raises bare Exception
        raise HavocError(f"the tokenizer cannot read the text ({error})") from error


def around(*, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """What puts a beginning and an end around every text."""
    single = " ".join([*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])])
    return processors.TemplateProcessing(single=single, special_tokens=[token for token in (bos, eos) if token])


def _special_names(directory: Path) -> dict[str, str]:
    """The values of `bos_token`, `eos_token` and so on in a chat template."""
    fields = _fields(directory / "special_tokens_map.json") | _fields(directory / "tokenizer_config.json")
    names = {role: _name(value) for role, value in fields.items() if role.endswith("_token")}
    return {role: name for role, name in names.items() if name is not None}


def _name(value: object) -> str | None:
    named = value.get("content") if isinstance(value, dict) else value
    return named if isinstance(named, str) else None


def _ends(directory: Path) -> tuple[int, ...]:
    """The ids that end a text by `config.json` and `generation_config.json`: chat models name theirs only there."""
    found: list[int] = []
    for file in ("config.json", "generation_config.json"):
        value = _fields(directory / file).get("eos_token_id")
        found += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0]
    return tuple(dict.fromkeys(found))


def _special_id(backend: tokenizers.Tokenizer, directory: Path, role: str) -> int | None:
    name = _name(_fields(directory / "tokenizer_config.json").get(f"{role}_token"))
    if isinstance(name, str):
        token_id = backend.token_to_id(name)
        if token_id is None and role != "pad":  # any id will do where nothing is read
            raise HavocError(
                f"{directory / 'tokenizer_config.json'}: {role}_token {json.dumps(name)} is not in tokenizer.json"
            )
        return token_id
    config = _fields(directory / "config.json")
    vision = config.get("vision")
    images = vision if isinstance(vision, dict) else {}
    numbered: Any = images.get("image_token_id") if role == "image" else config.get(f"{role}_token_id")
    first = numbered[0] if isinstance(numbered, list) and numbered else numbered
    return first if type(first) is int and first >= 0 else None


def _fields(file: Path) -> dict[str, Any]:
    fields = read_json(file) if file.exists() else {}
    return fields if isinstance(fields, dict) else {}
