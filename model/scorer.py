"""Scores and text from a torch model: one forward pass reads many prompts, each followed by all its continuations.

Legend: B rows, T tokens read, P tokens shared by all prompts, S = P + T, E tokens to score, V vocab, K kv heads, H head
dim, D model.

A row is its prompt followed by its tree of continuations (`likelihood.TokenTree`). A token of the tree sees the prompt
and its own ancestors, as in tree attention for speculative decoding (SpecInfer, arXiv 2305.09781). The head is computed
only where a continuation's token is predicted, a bounded number of places at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .generation import generate_text
from .likelihood import PROMPT_END, Results, batches, encode_requests, shared_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .blocks import KeyValue
    from .likelihood import Continuation, ScoredRow
    from .prompt import PromptLike
    from .tokenizer import Tokenizer
    from .transformer import HavocModel

TOKENS_PER_BATCH = 512
"""The number of tokens of all rows, with padding, that are read at once; a longer row is read alone, prompt first.

SmolLM2-135M on one thread of a Zen 3 processor: 60 rows of ARC-Easy take 8.1 s of CPU time with 256 or 512, 8.4 with
1024, 9.9 with 2048.
"""
LOGITS_PER_CHUNK = 1 << 24
"""The number of logits that are held at once: 64 MiB in fp32."""


class TorchScorer:
    """A torch model and its tokenizer, for texts or for the likelihood of texts."""

    def __init__(self, model: HavocModel, tokenizer: Tokenizer, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        """`tokens_per_batch` bounds memory: beyond the default a processor's caches overflow."""
        self._model, self._tokenizer, self._tokens_per_batch = model, tokenizer, tokens_per_batch

    def generate_text(
        self, prompts: Sequence[PromptLike], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Complete every prompt greedily: the new text only, up to the first of `stop`, in the order given."""
        return generate_text(self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop)

    def log_likelihoods(self, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> list[list[Continuation]]:
        """The likelihood of each text of each request after the request's prompt, in the given order.

        A picture, an empty text, or a text that fills the whole context is a `HavocError`; a prompt too long for the
        context loses its beginning (`Continuation.num_dropped`).
        """
        rows = encode_requests(self._tokenizer, requests, max_tokens=self._model.config.max_seq_len)
        results = Results(requests)
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                self._score(rows, results)
        finally:
            self._model.train(was_training)
        return results.all()

    def _score(self, rows: Sequence[ScoredRow], results: Results) -> None:
        shared = shared_prefix(rows)
        past = self._read_shared(shared)

        def fits(batch: Sequence[ScoredRow]) -> bool:
            return len(batch) * (batch[0].num_tokens - len(shared)) <= self._tokens_per_batch

        for batch in batches(rows, fits, length=lambda row: row.num_tokens):
            own, own_past = shared, past
            if not fits(batch):  # a long row, alone: a mask over its whole prompt would be large
                own = batch[0].prompt_ids[:PROMPT_END]
                own_past = self._read_shared(own)
            x_ED = self._read(batch, own_past, num_shared=len(own))
            self._predict(batch, x_ED, results)

    def _read_shared(self, ids: Sequence[int]) -> list[KeyValue] | None:
        """Keys and values [1, K, P, H] of every layer, of the tokens that all prompts of a batch begin with."""
        if not ids:
            return None
        ids_1P = torch.tensor([ids], device=self._model.norm.weight.device)
        _, past = self._model(ids_1P, use_cache=True, last_only=True)
        return list(past)

    def _read(self, batch: Sequence[ScoredRow], past: list[KeyValue] | None, *, num_shared: int) -> Tensor:
        """Read a batch: the residual stream [E, D] at the prompt's end and at each node of each row, row by row."""
        device, dtype = self._model.norm.weight.device, self._model.norm.weight.dtype
        width = max(row.num_tokens for row in batch) - num_shared
        ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
        positions_BT = torch.zeros_like(ids_BT)
        is_visible_BTS = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
        is_scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for place, row in enumerate(batch):
            own, tree = row.prompt_ids[num_shared:], row.tree
            size = len(own) + len(tree.tokens)
            ids_BT[place, :size] = torch.tensor([*own, *tree.tokens])
            ahead = [*range(len(own)), *(len(own) + depth for depth in tree.depths)]
            positions_BT[place, :size] = torch.tensor(ahead) + num_shared
            is_visible_BTS[place, :size, :size] = _visible(len(own), tree.parents)
            is_scored_BT[place, len(own) + PROMPT_END : size] = True
        if num_shared:
            seen = torch.ones(len(batch), width, num_shared, dtype=torch.bool)
            is_visible_BTS = torch.cat((seen, is_visible_BTS), dim=2)
        mask_B1TS = torch.zeros(is_visible_BTS.shape, dtype=dtype).masked_fill_(~is_visible_BTS, float("-inf"))
        x_BTD = self._layers(ids_BT.to(device), positions_BT.to(device), mask_B1TS.unsqueeze(1).to(device), past)
        return x_BTD[is_scored_BT.to(device)]

    def _layers(self, ids_BT: Tensor, positions_BT: Tensor, mask_B1TS: Tensor, past: list[KeyValue] | None) -> Tensor:
        """The residual stream [B, T, D] after the last layer; each layer gets its part of the shared past."""
        model = self._model
        rotary = model.rotary(positions_BT)
        x_BTD: Tensor = model.embed_tokens(ids_BT)
        for index, layer in enumerate(model.layers):
            shared = None
            if past is not None:
                key_1KPH, value_1KPH = past[index]
                shared = (key_1KPH.expand(len(ids_BT), -1, -1, -1), value_1KPH.expand(len(ids_BT), -1, -1, -1))
            x_BTD, _ = layer(x_BTD, rotary, mask_B1TS, shared)
        return x_BTD

    def _predict(self, batch: Sequence[ScoredRow], x_ED: Tensor, results: Results) -> None:
        """Score every token of every continuation at the place that predicts it."""
        edges = list(_edges(batch))
        places = torch.tensor([place for place, _ in edges], device=x_ED.device)
        targets = torch.tensor([token for _, token in edges], device=x_ED.device)
        log_p = torch.empty(len(edges), dtype=torch.float64)
        is_likeliest = torch.empty(len(edges), dtype=torch.bool)
        per_chunk = max(1, LOGITS_PER_CHUNK // self._model.config.vocab_size)
        for start in range(0, len(x_ED), per_chunk):
            logits_EV: Tensor = self._model.lm_head(self._model.norm(x_ED[start : start + per_chunk])).float()
            here = ((places >= start) & (places < start + per_chunk)).nonzero()[:, 0]
            at, token = places[here] - start, targets[here]
            log_p[here.cpu()] = (logits_EV[at, token] - logits_EV.logsumexp(dim=-1)[at]).double().cpu()
            is_likeliest[here.cpu()] = (logits_EV.argmax(dim=-1)[at] == token).cpu()
        start = 0
        for row in batch:
            for which, ids in enumerate(row.continuations):
                mine = slice(start, start + len(ids))
                results.put(row, which, float(log_p[mine].sum()), is_greedy=bool(is_likeliest[mine].all()))
                start += len(ids)


def _visible(num_prompt: int, parents: Sequence[int]) -> Tensor:
    """Which tokens [T, T] of its row each sees: in the prompt those before it, in the tree the prompt and ancestors."""
    size = num_prompt + len(parents)
    is_visible_TT = torch.eye(size, dtype=torch.bool)
    is_visible_TT[:num_prompt, :num_prompt] = torch.ones(num_prompt, num_prompt, dtype=torch.bool).tril()
    for node, parent in enumerate(parents, start=num_prompt):
        is_visible_TT[node] |= is_visible_TT[num_prompt + parent]
    return is_visible_TT


def _edges(batch: Sequence[ScoredRow]) -> list[tuple[int, int]]:
    """For every token of every continuation, row by row: the place in [E] that predicts it, and the token."""
    edges, start = [], 0
    for row in batch:
        start += 1  # the prompt's end
        for ids, path in zip(row.continuations, row.tree.paths, strict=True):
            edges += [(start + node, token) for node, token in zip(path, ids, strict=True)]
        start += len(row.tree.tokens)
    return edges
