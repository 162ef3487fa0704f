"""The text that proofs read: a bundled page, or the user's file, as token ids. No torch.

The bundled page was written for this purpose: stories, sums, answers, code, tables, and ten scripts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...errors import HavocError
from ...storage import explained

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...model.config import HavocConfig
    from ...model.tokenizer import Tokenizer

BUNDLED = Path(__file__).with_name("sample.txt")
MAX_TEXT_BYTES = 4_000_000
MIN_TOKENS = 64
_RANDOM_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Token ids of one text in its order; `text_sha256` is None if there is no tokenizer and the ids are random.

    `prefix` is what the base's tokenizer puts before every text (bos, or nothing), and begins every window.
    """

    token_ids: tuple[int, ...]
    name: Literal["bundled text", "given text", "random ids"]
    text_sha256: str | None
    prefix: tuple[int, ...] = ()

    def windows(self, *, length: int, num_windows: int) -> NDArray[np.int64]:
        """At most this number of pieces [W, T] of `length` tokens or fewer, spread evenly over the whole text."""
        prefix = self.prefix[: max(length - 1, 0)]
        length = min(length - len(prefix), len(self.token_ids))
        num_windows = max(min(num_windows, len(self.token_ids) // length), 1)
        starts = np.linspace(0, len(self.token_ids) - length, num_windows).astype(int)
        return np.array([[*prefix, *self.token_ids[start : start + length]] for start in starts], np.int64)


def read_sample(config: HavocConfig, tokenizer: Tokenizer | None, *, file: Path | None = None) -> Sample:
    """Encode the bundled text or `file`; random ids without a tokenizer.

    A file that cannot be read, is not UTF-8, or has too little text is a `HavocError`.
    """
    if tokenizer is None:
        if file is not None:
            raise HavocError(
                f"--calibration {file}: the base has no tokenizer.json, so no text can be read; leave the option out"
            )
        drawn = np.random.default_rng(20).integers(0, config.vocab_size, _RANDOM_TOKENS)
        return Sample(token_ids=_without_images(drawn.tolist(), config), name="random ids", text_sha256=None)
    content = _read(file or BUNDLED)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HavocError(f"{file}: not UTF-8 text (byte {error.start}); give a plain text file") from error
    ids = tokenizer.encode(text)
    if file is not None and len(ids) < MIN_TOKENS:
        raise HavocError(f"{file}: {len(ids)} tokens of text, at least {MIN_TOKENS} are needed; a page or two is right")
    return Sample(
        token_ids=_without_images(ids, config),
        prefix=_prefix(tokenizer),
        name="bundled text" if file is None else "given text",
        text_sha256=hashlib.sha256(content).hexdigest(),
    )


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids before the text of a plain prompt."""
    text = tokenizer.encode("a")
    prompt = tokenizer.without_chat().encode_prompt("a")
    return tuple(prompt[: len(prompt) - len(text)]) if prompt[len(prompt) - len(text) :] == text else ()


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise HavocError(f"{path}: a folder, a pipe or a device, not a file")
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise explained(error, path) from error
    if len(content) > MAX_TEXT_BYTES:
        raise HavocError(f"{path}: more than {MAX_TEXT_BYTES:,} bytes; a page or two of text is enough")
    return content


def _without_images(ids: list[int], config: HavocConfig) -> tuple[int, ...]:
    image_id = None if config.vision is None else config.vision.image_token_id
    return tuple(token_id for token_id in ids if token_id != image_id)
