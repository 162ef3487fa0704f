"""The decoder from import to reload in one go; also a script: `python tests/test_smoke.py`."""

from __future__ import annotations

import tempfile

import torch

from havoc_core.config import HavocConfig
from havoc_core.model import HavocModel


def test_smoke() -> None:
    """Imports, initialisation, forward, cache, loss, generation, gradients, save and load work together."""
    torch.manual_seed(0)
    config = HavocConfig.pico()
    model = HavocModel(config)
    input_ids = torch.randint(3, config.vocab_size, (2, 12))

    logits = model(input_ids)
    assert logits.shape == (2, 12, config.vocab_size)

    logits, past_kv = model(input_ids, use_cache=True)
    next_logits, past_kv = model(input_ids[:, -1:], past_key_values=past_kv, use_cache=True)
    assert next_logits.shape == (2, 1, config.vocab_size)
    assert past_kv[0][0].shape[2] == 13

    loss, logits = model.compute_loss(input_ids)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())

    model.eval()
    generated = model.generate(input_ids, max_new_tokens=5, temperature=0.7)
    assert generated.shape[0] == 2
    assert 12 < generated.shape[1] <= 17

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, use_safetensors=True)
        loaded = HavocModel.load_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids), model(input_ids))


if __name__ == "__main__":
    test_smoke()
    print("smoke test passed")
