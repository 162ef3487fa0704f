"""Log-likelihood of texts after their prompts, by a decoder session: it reads prompts once, then token by token.

    B prompts, R tree nodes of one depth, P past tokens, V vocab

The graph gives the logits of the last token, so the nodes of all trees of a batch (`model.likelihood.TokenTree`) are
read depth by depth: each gets the keys and values of its parent, and its logits score the next nodes. If the dialect
can continue after a past with several tokens per row, a common beginning of all prompts is read once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...errors import HavocError
from ...model.likelihood import PROMPT_END, Results, batches, encode_requests, shared_prefix
from .completion import left_padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...model.likelihood import Continuation, ScoredRow
    from ...model.prompt import PromptLike
    from .decoder import Decoder
    from .past import Past

TOKENS_PER_BATCH = 512
"""The number of prompt tokens, with padding, that are read at once."""
LOGITS_PER_BATCH = 1 << 24
"""The number of logits that are held at once: 64 MiB."""
CACHE_BYTES_PER_BATCH = 1 << 28
"""The bytes of keys and values that are held at once; twice that while they are extended."""


def log_likelihoods(session: Decoder, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> list[list[Continuation]]:
    """The likelihood of each text of each request after the request's prompt, in the given order.

    A picture, an empty text, or a text that fills the whole context is a `HavocError`; a prompt that is too long for
    the context loses its beginning (`Continuation.num_dropped`).
    """
    tokenizer = session.tokenizer
    if tokenizer is None:
        raise HavocError("this artifact has no tokenizer.json (its base had none), so it cannot read text")
    rows = encode_requests(tokenizer, requests, max_tokens=session.max_tokens)
    results = Results(requests)
    shared = shared_prefix(rows) if session.extends_many_rows else ()
    past = session.extend(np.array([shared], np.int64), None, session.empty_past(1))[1] if shared else None
    for batch in batches(rows, _Limits(session, num_shared=len(shared)).fit, length=lambda row: len(row.prompt_ids)):
        _score_batch(session, batch, past, results)
    return results.all()


class _Limits:
    """The limits of a batch: tokens, logits, and bytes of keys and values."""

    def __init__(self, session: Decoder, *, num_shared: int) -> None:
        self._num_shared, self._vocab_size = num_shared, session.config.vocab_size
        self._bytes_per_token = session.cache_bytes_per_token
        self._has_all_logits = session.options.logits == "all"
        self._cache_len = session.options.cache_len

    def fit(self, batch: Sequence[ScoredRow]) -> bool:
        num_prompt = max(len(row.prompt_ids) for row in batch)
        num_read = len(batch) * (num_prompt - self._num_shared)
        num_rows = _num_wide(batch)
        num_held = self._cache_len or num_prompt + max(max(row.tree.depths, default=-1) + 1 for row in batch)
        num_logits = max(num_rows, num_read if self._has_all_logits else 0) * self._vocab_size
        return (
            num_read <= TOKENS_PER_BATCH
            and num_logits <= LOGITS_PER_BATCH
            and num_rows * num_held * self._bytes_per_token <= CACHE_BYTES_PER_BATCH
        )


def _num_wide(batch: Sequence[ScoredRow]) -> int:
    """The most rows that are read at once: prompts, or nodes of one depth."""
    num_of_depth = np.bincount([depth for row in batch for depth in row.tree.depths], minlength=1)
    return max(len(batch), int(num_of_depth.max()))


def _score_batch(session: Decoder, batch: Sequence[ScoredRow], shared: Past | None, results: Results) -> None:
    num_shared = 0 if shared is None else shared.num_tokens
    ids, own_mask = left_padded([row.prompt_ids[num_shared:] for row in batch], session.pad_id)
    mask = np.concatenate((np.ones((len(batch), num_shared), np.int64), own_mask), axis=1)
    if shared is None:
        past = session.empty_past(len(batch), num_rows_later=_num_wide(batch))
    else:
        past = session.keep_rows(shared, np.zeros(len(batch), np.int64))
    logits, past = session.extend(ids, mask, past)
    scores = _Scores(batch)
    level = [(place, PROMPT_END) for place in range(len(batch))]
    while True:
        scores.add(level, logits)
        before = {node: index for index, node in enumerate(level)}
        level = [
            (place, node)
            for place, row in enumerate(batch)
            for node, parent in enumerate(row.tree.parents)
            if (place, parent) in before
        ]
        if not level:
            break
        parents = np.array([before[place, batch[place].tree.parents[node]] for place, node in level], np.int64)
        if not np.array_equal(parents, np.arange(past.num_rows)):
            past = session.keep_rows(past, parents)
        tokens = np.array([batch[place].tree.tokens[node] for place, node in level], np.int64)
        mask = np.concatenate((mask[parents], np.ones((len(level), 1), np.int64)), axis=1)
        logits, past = session.decode(tokens[:, None], mask, past)
    scores.put(results)


class _Scores:
    """The tokens of a batch's continuations, scored as the logits at the nodes that predict them come in."""

    def __init__(self, batch: Sequence[ScoredRow]) -> None:
        self._batch = batch
        self._waiting: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._starts: list[int] = [0]
        for place, row in enumerate(batch):
            for ids, path in zip(row.continuations, row.tree.paths, strict=True):
                for offset, (node, token) in enumerate(zip(path, ids, strict=True)):
                    self._waiting.setdefault((place, node), []).append((self._starts[-1] + offset, token))
                self._starts.append(self._starts[-1] + len(ids))
        self._log_p = np.zeros(self._starts[-1])
        self._is_likeliest = np.zeros(self._starts[-1], np.bool_)

    def add(self, level: Sequence[tuple[int, int]], logits_RV: NDArray[np.float32]) -> None:
        """Score what follows each node of a level by its logits."""
        found = [(index, *item) for index, node in enumerate(level) for item in self._waiting[node]]
        rows, slots, tokens = (np.array(column, np.int64) for column in zip(*found, strict=True))
        largest_R = logits_RV.max(axis=1)
        log_sum_R = largest_R + np.log(np.exp(logits_RV - largest_R[:, None]).sum(axis=1, dtype=np.float64))
        self._log_p[slots] = logits_RV[rows, tokens] - log_sum_R[rows]
        self._is_likeliest[slots] = logits_RV.argmax(axis=1)[rows] == tokens

    def put(self, results: Results) -> None:
        """Hand over the sums; every token must have been scored."""
        spans = iter(pairwise(self._starts))
        for row in self._batch:
            for which in range(len(row.continuations)):
                mine = slice(*next(spans))
                results.put(row, which, float(self._log_p[mine].sum()), is_greedy=bool(self._is_likeliest[mine].all()))
