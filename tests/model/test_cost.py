"""The arithmetic of cost against counting: the module's parameters, torch's operations, the exporter's bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from havoc_core.export.layout import plan_layout
from havoc_core.model import HavocConfig, HavocModel, cost
from havoc_core.model.config import PRESETS
from havoc_core.model.structure import Structure

PICO = HavocConfig.pico()
UNTIED = PICO.replace(tie_word_embeddings=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_the_modules(preset: str) -> None:
    """The count is the module's."""
    config = HavocConfig.preset(preset)
    with torch.device("meta"):
        model = HavocModel(config)
    assert cost.num_parameters(config) == model.num_parameters()


def test_published_sizes() -> None:
    """HAVOC-7B has 5,957,685,248 parameters; SmolLM2's shapes 134.5 and 361.8 million."""
    assert cost.num_parameters(HavocConfig.havoc_7b()) == 5_957_685_248
    assert cost.num_parameters(HavocConfig.edge_135m()) == 134_515_008
    assert cost.num_parameters(HavocConfig.edge_360m()) == 361_821_120
    assert cost.num_parameters(HavocConfig.nano()) < 6_000_000


@pytest.mark.parametrize("num_tokens", [1, 17])
@pytest.mark.parametrize("num_past", [0, 9])
def test_operations_are_torchs_count(num_tokens: int, num_past: int) -> None:
    """But for the causal half, which torch's counter does not know, the formula is torch's count exactly."""
    with torch.device("meta"):
        model = HavocModel(PICO.replace(attention=dataclasses.replace(PICO.attention, num_kv_heads=4)))
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        past = [(torch.empty(1, 4, num_past, 8), torch.empty(1, 4, num_past, 8))] * 2 if num_past else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.rotary.to("meta")
        model(ids, past_key_values=past, last_only=True)
    num_unseen_pairs = num_tokens * (num_tokens - 1) // 2
    unseen = 4 * PICO.num_layers * 4 * 8 * num_unseen_pairs
    assert cost.prefill_flops(model.config, num_tokens, num_past=num_past) + unseen == counter.get_total_flops()


def test_decoding_is_a_prefill_of_one() -> None:
    """One token after P costs as many operations as the last of P + 1, whose logits alone are wanted."""
    head = 2 * PICO.d_model * PICO.vocab_size
    whole, before = cost.prefill_flops(PICO, 21), cost.prefill_flops(PICO, 20)
    assert cost.decode_flops(PICO, 20) == whole - before + head
    assert cost.prefill_flops(PICO, 20, has_all_logits=True) == before + 19 * head


@pytest.mark.parametrize("preset", ["nano", "edge-135m", "7b"])
@pytest.mark.parametrize(
    "structure",
    [
        Structure("fp32", "fp32"),
        Structure("fp16", "fp32"),
        Structure("fp16", "fp16"),
        Structure("int8", "fp32"),
        Structure("int8", "fp16"),
        Structure("int4", "fp32"),
        Structure("int4", "fp16", block_size=64),
        Structure("int4", "fp32", 256, False, "hqq"),
        Structure("int8", "fp16", 16, False, "k_quant"),
        Structure("fp16", "fp32", rank_fraction=0.3),
        Structure("int4", "fp32", 32, False, "rtn", 0.25),
        Structure("int8", compute="w8a8"),
    ],
    ids=str,
)
def test_bytes_are_the_exporters(preset: str, structure: Structure) -> None:
    """Weight bytes are what an artifact's data file holds, less the rotary tables and the padding between tensors."""
    config = HavocConfig.preset(preset)
    stored = sum(
        initializer.num_bytes
        for initializer in plan_layout(config, structure).initializers()
        if not initializer.name.startswith("rope.")
    )
    assert cost.weight_bytes(config, structure) == stored


