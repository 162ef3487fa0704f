r"""The tokenizer that a GGUF file describes in its metadata. No torch.

Two kinds are read: `gpt2`, byte-level BPE with merges and the name of a rule that cuts text into words, and `llama`,
SentencePiece's BPE with scores. The result is the one that transformers builds from the same file, so that both read a
text as the same ids (docs/decisions/0010): if transformers does not know a file's rule, GPT-2's is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from ..errors import HavocError, printable
from .chat import chat_template
from .tokenizer import Tokenizer, around

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .gguf_header import Header

MAX_TOKEN_CHARS = 1024
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA_3 = _WORDS + r"|\p{N}{1,3}" + _SIGNS + _TAIL
_QWEN_2 = _WORDS + r"|\p{N}" + _SIGNS + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_WORD_RULES = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "pixtral", "dbrx"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), _QWEN_2),
    "tekken": _TEKKEN,
}
"""Regular expressions of the published tokenizers, by llama.cpp's name for them; GPT-2's is `ByteLevel`'s own."""

_BEGINS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
"""Rules of tokenizers that begin a text with bos if the file does not say, and take whole words before merges."""


def read_tokenizer(header: Header) -> Tokenizer | None:
    """The tokenizer of a file, or None; one that cannot be built is a `HavocError` of one line."""
    if "tokenizer.ggml.model" not in header.metadata:
        return None
    try:
        return _tokenizer(_Fields(header))
    except HavocError as error:
        place = str(header.path)
        raise error if str(error).startswith(place) else HavocError(f"{place}: {error}") from error


