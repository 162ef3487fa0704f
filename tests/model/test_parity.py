"""The decoder against transformers: the same weights, both ways through the disk, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from havoc_core.model import HavocModel
from havoc_core.model.hf_config import from_hf

MAX_DIFFERENCE = 1e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "all heads share": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "no sharing": (transformers.LlamaConfig, {"num_key_value_heads": 6}),
    "head_dim apart from hidden_size": (transformers.LlamaConfig, {"head_dim": 20}),
    "other theta and eps": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123_456.0}, "rms_norm_eps": 1e-3},
    ),
    "llama3 scaling": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
}


def theirs_with_noise(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Their model with every tensor random: norms and biases too, which start as ones and zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def token_ids(num_tokens: int) -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (3, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def theirs(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    config_class, changes = request.param
    return theirs_with_noise(config_class(**(SHAPE | changes)))


@torch.no_grad()
def test_their_directory_gives_their_logits(theirs: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """A directory saved by transformers loads, and every logit agrees, far beyond the 32 tokens of llama3 too."""
    theirs.save_pretrained(tmp_path)
    ours = HavocModel.load_pretrained(tmp_path)
    ids = token_ids(200)
    theirs_BTV = theirs(ids).logits
    assert theirs_BTV.std() > 0.1
    assert (ours(ids) - theirs_BTV).abs().max() < MAX_DIFFERENCE


@torch.no_grad()
def test_our_directory_gives_our_logits(theirs: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """A directory saved by us loads in transformers as the same architecture, and every logit agrees."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = HavocModel.load_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    ids = token_ids(60)
    assert (again(ids).logits - ours(ids)).abs().max() < MAX_DIFFERENCE


@torch.no_grad()
def test_left_padding_agrees(theirs: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """Left-padded batches agree at every real token, with transformers' own idea of positions."""
    theirs.save_pretrained(tmp_path)
    ours = HavocModel.load_pretrained(tmp_path)
    ids, mask = token_ids(40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :17], mask[1, :5] = 0, 0
    ids[mask == 0] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    theirs_BTV = theirs(ids, attention_mask=mask, position_ids=positions).logits
    difference = (ours(ids, mask) - theirs_BTV).abs().amax(dim=-1)
    assert difference[mask == 1].max() < MAX_DIFFERENCE


def test_greedy_text_agrees(theirs: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """Greedy generation writes the tokens that transformers' generate writes."""
    theirs.save_pretrained(tmp_path)
    ours = HavocModel.load_pretrained(tmp_path)
    ids = token_ids(12)
    expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    assert ours.generate(ids, 24).tolist() == expected.tolist()


def test_gradients_agree() -> None:
    """The loss and its gradient in every tensor agree with transformers' own loss."""
    theirs = theirs_with_noise(transformers.LlamaConfig(**(SHAPE | {"tie_word_embeddings": True})))
    ours = HavocModel.from_tensors(from_hf(theirs.config.to_dict()), theirs.state_dict(), source="transformers")
    ids = token_ids(32)
    theirs_loss = theirs(ids, labels=ids).loss
    theirs_loss.backward()
    ours_loss, _ = ours.compute_loss(ids)
    ours_loss.backward()
    assert ours_loss.item() == pytest.approx(theirs_loss.item(), abs=1e-6)
    theirs_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, tensor in ours.named_tensors().items():
        assert torch.allclose(tensor.grad, theirs_gradients[name], atol=1e-6), name
