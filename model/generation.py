"""From prompts to text: prefill reads a prompt once, decode_one adds a token, and the loop drops rows that have ended.

Legend: B rows, G samples a prompt, T prompt tokens, N new tokens, V vocab. The cache is allocated once and written in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import HavocError
from .blocks import LayerCache
from .vision import patchify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .tokenizer import Tokenizer
    from .transformer import HavocModel

SHARE_ALIVE_BEFORE_DROPPING = 0.75


class PromptLike(Protocol):
    """What a prompt offers: its text, and the PNG bytes of its image or None."""

    @property
    def text(self) -> str: ...
    @property
    def image_png(self) -> bytes | None: ...


def new_cache(model: HavocModel, *, num_rows: int, num_tokens: int) -> list[LayerCache]:
    """Allocate keys and values of every layer for `num_rows` rows of up to `num_tokens` tokens."""
    attention, like = model.config.attention, model.norm.weight
    shape = (num_rows, attention.num_kv_heads, num_tokens, attention.head_dim)
    return [LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(model.config.num_layers)]


def prefill(
    model: HavocModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    patches: Tensor | None,
    cache: list[LayerCache],
) -> Tensor:
    """Read whole prompts into the empty cache; return the logits [B, V] of the first new token."""
    logits_B1V = model(input_ids_BT, attention_mask_BT, past_key_values=cache, patches=patches, last_only=True)
    return logits_B1V[:, 0]


def decode_one(model: HavocModel, token_ids_B: Tensor, attention_mask_BS: Tensor | None, cache: list[LayerCache]) -> Tensor:
    """Append one token a row to the cache; return the logits [B, V] of the next."""
    logits_B1V = model(token_ids_B.unsqueeze(1), attention_mask_BS, past_key_values=cache)
    return logits_B1V[:, 0]


def pick(logits_BV: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Choose a token a row: the likeliest at temperature 0, else a draw from softmax(logits / temperature) over the top k."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def sample_tokens(
    model: HavocModel,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None = None,
    patches: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | Sequence[int] | None = None,
    num_samples: int = 1,
) -> Tensor:
    """Continue left-padded prompts: token ids [B * num_samples, N], N <= max_new_tokens, each row padded after its end token.

    Samples of one prompt are neighbours and share its prefill. `eos_id` defaults to the config's. Runs in eval mode and puts
    the model's mode back.
    """
    _require_settings(model, input_ids_BT, max_new_tokens, temperature, top_k)
    was_training = model.training
    model.eval()
    try:
        return _sample(
            model, input_ids_BT, attention_mask_BT, patches, max_new_tokens, temperature, top_k, generator, eos_id, num_samples
        )
    finally:
        model.train(was_training)


def _sample(  # noqa: PLR0913 - the settings of `sample_tokens`, checked
    model: HavocModel,
    input_ids_BT: Tensor,
    mask: Tensor | None,
    patches: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    eos_id: int | Sequence[int] | None,
    num_samples: int,
) -> Tensor:
    num_prompts, num_prompt_tokens = input_ids_BT.shape
    eos_ids = model.config.eos_token_ids if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else eos_ids[0] if eos_ids else 0
    eos = torch.tensor(eos_ids, dtype=torch.long, device=input_ids_BT.device)
    new_BN = input_ids_BT.new_full((num_prompts * num_samples, max_new_tokens), pad_id)
    if max_new_tokens == 0:
        return new_BN
    if mask is not None and bool(mask.all()):
        mask = None
    cache = new_cache(model, num_rows=num_prompts, num_tokens=num_prompt_tokens + max_new_tokens - 1)
    logits_BV = prefill(model, input_ids_BT, mask, patches, cache)
    alive = torch.arange(num_prompts * num_samples, device=input_ids_BT.device)
    if num_samples > 1:
        rows = alive // num_samples
        logits_BV, mask = logits_BV[rows], None if mask is None else mask[rows]
        _keep_rows(cache, rows)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, max_new_tokens - 1), value=1)
    is_done = torch.zeros(len(alive), dtype=torch.bool, device=alive.device)
    for step in range(max_new_tokens):
        token_ids_B = pick(logits_BV, temperature=temperature, top_k=top_k, generator=generator)
        new_BN[alive, step] = torch.where(is_done, pad_id, token_ids_B)
        is_done = is_done | torch.isin(token_ids_B, eos)
        num_alive = len(alive) - int(is_done.sum())
        if num_alive == 0 or step == max_new_tokens - 1:
            return new_BN[:, : step + 1]
        if num_alive < SHARE_ALIVE_BEFORE_DROPPING * len(alive):
            kept = (~is_done).nonzero()[:, 0]
            alive, token_ids_B, is_done = alive[kept], token_ids_B[kept], is_done[kept]
            mask = None if mask is None else mask[kept]
            _keep_rows(cache, kept)
        visible = None if mask is None else mask[:, : num_prompt_tokens + step + 1]
        logits_BV = decode_one(model, token_ids_B, visible, cache)
    return new_BN


def _keep_rows(cache: list[LayerCache], rows: Tensor) -> None:
    for layer in cache:
        layer.keep_rows(rows)


def _require_settings(model: HavocModel, input_ids_BT: Tensor, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    num_tokens = input_ids_BT.shape[1] + max_new_tokens
    if input_ids_BT.shape[1] == 0:
        msg = "the prompt is empty; give at least one token"
        raise HavocError(msg)
    if max_new_tokens < 0 or num_tokens - 1 > model.config.max_seq_len:
        msg = (
            f"{input_ids_BT.shape[1]} prompt tokens and max_new_tokens {max_new_tokens} must fit the model's context "
            f"of {model.config.max_seq_len}"
        )
        raise HavocError(msg)
    if not 0 <= temperature < float("inf"):
        msg = f"temperature must be 0 (greedy) or a positive number, not {temperature}"
        raise HavocError(msg)
    if top_k is not None and top_k < 1:
        msg = f"top_k must be at least 1, not {top_k}"
        raise HavocError(msg)


def left_padded(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Stack token rows of different lengths, padded on the left: ids [B, T] and attention mask [B, T], both int64."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return ids, mask


def encode_prompts(model: HavocModel, tokenizer: Tokenizer, prompts: Sequence[PromptLike]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokenise and pad prompts: ids [B, T], mask [B, T], and the patches of all images [num_patches, C] or None."""
    device = model.norm.weight.device
    images = [None if prompt.image_png is None else _patches(model, prompt.image_png) for prompt in prompts]
    rows = [
        tokenizer.encode_prompt(prompt.text, 0 if image is None else len(image))
        for prompt, image in zip(prompts, images, strict=True)
    ]
    ids, mask = left_padded(rows, pad_id=tokenizer.pad_id, device=device)
    present = [image for image in images if image is not None]
    return ids, mask, torch.cat(present).to(device) if present else None


def _patches(model: HavocModel, image_png: bytes) -> Tensor:
    if model.config.vision is None:
        msg = "the prompt has an image, but this model reads text only"
        raise HavocError(msg)
    return torch.from_numpy(patchify(image_png, model.config.vision))


def generate_text(
    model: HavocModel,
    tokenizer: Tokenizer,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[str]:
    """Complete every prompt: the new text only, in the order given.

    Greedy at temperature 0; otherwise sampled, the same for the same seed and batch size. Batches hold prompts of like length.
    """
    generator = torch.Generator(device=model.norm.weight.device).manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index].image_png is None, len(prompts[index].text)))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        ids, mask, patches = encode_prompts(model, tokenizer, [prompts[index] for index in indices])
        new_BN = sample_tokens(
            model,
            ids,
            mask,
            patches,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            eos_id=tokenizer.eos_id,
        )
        for index, text in zip(indices, tokenizer.decode_batch(new_BN.tolist()), strict=True):
            texts[index] = text
    return texts
