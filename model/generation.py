"""From prompts to text: `prefill` reads the prompts, `decode_one` adds one to each, ended rows are dropped.

Legend: B rows, T prompt tokens, S tokens so far, N new tokens, V vocab, C values of a patch. Keys and values are
allocated once and written in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import HavocError
from .blocks import LayerCache
from .stopping import StopStrings
from .vision import patchify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .blocks import RMSNorm
    from .config import HavocConfig
    from .prompt import PromptLike
    from .tokenizer import Tokenizer

SHARE_ALIVE_BEFORE_DROPPING = 0.75
"""Ended rows are dropped when fewer than this share still runs: each drop copies the cache."""
CACHE_BYTES = 1 << 30
"""The keys and values of all rows that are written at once take no more."""


class GenerativeModel(Protocol):
    """What generation asks of a model; `HavocModel` is one."""

    config: HavocConfig
    norm: RMSNorm
    training: bool

    def __call__(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as torch's modules are called
        """Return the logits."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or back."""

    def eval(self) -> Self:
        """Switch to evaluation."""


def prefill(
    model: GenerativeModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    patches: Tensor | None,
    cache: list[LayerCache],
) -> Tensor:
    """Read whole prompts into the empty cache; return the logits [B, V] of the first new token."""
    logits_B1V: Tensor = model(input_ids_BT, attention_mask_BT, past_key_values=cache, patches=patches, last_only=True)
    return logits_B1V[:, 0]


def decode_one(
    model: GenerativeModel, token_ids_B: Tensor, attention_mask_BS: Tensor | None, cache: list[LayerCache]
) -> Tensor:
    """Append one token a row to the cache; return the logits [B, V] of the next."""
    logits_B1V: Tensor = model(token_ids_B.unsqueeze(1), attention_mask_BS, past_key_values=cache)
    return logits_B1V[:, 0]


