"""Names: ours inside the module, Hugging Face's everywhere else, one for one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from havoc_core.model import HavocConfig, HavocModel
from havoc_core.model.config import PRESETS
from havoc_core.model.tensors import layer_name, module_name, tensor_name, tensor_shapes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("is_full", [False, True], ids=["plain", "untied, bias, norms"])
def test_names_and_shapes_are_the_modules(preset: str, is_full: bool) -> None:
    """Every parameter of the module has its Hugging Face name and shape in the plan, and back."""
    config = HavocConfig.preset(preset)
    if is_full:
        attention = dataclasses.replace(config.attention, qkv_bias=True, qk_norm=True)
        config = config.replace(attention=attention, tie_word_embeddings=False)
    with torch.device("meta"):
        model = HavocModel(config)
    found = {tensor_name(path): tuple(parameter.shape) for path, parameter in model.named_parameters()}
    assert found == tensor_shapes(config)
    assert all(module_name(tensor_name(path)) == path for path, _ in model.named_parameters())


def test_layer_names() -> None:
    """The name of a layer's part is what the plan lists."""
    assert layer_name(1, "mlp.up_proj") == "model.layers.1.mlp.up_proj.weight"
    assert layer_name(1, "mlp.up_proj") in tensor_shapes(HavocConfig.pico())
