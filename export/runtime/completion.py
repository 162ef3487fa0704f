"""Text from a decoder session: prompts of like length in one left-padded batch, finished rows dropped.

A batch costs about as much as its cache is large, so a row that has ended is taken out as soon as a sixth of the batch
has ended; moving the rest costs as much as one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import HavocError
from ...model.stopping import StopStrings
from ...model.vision import patchify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...model.prompt import PromptLike
    from ...model.tokenizer import Tokenizer
    from .decoder import Decoder

SHARE_ALIVE_BEFORE_DROPPING = 5 / 6
CACHE_BYTES = 1 << 29
"""The most bytes for keys and values of all rows that are written at once; twice that if a cache is written again."""


def generate_text(
    session: Decoder,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Complete every prompt, greedily at temperature 0: the new text only, in the order given.

    A text ends before the first of the `stop` strings.
    """
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise HavocError("this artifact has no tokenizer.json (its base had none), so it cannot read text")
    stops = StopStrings(tokenizer, stop)
    images = [_patches(session, prompt) for prompt in prompts]
    rows = [
        tokenizer.encode_prompt(prompt.text, 0 if image is None else len(image))
        for prompt, image in zip(prompts, images, strict=True)
    ]
    completed = generate_ids(
        session,
        rows,
        images,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        eos_ids=_eos_ids(session, tokenizer),
        stops=stops,
        temperature=temperature,
        seed=seed,
    )
    texts = (tokenizer.decode_completion(row, new) for row, new in zip(rows, completed, strict=True))
    return [stops.cut(text) for text in texts]


def generate_ids(
    session: Decoder,
    rows: Sequence[Sequence[int]],
    images: Sequence[NDArray[np.float32] | None] | None = None,
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    eos_ids: Sequence[int] = (),
    stops: StopStrings | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue rows of token ids; return the new ids of each with its end token; `images` [num_patches, patch_dim].

    A row ends at one of `eos_ids`, or when its text contains one of `stops`. Greedy at temperature 0, else drawn from
    softmax(logits / temperature), the same for the same seed and batch size. At most `batch_size` rows, whose keys and
    values fit into `CACHE_BYTES`, are written at once.
    """
    images = images or [None] * len(rows)
    _require_room(session, rows, max_new_tokens)
    image_id = None if session.config.vision is None else session.config.vision.image_token_id
    pick = _Pick(temperature, seed, banned_id=image_id)
    eos_ids = (*eos_ids, *(stops.token_ids if stops else ()))
    completions: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        indices = order[:batch_size]
        indices = indices[: _rows_that_fit(session, len(rows[indices[-1]]) + max_new_tokens)]
        order = order[len(indices) :]
        present = [image for index in indices if (image := images[index]) is not None]
        patches = np.concatenate(present) if present else None
        batch = _generate_batch(
            session, [rows[index] for index in indices], patches, max_new_tokens, eos_ids, stops, pick
        )
        for index, completion in zip(indices, batch, strict=True):
            completions[index] = completion
    return completions


def _rows_that_fit(session: Decoder, num_tokens: int) -> int:
    """The number of rows of this length with keys and values of at most `CACHE_BYTES`; at least one."""
    num_tokens = session.options.cache_len or num_tokens
    return max(1, CACHE_BYTES // (num_tokens * session.cache_bytes_per_token))


def _require_room(session: Decoder, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    longest, context = max(map(len, rows), default=0), session.max_tokens
    what = "the model's context" if session.options.cache == "dynamic" else "the artifact's static cache"
    if max_new_tokens < 1:
        raise HavocError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if longest + max_new_tokens > context:
        raise HavocError(f"{longest} prompt tokens and max_new_tokens {max_new_tokens} exceed {what} of {context}")


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stack token rows, padded on the left: ids [B, T] and attention mask [B, T], both int64."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


class _Pick:
    """Chooses a token per row from logits [B, V]; never the image token, which represents a given patch."""

    def __init__(self, temperature: float, seed: int, banned_id: int | None) -> None:
        self._temperature, self._rng, self._banned_id = temperature, np.random.default_rng(seed), banned_id

    def __call__(self, logits_BV: NDArray[np.float32]) -> NDArray[np.int64]:
        if self._banned_id is not None:
            logits_BV = logits_BV.copy()
            logits_BV[:, self._banned_id] = -np.inf
        scores_BV: NDArray[np.floating] = logits_BV
        if self._temperature > 0:  # the largest of logits / T + Gumbel noise is a draw from softmax(logits / T)
            scores_BV = logits_BV / self._temperature + self._rng.gumbel(size=logits_BV.shape)
        token_ids_B: NDArray[np.int64] = scores_BV.argmax(axis=-1)
        return token_ids_B


def _generate_batch(
    session: Decoder,
    rows: Sequence[Sequence[int]],
    patches: NDArray[np.float32] | None,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    stops: StopStrings | None,
    pick: _Pick,
) -> list[list[int]]:
    ids, prompt_mask = left_padded(rows, session.pad_id)
    num_rows, width = ids.shape
    new_BN = np.zeros((num_rows, max_new_tokens), np.int64)
    num_new = np.zeros(num_rows, np.int64)
    mask = np.concatenate((prompt_mask, np.ones((num_rows, max_new_tokens), np.int64)), axis=1)
    alive = np.arange(num_rows)
    is_open = np.ones(num_rows, np.bool_)
    empty = session.empty_past(num_rows, capacity=width + max_new_tokens)
    logits, past = session.extend(ids, prompt_mask, empty, patches)
    for step in range(max_new_tokens):
        token_ids = pick(logits)
        new_BN[alive, step] = token_ids
        num_new[alive[is_open]] = step + 1
        is_open &= ~np.isin(token_ids, eos_ids)
        if stops:
            is_open &= ~np.array(stops.are_reached(new_BN[alive, : step + 1].tolist()))
        num_open = int(is_open.sum())
        if num_open == 0 or step == max_new_tokens - 1:
            break
        if num_open < SHARE_ALIVE_BEFORE_DROPPING * len(alive):
            kept = np.flatnonzero(is_open)
            alive, token_ids, mask, is_open = alive[kept], token_ids[kept], mask[kept], is_open[kept]
            past = session.keep_rows(past, kept)
        logits, past = session.decode(token_ids[:, None], mask[:, : width + step + 1], past)
    return [row[:count].tolist() for row, count in zip(new_BN, num_new, strict=True)]


def _eos_ids(session: Decoder, tokenizer: Tokenizer) -> list[int]:
    return sorted({*tokenizer.eos_ids, *session.config.eos_token_ids})


def _patches(session: Decoder, prompt: PromptLike | Any) -> NDArray[np.float32] | None:  # noqa: ANN401
    if prompt.image_png is None:
        return None
    if session.config.vision is None:
        raise HavocError("the prompt has an image, but this model reads text only")
    return patchify(prompt.image_png, session.config.vision)