def pick(
    logits_BV: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    banned_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token per row: the likeliest at temperature 0, else from softmax(logits / temperature) of the top k.

    `banned_id` is never chosen: an image token represents an input patch, so the model may not write one.
    """
    if banned_id is not None:
        logits_BV = logits_BV.index_fill(-1, torch.tensor([banned_id], device=logits_BV.device), float("-inf"))
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


class _Rows:
    """The rows still being written: where each goes in the result, its cache, its mask, whether it has just ended."""

    def __init__(self, model: GenerativeModel, mask_BT: Tensor | None, *, num_rows: int, num_tokens: int) -> None:
        attention, like = model.config.attention, model.norm.weight
        shape = (num_rows, attention.num_kv_heads, num_tokens, attention.head_dim)
        self.cache = [LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(model.config.num_layers)]
        self.mask_BS: Tensor | None = None
        if mask_BT is not None and not bool(mask_BT.all()):
            self.mask_BS = F.pad(mask_BT, (0, num_tokens - mask_BT.shape[1]), value=1)
        self.index_B = torch.arange(num_rows, device=like.device)
        self.has_ended_B = torch.zeros(num_rows, dtype=torch.bool, device=like.device)

    def visible(self, num_tokens: int) -> Tensor | None:
        """The mask over the first tokens; None if no row is padded."""
        return None if self.mask_BS is None else self.mask_BS[:, :num_tokens]

    def select(self, rows: Tensor) -> None:
        """Keep, drop or repeat: row i becomes the old row `rows[i]`."""
        self.index_B, self.has_ended_B = self.index_B[rows], self.has_ended_B[rows]
        self.mask_BS = None if self.mask_BS is None else self.mask_BS[rows]
        for layer in self.cache:
            layer.select(rows)


@torch.inference_mode()
def _continue(
    model: GenerativeModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    patches: Tensor | None,
    *,
    new_BN: Tensor,
    eos_ids: Tensor,
    stops: StopStrings | None,
    num_samples: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> int:
    """Fill `new_BN`, which holds padding, row by row until every row has ended; return how many columns were used."""
    (num_prompts, num_prompt_tokens), (num_rows, max_new_tokens) = input_ids_BT.shape, new_BN.shape
    num_tokens = num_prompt_tokens + max_new_tokens
    rows = _Rows(model, attention_mask_BT, num_rows=num_prompts, num_tokens=num_tokens)
    logits_BV = prefill(model, input_ids_BT, rows.visible(num_prompt_tokens), patches, rows.cache)
    if num_samples > 1:
        prompt_of_row = torch.arange(num_rows, device=new_BN.device) // num_samples
        logits_BV = logits_BV[prompt_of_row]
        rows.select(prompt_of_row)
        rows.index_B = torch.arange(num_rows, device=new_BN.device)
    image_id = None if model.config.vision is None else model.config.vision.image_token_id
    for step in range(max_new_tokens):
        token_ids_B = pick(logits_BV, temperature=temperature, top_k=top_k, banned_id=image_id, generator=generator)
        new_BN[rows.index_B, step] = torch.where(rows.has_ended_B, new_BN[rows.index_B, step], token_ids_B)
        rows.has_ended_B |= torch.isin(token_ids_B, eos_ids)
        if stops:
            written = new_BN[rows.index_B, : step + 1].tolist()
            rows.has_ended_B |= torch.tensor(stops.are_reached(written), device=new_BN.device)
        num_alive = len(token_ids_B) - int(rows.has_ended_B.sum())
        if num_alive == 0 or step + 1 == max_new_tokens:
            break
        if num_alive < SHARE_ALIVE_BEFORE_DROPPING * len(token_ids_B):
            alive = (~rows.has_ended_B).nonzero()[:, 0]
            token_ids_B = token_ids_B[alive]
            rows.select(alive)
        logits_BV = decode_one(model, token_ids_B, rows.visible(num_prompt_tokens + step + 1), rows.cache)
    return step + 1


def sample_tokens(
    model: GenerativeModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    patches: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | Sequence[int] | None = None,
    stops: StopStrings | None = None,
    num_samples: int = 1,
) -> Tensor:
    """Continue left-padded prompts: int64 [B * num_samples, N], N <= max_new_tokens, rows padded after their end token.

    `attention_mask_BT` is 1 for real tokens; `patches` [num_patches, C] fill the image tokens in order. Samples of
    one prompt are neighbours and share its prefill. `eos_id` defaults to the config's; a row also ends when its text
    contains one of `stops`. The model runs in eval mode; afterwards its own mode is restored. A prompt without room for
    `max_new_tokens` is a `HavocError`.
    """
    _require_room(model, input_ids_BT, max_new_tokens)
    _require_sampling(temperature, top_k, num_samples)
    eos_ids = model.config.eos_token_ids if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    eos_ids = (*eos_ids, *(stops.token_ids if stops else ()))
    new_BN = input_ids_BT.new_full((len(input_ids_BT) * num_samples, max_new_tokens), _pad_id(model, eos_ids))
    was_training = model.training
    model.eval()
    try:
        num_columns = _continue(
            model,
            input_ids_BT,
            attention_mask_BT,
            patches,
            new_BN=new_BN,
            eos_ids=torch.tensor(eos_ids, dtype=torch.long, device=new_BN.device),
            stops=stops,
            num_samples=num_samples,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
        )
    finally:
        model.train(was_training)
    return new_BN[:, :num_columns]


def _pad_id(model: GenerativeModel, eos_ids: Sequence[int]) -> int:
    if model.config.pad_token_id is not None:
        return model.config.pad_token_id
    return eos_ids[0] if eos_ids else 0


def _require_room(model: GenerativeModel, input_ids_BT: Tensor, max_new_tokens: int) -> None:
    num_rows, num_prompt_tokens = input_ids_BT.shape
    if num_rows == 0 or num_prompt_tokens == 0:
        raise HavocError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise HavocError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if num_prompt_tokens + max_new_tokens > model.config.max_seq_len:
        raise HavocError(
            f"{num_prompt_tokens} prompt tokens and max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{model.config.max_seq_len}; shorten one of them"
        )


def _require_sampling(temperature: float, top_k: int | None, num_samples: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise HavocError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        raise HavocError(f"top_k must be at least 1, not {top_k}")
    if num_samples < 1:
        raise HavocError(f"num_samples must be at least 1, not {num_samples}")


def left_padded(
    rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Stack token rows of different lengths, padded on the left: ids [B, T] and attention mask [B, T], both int64."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return ids_BT, mask_BT


def encode_prompts(
    model: GenerativeModel, tokenizer: Tokenizer, prompts: Sequence[PromptLike]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokenise and left-pad prompts: ids [B, T], mask [B, T], the patches of all images [num_patches, C] or None."""
    device = model.norm.weight.device
    images = [None if prompt.image_png is None else _patches(model, prompt.image_png) for prompt in prompts]
    rows = [
        tokenizer.encode_prompt(prompt.text, 0 if image is None else len(image))
        for prompt, image in zip(prompts, images, strict=True)
    ]
    ids_BT, mask_BT = left_padded(rows, pad_id=tokenizer.pad_id, device=device)
    present = [image for image in images if image is not None]
    return ids_BT, mask_BT, torch.cat(present).to(device) if present else None


def completions(tokenizer: Tokenizer, ids_BT: Tensor, mask_BT: Tensor, new_BN: Tensor) -> list[str]:
    """Text of each row of new ids as it continues its left-padded prompt."""
    rows = zip(ids_BT.tolist(), mask_BT.sum(dim=1).tolist(), new_BN.tolist(), strict=True)
    return [tokenizer.decode_completion(ids[len(ids) - num_real :], new) for ids, num_real, new in rows]


def _patches(model: GenerativeModel, image_png: bytes) -> Tensor:
    if model.config.vision is None:
        raise HavocError("the prompt has an image, but this model reads text only")
    return torch.from_numpy(patchify(image_png, model.config.vision))


def _rows_that_fit(model: GenerativeModel, num_tokens: int) -> int:
    """The number of rows of this length with keys and values of at most `CACHE_BYTES`; at least one."""
    attention = model.config.attention
    per_token = 2 * model.config.num_layers * attention.num_kv_heads * attention.head_dim
    return max(1, CACHE_BYTES // (num_tokens * per_token * model.norm.weight.element_size()))


def generate_text(
    model: GenerativeModel,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    stop: Sequence[str] = (),
) -> list[str]:
    """Complete every prompt: the new text only, up to the first of the `stop` strings, in the order given.

    Greedy at temperature 0; otherwise sampled, the same for the same seed and batch size. Prompts of like length
    share a batch, of at most `batch_size` rows whose keys and values fit into `CACHE_BYTES`.
    """
    stops = StopStrings(tokenizer, stop)
    generator = torch.Generator(device=model.norm.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index].image_png is None, len(prompts[index].text)))
    texts = [""] * len(prompts)
    while order:
        indices = order[:batch_size]
        ids_BT, mask_BT, patches = encode_prompts(model, tokenizer, [prompts[index] for index in indices])
        num_rows = _rows_that_fit(model, ids_BT.shape[1] + max_new_tokens)
        if num_rows < len(indices):
            indices = order[:num_rows]
            ids_BT, mask_BT, patches = encode_prompts(model, tokenizer, [prompts[index] for index in indices])
        order = order[len(indices) :]
        new_BN = sample_tokens(
            model,
            ids_BT,
            mask_BT,
            patches,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            eos_id=sorted({*tokenizer.eos_ids, *model.config.eos_token_ids}),
            stops=stops,
        )
        for index, text in zip(indices, completions(tokenizer, ids_BT, mask_BT, new_BN), strict=True):
            texts[index] = stops.cut(text)
    return texts