class _Fields:
    """The metadata under `tokenizer.`, each value checked when it is read."""

    def __init__(self, header: Header) -> None:
        self._metadata, self.place = header.metadata, f"{header.path}: tokenizer.chat_template"
        self.model = self.text("ggml.model")
        self.tokens: list[str] = self._list("tokens", str)
        if not self.tokens:
            raise HavocError("tokenizer.ggml.tokens is empty")
        self._require_distinct()
        self.types: list[int] = self._list("token_type", int) or [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise HavocError(f"tokenizer.ggml.token_type has {len(self.types)} values for {len(self.tokens)} tokens")

    def _require_distinct(self) -> None:
        seen: set[str] = set()
        for token in self.tokens:
            if len(token) > MAX_TOKEN_CHARS:
                raise HavocError(f"tokenizer.ggml.tokens holds one of {len(token):,} characters, {token[:40]!r}...")
            if token in seen:
                raise HavocError(f"tokenizer.ggml.tokens holds {token[:40]!r} twice")
            seen.add(token)

    def text(self, name: str, default: str = "") -> str:
        value = self._metadata.get(f"tokenizer.{name}", default)
        if not isinstance(value, str):
            raise HavocError(f"tokenizer.{name} must be a text, not {value!r:.40}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise HavocError(f"tokenizer.ggml.{name} must be true or false, not {value!r:.40}")
        return value

    def token_id(self, name: str) -> int | None:
        """The id of that role; None for an id without a token."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def special_ids(self) -> set[int]:
        """Tokens that stay whole: control tokens, those that have a role, and those that a user defined."""
        roles = {self.token_id(name) for name in (*_ROLES.values(), "eot", "eom")} - {None}
        marked = {index for index, kind in enumerate(self.types) if kind in {_CONTROL, _USER_DEFINED}}
        return marked | {token_id for token_id in roles if token_id is not None}

    def merges(self) -> list[tuple[str, str]]:
        if "tokenizer.ggml.merges" not in self._metadata:
            return self._implied_merges()
        pairs = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        wrong = next((pair for pair in pairs if len(pair) != 2), None)  # noqa: PLR2004 - a pair
        if wrong is not None:
            raise HavocError(f"tokenizer.ggml.merges holds {' '.join(wrong)[:40]!r}, which is not a pair")
        return [(pair[0], pair[1]) for pair in pairs]

    def _implied_merges(self) -> list[tuple[str, str]]:
        """Every pair of tokens that forms a token, the best score first: SentencePiece stores scores, not merges."""
        scores: list[float] = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise HavocError(f"tokenizer.ggml.scores has {len(scores)} values for {len(self.tokens)} tokens")
        ids = {token: index for index, token in enumerate(self.tokens) if self.types[index] != _CONTROL}
        found = [
            (token[:cut], token[cut:], scores[index])
            for token, index in ids.items()
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        found.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
        return [(left, right) for left, right, _ in found]

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise HavocError(f"tokenizer.ggml.{name} must be a list of {kind.__name__} values")
        return values


def _tokenizer(fields: _Fields) -> Tokenizer:
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields.model not in builders:
        raise HavocError(
            f"tokenizer.ggml.model {printable(fields.model)[:40]!r} is not supported; HAVOC reads {', '.join(builders)}"
        )
    try:
        backend = builders[fields.model](fields)
        _add_special_tokens(backend, fields)
    except HavocError:
        raise
    except Exception as error:  # the Rust binding raises bare Exception
        raise HavocError(f"its metadata describes no tokenizer ({printable(str(error))[:200]})") from error
    ids = {role: fields.token_id(name) for role, name in _ROLES.items()}
    names = {role: fields.tokens[token_id] for role, token_id in ids.items() if token_id is not None}
    pre = fields.text("ggml.pre")
    begins = fields.flag("add_bos_token", default=fields.model == "llama" or pre in _BEGINS)
    ends = fields.flag("add_eos_token", default=False)
    backend.post_processor = around(
        bos=_named(names, ids, "bos") if begins else None, eos=_named(names, ids, "eos") if ends else None
    )
    backend.encode_special_tokens = True
    eos_ids = [token_id for name in ("eos", "eot", "eom") if (token_id := fields.token_id(name)) is not None]
    if not eos_ids:
        raise HavocError("tokenizer.ggml.eos_token_id names no token, so the end of a text is unknown")
    variables = {f"{role}_token": name for role, name in names.items()}
    return Tokenizer(
        backend,
        pad_id=eos_ids[0] if ids["pad"] is None else ids["pad"],
        bos_id=ids["bos"],
        eos_id=eos_ids[0],
        image_id=None,
        more_eos_ids=tuple(dict.fromkeys(token_id for token_id in eos_ids if token_id != eos_ids[0])),
        chat=chat_template(fields.text("chat_template"), variables, place=fields.place),
    )


def _named(names: Mapping[str, str], ids: Mapping[str, int | None], role: str) -> tuple[str, int] | None:
    token_id = ids[role]
    return None if token_id is None else (names[role], token_id)


def _byte_level(fields: _Fields) -> tokenizers.Tokenizer:
    """Byte-level BPE: tokens are spelled in 256 letters that represent bytes; other tokens are converted."""
    pre = fields.text("ggml.pre")
    special = fields.special_ids()
    vocab = {token if index in special else _spelled(token): index for index, token in enumerate(fields.tokens)}
    model = models.BPE(vocab, fields.merges(), ignore_merges=pre in _BEGINS)
    backend = tokenizers.Tokenizer(model)
    rule = _WORD_RULES.get(pre)
    if rule is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(Regex(rule), behavior="isolated")
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    return backend


_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _spelled(token: str) -> str:
    if set(token) <= _ALPHABET:
        return token
    return "".join(piece for piece, _ in _BYTES.pre_tokenize_str(token))


def _sentencepiece(fields: _Fields) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: spaces are written as a low line, a text begins with one, unknown letters are bytes."""
    vocab = {token: index for index, token in enumerate(fields.tokens)}
    unknown = fields.token_id("unknown")
    name = fields.tokens[unknown] if unknown is not None else next(iter(vocab))
    model = models.BPE(vocab, fields.merges(), unk_token=name, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    has_prefix = fields.flag("add_space_prefix", default=True)
    scheme = "first" if has_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if has_prefix else [])])
    return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, fields: _Fields) -> None:
    """Keep special tokens whole; user-defined tokens are not special, but stay whole too."""
    for token_id in sorted(fields.special_ids()):
        is_special = fields.types[token_id] != _USER_DEFINED
        token = AddedToken(fields.tokens[token_id], normalized=False, special=is_special)
        (backend.add_special_tokens if is_special else backend.add_tokens)([token])
