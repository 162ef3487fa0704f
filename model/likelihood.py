"""The input for the likelihood of texts after a prompt: token ids, with each row's continuations as one tree. No torch.

A row's continuations share their prompt, and many share their first tokens. `TokenTree` has every token that must be
read once; the next token is then predicted for all continuations through it.

A prompt and a continuation are split into tokens as in lm-evaluation-harness (`TemplateLM._encode_pair`, MIT), and a
prompt that is too long for the context loses its beginning, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .prompt import PromptLike
    from .tokenizer import Tokenizer

PROMPT_END = -1
"""The place in a tree of the last token of the prompt."""
MIN_SHARED_TOKENS = 32
"""A beginning that all prompts share is read once from this length on; a shorter one costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The likelihood of one text after its prompt.

    `log_likelihood` is the sum over its `num_tokens` tokens of ln p(token | all before it); `is_greedy` says that each
    was the likeliest. `num_dropped` tokens were left out at the beginning of the prompt, because prompt and
    continuation were longer than the context.
    """

    log_likelihood: float
    num_tokens: int
    is_greedy: bool
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class TokenTree:
    """The tokens read after a prompt: node i reads `tokens[i]` after node `parents[i]`, which may be `PROMPT_END`.

    `depths[i]` counts the nodes before it. `paths[k][j]` is the node after which token j of continuation k is
    predicted. The last token of a continuation is predicted and never read.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


def build_tree(continuations: Sequence[Sequence[int]]) -> TokenTree:
    """Join continuations, each of at least one token, at common beginnings; parents come before their children."""
    nodes: dict[tuple[int, int], int] = {}
    depths: list[int] = []
    paths = []
    for ids in continuations:
        node, path = PROMPT_END, [PROMPT_END]
        for depth, token in enumerate(ids[:-1]):
            place = nodes.setdefault((node, token), len(nodes))
            if place == len(depths):
                depths.append(depth)
            node = place
            path.append(node)
        paths.append(tuple(path))
    return TokenTree(
        tokens=tuple(token for _, token in nodes),
        parents=tuple(parent for parent, _ in nodes),
        depths=tuple(depths),
        paths=tuple(paths),
    )


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One prompt and the continuations that are scored after it, all as token ids.

    `places[k]` says where the result of `continuations[k]` goes: (request, continuation of that request).
    """

    prompt_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    tree: TokenTree
    places: tuple[tuple[int, int], ...]
    num_dropped: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are read: prompt and tree."""
        return len(self.prompt_ids) + len(self.tree.tokens)


def encode_requests(
    tokenizer: Tokenizer, requests: Sequence[tuple[PromptLike, Sequence[str]]], *, max_tokens: int
) -> list[ScoredRow]:
    """Cut requests into tokens; no row reads more than `max_tokens` along one continuation.

    A request is one row, or several if its prompt must lose more tokens before one continuation than before another. A
    picture, an empty continuation, or one that fills the whole context is a `HavocError`.
    """
    return [
        row for place, request in enumerate(requests) for row in _encode_request(tokenizer, place, *request, max_tokens)
    ]


def _encode_request(
    tokenizer: Tokenizer, place: int, prompt: PromptLike, texts: Sequence[str], max_tokens: int
) -> Iterator[ScoredRow]:
    if prompt.image_png is not None:
        raise HavocError(
            f"prompt {place + 1} has a picture: choices are scored by likelihood only after text; "
            "let the model generate its answer instead"
        )
    by_prompt: dict[tuple[int, ...], list[tuple[int, tuple[int, ...], int]]] = {}
    for which, text in enumerate(texts):
        prompt_ids, ids = _encode_pair(tokenizer, prompt.text, text)
        if not ids:
            raise HavocError(f"choice {which + 1} of prompt {place + 1} is {text!r}, which has no token to score")
        num_dropped = max(0, len(prompt_ids) + len(ids) - 1 - max_tokens)
        if num_dropped >= len(prompt_ids):
            raise HavocError(
                f"choice {which + 1} of prompt {place + 1} has {len(ids)} tokens and leaves no room for its prompt in "
                f"a context of {max_tokens}"
            )
        by_prompt.setdefault(prompt_ids[num_dropped:], []).append((which, ids, num_dropped))
    for prompt_ids, found in by_prompt.items():
        continuations = tuple(ids for _, ids, _ in found)
        places = tuple((place, which) for which, _, _ in found)
        yield ScoredRow(prompt_ids, continuations, build_tree(continuations), places, found[0][2])


def _encode_pair(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of prompt and continuation; an empty prompt is the beginning, or else the end, of a text.

    After a chat template an answer begins at once: the space that separates a choice from plain text is left out.
    """
    prompt_ids, ids = tokenizer.encode_continuation(prompt, text if tokenizer.chat is None else text.lstrip())
    if prompt_ids:
        return tuple(prompt_ids), tuple(ids)
    first = tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id
    return ((first,), tuple(ids[1:])) if ids[:1] == [first] else ((first,), tuple(ids))


def shared_prefix(rows: Sequence[ScoredRow]) -> tuple[int, ...]:
    """The common first tokens of all prompts, if reading them once is worth it; each prompt keeps one own token."""
    if len(rows) < 2:  # noqa: PLR2004 - one row shares with no other
        return ()
    first, last = min(row.prompt_ids for row in rows), max(row.prompt_ids for row in rows)
    num_shared = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), None)
    num_shared = min(len(first), len(last)) if num_shared is None else num_shared
    num_shared = min(num_shared, *(len(row.prompt_ids) - 1 for row in rows))
    return first[:num_shared] if num_shared >= MIN_SHARED_TOKENS else ()


def batches(
    rows: Sequence[ScoredRow], fits: Callable[[Sequence[ScoredRow]], bool], *, length: Callable[[ScoredRow], int]
) -> Iterator[list[ScoredRow]]:
    """Rows of like `length`, the longest first, as many together as `fits` allows and at least one."""
    batch: list[ScoredRow] = []
    for row in sorted(rows, key=length, reverse=True):
        if batch and not fits([*batch, row]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class Results:
    """Collects the results of all requests' continuations, in any order of rows."""

    def __init__(self, requests: Sequence[tuple[PromptLike, Sequence[str]]]) -> None:
        self._found: list[list[Continuation | None]] = [[None] * len(texts) for _, texts in requests]

    def put(self, row: ScoredRow, which: int, log_likelihood: float, *, is_greedy: bool) -> None:
        """Set the result of one continuation of a row."""
        request, place = row.places[which]
        num_tokens = len(row.continuations[which])
        self._found[request][place] = Continuation(log_likelihood, num_tokens, is_greedy, row.num_dropped)

    def all(self) -> list[list[Continuation]]:
        """Every result, in the order of the requests; all must have been put."""
        assert all(item is not None for found in self._found for item in found)  # noqa: S101
        return [[item for item in found if item is not None] for found in self._found]