def test_block_scales_by_hand() -> None:
    """int4 in blocks of 32 with fp32 scales is 5 bits a weight, with fp16 scales 4.5; int8 is 9 and 8.5."""
    shape, num_weights = (10, 64), 640
    for structure, bits in (
        (Structure("int4", "fp32"), 5.0),
        (Structure("int4", "fp16"), 4.5),
        (Structure("int8", "fp32"), 9.0),
        (Structure("int8", "fp16"), 8.5),
        (Structure("int4", "fp16", block_size=64), 4.25),
        (Structure("fp16", "fp32"), 16.0),
        (Structure("int4", "fp32", is_symmetric=False), 5.125),
        (Structure("int8", "fp32", is_symmetric=False), 9.25),
        (Structure("int8", compute="w8a8"), 8.5),
    ):
        assert cost.tensor_bytes("model.layers.0.mlp.up_proj.weight", shape, structure) == num_weights * bits / 8
    assert cost.tensor_bytes("x", (3, 33), Structure("int4", "fp32")) == 3 * 2 * 20
    assert cost.tensor_bytes("x", (33,), Structure("int4", "fp16")) == 66


def test_factors_cost_what_their_products_do() -> None:
    """A projection of rank r costs 2 r (M + N) operations a token and as many weights; the head stays whole."""
    quarter = Structure(rank_fraction=0.25)
    up, shape, rank = "model.layers.0.mlp.up_proj.weight", (128, 64), 16
    assert cost.tensor_bytes(up, shape, quarter) == 4 * rank * (128 + 64)
    saved = cost.num_layer_matmul_parameters(PICO) - cost.num_layer_matmul_parameters(PICO, quarter)
    assert saved > 0
    assert cost.prefill_flops(PICO, 10) - cost.prefill_flops(PICO, 10, quarter) == 2 * 10 * saved
    assert cost.decode_flops(PICO, 10) - cost.decode_flops(PICO, 10, quarter) == 2 * saved
    assert cost.weight_bytes(PICO) - cost.weight_bytes(PICO, quarter) == 4 * saved


def test_cache_bytes_are_the_caches() -> None:
    """The formula is the size of the keys and values a real forward returns."""
    _, past = HavocModel(PICO)(torch.randint(4, 64, (1, 10)), use_cache=True)
    num_bytes = sum(tensor.nbytes for pair in past for tensor in pair)
    assert 10 * cost.kv_bytes_per_token(PICO) == num_bytes
    assert 2 * cost.kv_bytes_per_token(PICO, Structure("fp16", "fp16")) == cost.kv_bytes_per_token(PICO)
    assert cost.kv_bytes_per_token(HavocConfig.havoc_7b(), Structure("fp16", "fp16")) == 131_072


def test_decoding_reads_every_weight_once() -> None:
    """Tied: all weights and the cache. Untied: of the embedding one row only. Vision: not its projection."""
    cache = 20 * cost.kv_bytes_per_token(PICO)
    assert cost.decode_read_bytes(PICO, 20) == cost.weight_bytes(PICO) + cache
    table, row = 4 * 64 * 32, 4 * 32
    assert cost.decode_read_bytes(UNTIED, 20) == cost.weight_bytes(UNTIED) - table + row + cache
    nano = HavocConfig.nano()
    assert cost.decode_read_bytes(nano, 0) == cost.weight_bytes(nano) - 4 * 128 * 192


def test_vision_is_counted() -> None:
    """A patch costs 2 C D operations; a text model has none."""
    assert cost.vision_flops(HavocConfig.nano(), 4) == 2 * 4 * 192 * 128
    assert cost.vision_flops(PICO, 4) == 0


def test_estimates_grow_with_the_work() -> None:
    """Activations and peak grow with tokens, unfused scores quadratically; the peak covers weights and cache."""
    config = HavocConfig.edge_135m()
    assert cost.activation_bytes(config, 512) < cost.activation_bytes(config, 1024)
    unfused = [cost.activation_bytes(config, tokens, is_fused=False) for tokens in (512, 1024)]
    assert unfused[1] > 2 * unfused[0]
    floor = cost.weight_bytes(config) + 640 * cost.kv_bytes_per_token(config)
    assert cost.peak_bytes(config, 512, num_new_tokens=128) == floor + cost.activation_bytes(config, 512)
