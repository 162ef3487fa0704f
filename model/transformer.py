"""HAVOC: a decoder-only transformer for text and images: grouped-query attention, SwiGLU, RMSNorm, rotary positions.

Legend: B batch, T new tokens, P past tokens, S = P + T, D model, V vocab, K kv heads, H head dim, C values of a patch.

    logits = model(input_ids)                               [B, T, V]
    logits, past = model(input_ids, use_cache=True)         past: one (key, value) pair [B, K, S, H] a layer
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import HavocError
from .blocks import KeyValue, LayerCache, RMSNorm, RotaryEmbedding, TransformerBlock
from .config_file import read_config
from .generation import sample_tokens
from .linear import Embedding, Linear
from .pretrained import read_tensors, state_of, write_tensors
from .tensors import tensor_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .config import HavocConfig

IGNORED_LABEL = -100


class HavocModel(nn.Module):
    """The decoder, randomly initialised; on the meta device it takes no memory."""

    def __init__(self, config: HavocConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.vision_projection = Linear(config.vision.patch_dim, config.d_model, bias=False) if config.vision else None
        self.rotary = RotaryEmbedding(config.attention, config.max_seq_len)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if not self.embed_tokens.weight.is_meta:
            self._initialize_weights()

    @classmethod
    def from_config(cls, config: HavocConfig) -> HavocModel:
        """Same as `HavocModel(config)`."""
        return cls(config)

    @torch.no_grad()
    def _initialize_weights(self) -> None:
        """GPT-NeoX style: matrices normal(0, initializer_range), biases zero, the padding token's embedding zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(mean=0.0, std=self.config.initializer_range)
            elif name.endswith(".bias"):
                parameter.zero_()
        if self.config.pad_token_id is not None:
            self.embed_tokens.weight[self.config.pad_token_id].zero_()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[KeyValue | LayerCache] | None = None,
        use_cache: bool = False,
        patches: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, list[KeyValue]]:
        """Predict the next token at every position, or with `last_only` at the last.

        input_ids [B, T] int64; attention_mask [B, S] is 1 for real tokens, 0 for padding (on the left), past
        included, and positions count real tokens; patches [num_patches, C] float replace, in order, the embeddings of
        the image tokens. Returns logits [B, T, V] ([B, 1, V]), and with `use_cache` also the keys and values of all S
        tokens.
        """
        num_past = _past_length(past_key_values)
        positions, mask = self._positions_and_mask(input_ids, attention_mask, num_past)
        x_BTD, presents = self.hidden_states(
            input_ids, positions, mask, past_key_values=past_key_values, patches=patches, last_only=last_only
        )
        logits_BTV: Tensor = self.lm_head(x_BTD)
        return (logits_BTV, presents) if use_cache else logits_BTV

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        *,
        past_key_values: Sequence[KeyValue | LayerCache] | None = None,
        patches: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the input of the head, [B, T, D] ([B, 1, D]), and the keys and values of each layer.

        For callers that place tokens themselves: `positions` [T] or [B, T], `mask` additive [B or 1, 1, T, S], None
        for plain causal attention; the other arguments as in `forward`.
        """
        rotary = self.rotary(positions)
        x_BTD = self.embed(input_ids, patches)
        presents: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x_BTD, present = layer(x_BTD, rotary, mask, None if past_key_values is None else past_key_values[index])
            presents.append(present)
        normed_BTD: Tensor = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        return normed_BTD, presents

    def _positions_and_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None, num_past: int
    ) -> tuple[Tensor, Tensor | None]:
        """Positions [T] or [B, T], and the additive mask where plain causal attention is not enough."""
        num_new, num_tokens = input_ids.shape[1], num_past + input_ids.shape[1]
        if num_tokens > self.config.max_seq_len:
            raise HavocError(
                f"{num_tokens} tokens exceed the model's context of {self.config.max_seq_len}; shorten the prompt"
            )
        if attention_mask is None:
            positions = torch.arange(num_past, num_tokens, device=input_ids.device)
            is_plain = num_past == 0 or num_new == 1
            return positions, None if is_plain else self.build_attention_mask(input_ids, num_past=num_past)
        if attention_mask.shape != (input_ids.shape[0], num_tokens):
            raise HavocError(
                f"attention_mask is {list(attention_mask.shape)}, not {[len(input_ids), num_tokens]}: past and new"
            )
        positions_BT = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]
        return positions_BT, self.build_attention_mask(input_ids, attention_mask, num_past=num_past)

    def build_attention_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, num_past: int = 0
    ) -> Tensor:
        """Additive causal and padding mask, 0 or -inf, [B or 1, 1, T, S] in the model's dtype.

        A token always sees itself, padding too, so that no row of the softmax is empty.
        """
        num_new, device = input_ids.shape[1], input_ids.device
        query_T1 = torch.arange(num_past, num_past + num_new, device=device).unsqueeze(1)
        key_S = torch.arange(num_past + num_new, device=device)
        is_visible = (key_S <= query_T1)[None]
        if attention_mask is not None:
            is_visible = (is_visible & attention_mask.bool().unsqueeze(1)) | (key_S == query_T1)
        zeros = torch.zeros(is_visible.shape, dtype=self.norm.weight.dtype, device=device)
        return zeros.masked_fill_(~is_visible, float("-inf")).unsqueeze(1)

    def embed(self, input_ids: Tensor, patches: Tensor | None) -> Tensor:
        """Token embeddings [B, T, D], with patches through one linear projection at the places of image tokens."""
        x_BTD: Tensor = self.embed_tokens(input_ids)
        vision, is_decode_step = self.config.vision, input_ids.shape[1] == 1
        if patches is None and (vision is None or is_decode_step):
            return x_BTD
        if vision is None or self.vision_projection is None:
            raise HavocError("this model has no vision part: patches cannot be read")
        if patches is None:
            patches = x_BTD.new_empty(0, vision.patch_dim)
        is_image_BT = input_ids == vision.image_token_id
        num_image_tokens = int(is_image_BT.sum())
        if patches.shape != (len(patches), vision.patch_dim):
            raise HavocError(f"patches are {list(patches.shape)}, the model reads [num_patches, {vision.patch_dim}]")
        if len(patches) != num_image_tokens:
            raise HavocError(f"{len(patches)} patches for {num_image_tokens} image tokens; each takes one")
        if num_image_tokens == 0:
            return x_BTD
        return x_BTD.masked_scatter(is_image_BT.unsqueeze(-1), self.vision_projection(patches.to(x_BTD.dtype)))

    def compute_loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of each token given those before it, and the logits [B, T, V].

        `labels` [B, T] default to `input_ids` and are shifted here; the padding token, -100 and masked tokens do not
        count. A batch in which nothing counts has loss 0.
        """
        logits_BTV = self(input_ids, attention_mask, patches=patches)
        targets_BT = self._targets(input_ids if labels is None else labels, attention_mask)
        total = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return total / (targets_BT != IGNORED_LABEL).sum().clamp(min=1), logits_BTV

    def _targets(self, labels_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The label after each position, -100 if none counts; shifting these is cheaper than shifting logits."""
        if self.config.pad_token_id is not None:
            labels_BT = labels_BT.masked_fill(labels_BT == self.config.pad_token_id, IGNORED_LABEL)
        targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        if attention_mask is None:
            return targets_BT
        is_real_BT = attention_mask.bool()
        return targets_BT.masked_fill(~(is_real_BT & is_real_BT.roll(-1, dims=1)), IGNORED_LABEL)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        attention_mask: Tensor | None = None,
        patches: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts [B, T] by up to `max_new_tokens`: [B, T + N], rows padded after their end.

        Temperature 0 is greedy. Ends early when every row has ended (`eos_token_id`, default the config's).
        """
        new_BN = sample_tokens(
            self,
            input_ids,
            attention_mask,
            patches,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_id=eos_token_id,
            generator=generator,
        )
        return torch.cat((input_ids, new_BN), dim=1)

    def named_tensors(self) -> dict[str, Tensor]:
        """The live parameters by Hugging Face name, a tied table once."""
        return {tensor_name(path): parameter for path, parameter in self.named_parameters()}

    def save_pretrained(
        self, directory: str | Path, use_safetensors: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors` (or `model.pt`) with Hugging Face's tensor names.

        The weights are stored in `dtype`, by default their own.
        """
        tensors = self.named_tensors()
        write_tensors(Path(directory), self.config, tensors, use_safetensors=use_safetensors, dtype=dtype)

    @classmethod
    def load_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu") -> HavocModel:
        """Read a Hugging Face directory as fp32, in eval mode; a missing, extra or ill-shaped tensor is refused."""
        config = read_config(directory)
        return cls.from_tensors(config, read_tensors(Path(directory), config), source=directory).to(device)

    @classmethod
    def from_tensors(cls, config: HavocConfig, tensors: Mapping[str, Tensor], *, source: object) -> HavocModel:
        """Build the model in fp32 and eval mode from tensors by Hugging Face name; errors name `source`."""
        state = state_of(config, tensors, source=source)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, strict=True, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.requires_grad_(requires_grad=True).eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.norm.weight.device

    def num_parameters(self) -> int:
        """Parameters, a tied table counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


SigmaModel = HavocModel


def _past_length(past: Sequence[KeyValue | LayerCache] | None) -> int:
    if past is None:
        return 0
    return past[0].length if isinstance(past[0], LayerCache) else past[0][0].shape[2]
