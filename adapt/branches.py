"""Read one prompt with several continuations in one pass: the prompt once, each continuation as a branch after it.

    row       prompt tokens, then the tokens of branch 0, branch 1, ... without the last token of each
    mask      a branch sees the prompt and itself; positions count from the prompt's end in every branch
    head      only where a token of a branch is predicted: the prompt's end, shared by all branches, and inside them

The last token of a branch is predicted and predicts nothing, so it is never read. Rows of similar length share a pass.

Legend: B rows, T tokens of a row, D model, V vocabulary, P predicting places of all rows, Q tokens of all branches, C
branches of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HavocError
from ..model.generation import encode_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..model.prompt import PromptLike
    from ..model.tokenizer import Tokenizer
    from ..model.transformer import HavocModel


@dataclass(frozen=True, slots=True)
class Branched:
    """Token ids of one prompt and of its continuations, and the patches of the prompt's image [num_patches, C]."""

    prompt_ids: Sequence[int]
    branches: Sequence[Sequence[int]]
    patches: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what predicts nothing."""
        if not self.prompt_ids or not self.branches or not all(self.branches):
            raise HavocError("a prompt and each of its continuations need at least one token")

    @property
    def num_tokens(self) -> int:
        """Tokens that are read: all but the last of each branch."""
        return len(self.prompt_ids) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True, slots=True)
class BranchLayout:
    """A batch of `Branched` rows as tensors.

    ids, positions int64 [B, T]; mask additive [B, 1, T, T]; place_P the predicting places as indices into [B * T];
    place_of_Q, token_Q, branch_of_Q each branch token's place (an index into P), its id and its branch;
    row_of_C, length_C each branch's row and number of tokens; row_of_P each place's row.
    """

    ids_BT: Tensor  # noqa: N815 - a shape suffix
    positions_BT: Tensor  # noqa: N815 - a shape suffix
    mask_B1TT: Tensor  # noqa: N815 - a shape suffix
    patches: Tensor | None
    place_P: Tensor  # noqa: N815 - a shape suffix
    row_of_P: Tensor  # noqa: N815 - a shape suffix
    place_of_Q: Tensor  # noqa: N815 - a shape suffix
    token_Q: Tensor  # noqa: N815 - a shape suffix
    branch_of_Q: Tensor  # noqa: N815 - a shape suffix
    row_of_C: Tensor  # noqa: N815 - a shape suffix
    length_C: Tensor  # noqa: N815 - a shape suffix

    def to(self, device: torch.device) -> BranchLayout:
        """Return the same batch on `device`."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: one.to(device) for name, one in tensors.items() if one is not None})


def encode_branches(model: HavocModel, tokenizer: Tokenizer, prompt: PromptLike, branches: Sequence[str]) -> Branched:
    """Token ids of a prompt with its picture, and of each continuation after it."""
    if prompt.image_png is None:
        pairs = [tokenizer.encode_continuation(prompt.text, branch) for branch in branches]
        return Branched(pairs[0][0], [continuation_ids for _, continuation_ids in pairs])
    ids_1T, _, patches = encode_prompts(model, tokenizer, [prompt])
    return Branched(ids_1T[0].tolist(), [tokenizer.encode(branch) for branch in branches], patches)


def batches(rows: Sequence[Branched], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that share a pass: sorted by length, at most `max_tokens` tokens with their padding."""
    order = sorted(range(len(rows)), key=lambda index: (rows[index].num_tokens, index))
    batch: list[int] = []
    for index in order:
        if batch and rows[index].num_tokens * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def lay_out(rows: Sequence[Branched], *, pad_id: int, dtype: torch.dtype = torch.float32) -> BranchLayout:
    """Put rows into one batch, padded on the right; padding sees itself only and predicts nothing."""
    width = max(row.num_tokens for row in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    positions_BT = torch.zeros((len(rows), width), dtype=torch.long)
    is_visible_BTT = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    places: list[int] = []
    row_of_place: list[int] = []
    tokens: list[tuple[int, int, int]] = []
    branches: list[tuple[int, int]] = []
    for row_index, row in enumerate(rows):
        num_prompt = len(row.prompt_ids)
        ids_BT[row_index, :num_prompt] = torch.tensor(row.prompt_ids)
        positions_BT[row_index, :num_prompt] = torch.arange(num_prompt)
        is_visible_BTT[row_index, : row.num_tokens, :num_prompt] = True
        is_visible_BTT[row_index, :num_prompt, :num_prompt] = torch.ones(num_prompt, num_prompt).tril().bool()
        end_of_prompt = len(places)
        places.append(row_index * width + num_prompt - 1)
        row_of_place.append(row_index)
        start = num_prompt
        for branch in row.branches:
            num_read = len(branch) - 1
            span = slice(start, start + num_read)
            ids_BT[row_index, span] = torch.tensor(branch[:-1], dtype=torch.long)
            positions_BT[row_index, span] = num_prompt + torch.arange(num_read)
            is_visible_BTT[row_index, span, span] = torch.ones(num_read, num_read).tril().bool()
            own_places = [end_of_prompt, *range(len(places), len(places) + num_read)]
            places += [row_index * width + start + offset for offset in range(num_read)]
            row_of_place += [row_index] * num_read
            tokens += [(place, token, len(branches)) for place, token in zip(own_places, branch, strict=True)]
            branches.append((row_index, len(branch)))
            start += num_read
    mask_B1TT = torch.zeros(is_visible_BTT.shape, dtype=dtype).masked_fill_(~is_visible_BTT, float("-inf"))
    place_of_Q, token_Q, branch_of_Q = torch.tensor(tokens).unbind(1)
    row_of_C, length_C = torch.tensor(branches).unbind(1)
    patches = [row.patches for row in rows if row.patches is not None]
    return BranchLayout(
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        mask_B1TT=mask_B1TT.unsqueeze(1),
        patches=torch.cat(patches) if patches else None,
        place_P=torch.tensor(places),
        row_of_P=torch.tensor(row_of_place),
        place_of_Q=place_of_Q,
        token_Q=token_Q,
        branch_of_Q=branch_of_Q,
        row_of_C=row_of_C,
        length_C=length_C,
    )


def embedded(model: HavocModel, layout: BranchLayout) -> Tensor:
    """The input of the first layer, [B, T, D]; a row longer than the model's context is a `HavocError`."""
    longest = int(layout.positions_BT.max()) + 1
    if longest > model.config.max_seq_len:
        raise HavocError(f"{longest} tokens exceed the model's context of {model.config.max_seq_len}; use shorter rows")
    return model.embed(layout.ids_BT, layout.patches)


def through_layers(model: HavocModel, x_BTD: Tensor, layout: BranchLayout, layers: range) -> Tensor:
    """Run some of the decoder's layers: [B, T, D] to [B, T, D]."""
    rotary = model.rotary(layout.positions_BT)
    for index in layers:
        x_BTD, _ = model.layers[index](x_BTD, rotary, layout.mask_B1TT)
    return x_BTD


def at_places(model: HavocModel, x_BTD: Tensor, layout: BranchLayout) -> Tensor:
    """The input of the head at the predicting places, [P, D]."""
    normed_PD: Tensor = model.norm(x_BTD.flatten(0, 1)[layout.place_P])
    return normed_PD


def hidden_at_places(model: HavocModel, layout: BranchLayout) -> Tensor:
    """Run the whole decoder; return the input of the head at the predicting places, [P, D]."""
    x_BTD = through_layers(model, embedded(model, layout), layout, range(len(model.layers)))
    return at_places(model, x_BTD, layout)


def log_probabilities(model: HavocModel, hidden_PD: Tensor) -> Tensor:
    """Log-probabilities of the next token at each place, float32 [P, V]."""
    return torch.log_softmax(model.lm_head(hidden_PD).float(), dim=-1)


def log_likelihoods(log_p_PV: Tensor, layout: BranchLayout) -> Tensor:
    """Sum of log-probabilities of each branch's tokens given the prompt and those before, [C] in nats."""
    taken_Q = log_p_PV[layout.place_of_Q, layout.token_Q]
    return log_p_PV.new_zeros(len(layout.length_C)).index_add(0, layout.branch_of_Q, taken_Q)
