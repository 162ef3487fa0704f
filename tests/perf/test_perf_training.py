"""A training step, and the rollouts of one, beside what people use today: each a ratio of ways in one run.

The model is edge-135m with four layers and 1,024 tokens of vocabulary, so that the projections, not the head, are what
is timed. Times are CPU time on one thread, the best of alternating runs. Memory is anonymous memory at its peak in a
process of each way's own, above what that process held with the model alone; copies of weights and factors that a way
keeps are in it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from threadpoolctl import threadpool_limits

from havoc_core.export.huggingface import export_huggingface
from havoc_core.model.config import HavocConfig
from havoc_core.model.generation import sample_tokens
from havoc_core.model.transformer import HavocModel
from tests.perf.turns import best_times_s

WAYS = """
import time
import torch
from torch import nn
from torch.nn import functional as F
from havoc_core.adapt.basis import compute_basis
from havoc_core.adapt.lora import attach_lora
from havoc_core.adapt.svf import attach
from havoc_core.model.config import HavocConfig
from havoc_core.model.tensors import module_name
from havoc_core.model.transformer import HavocModel

NUM_ROWS = 16

class Recomposed(nn.Module):
    "W' = U diag(s z) V^T anew in every forward pass, its gradient by autograd."
    def __init__(self, weight):
        super().__init__()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        self.us, self.vt = u * s, vt
        self.z = nn.Parameter(torch.ones(len(s)))
    def forward(self, x):
        return F.linear(x, (self.us * self.z) @ self.vt)

def small():
    torch.manual_seed(0)
    return HavocModel(HavocConfig.preset("edge-135m").replace(num_layers=4, vocab_size=1024, tie_word_embeddings=True))

def adapted(way, model):
    "The parameters that a way trains on `model`, and what it does after a step."
    tensors = {name: value.data for name, value in model.named_tensors().items()}
    basis = compute_basis(tensors)
    model.requires_grad_(False)
    if way == "ours":
        adapter = attach(model, basis)
        return adapter.parameters(), adapter.refold
    if way == "lora":
        adapter = attach_lora(model, list(basis.matrices), rank=16, seed=0)
        return adapter.parameters(), adapter.refold
    layers = {name: Recomposed(tensors[name]) for name in basis.matrices}
    for name, layer in layers.items():
        model.set_submodule(module_name(name).removesuffix(".weight"), layer)
    return [layer.z for layer in layers.values()], lambda: None

def stepper(way, model, num_tokens):
    "A training step of `way`: forward, backward, AdamW."
    parameters, after = adapted(way, model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.randint(0, 1024, (NUM_ROWS, num_tokens // NUM_ROWS), generator=torch.Generator().manual_seed(1))
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        after()
        return loss.item()
    return step
"""
MEMORY = (
    WAYS
    + """
import ctypes, json, sys
way, num_tokens = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = small()
def anon():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
if way == "lora":
    import peft
held = anon()
step = stepper(way, model, num_tokens)
anon()
began = time.monotonic()
losses = [step() for _ in range(3)]
print(json.dumps({"held": held, "began": began, "losses": losses}))
"""
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def ways_of_training() -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(WAYS, found)
    return found


@pytest.mark.parametrize("num_tokens", [1024, 256])
def test_step_against_recomposing(benchmark: BenchmarkFixture, row, run_child, one_thread, num_tokens: int) -> None:
    """A step of z: folded weights and the delta gradient against U diag(s z) V^T in every forward pass by autograd."""
    ways = ways_of_training()
    ours, theirs = (ways["stepper"](way, ways["small"](), num_tokens) for way in ("ours", "recomposed"))
    assert ours() == pytest.approx(theirs(), rel=1e-4)  # both begin at the base
    assert ours() == pytest.approx(theirs(), rel=1e-3)  # and both gradients lead to one next loss
    ours_s, theirs_s = best_times_s(ours, theirs, num_rounds=3, clock=time.process_time)
    benchmark.pedantic(ours, rounds=1)
    name = f"z training step against U diag(s z) V^T by autograd, {num_tokens:,} tokens"
    row(f"{name}, one thread", theirs_s / ours_s, goal=2, detail=f"{ours_s * 1e3:.0f} ms, {theirs_s * 1e3:.0f} ms")
    peaks = [_added_bytes(run_child, way, num_tokens) for way in ("ours", "recomposed")]
    detail = f"{peaks[0] / 1e6:.0f} MB, {peaks[1] / 1e6:.0f} MB"
    row(f"{name}: peak memory beside the model", peaks[1] / peaks[0], goal=2, detail=detail)
    assert theirs_s / ours_s > 0.6


@pytest.mark.parametrize("num_tokens", [1024, 256])
def test_step_against_lora(benchmark: BenchmarkFixture, row, run_child, one_thread, num_tokens: int) -> None:
    """A step of z against one of PEFT's LoRA, r = 16, on the same matrices of the same decoder."""
    pytest.importorskip("peft", reason="peft is not installed: there is no LoRA to compare with")
    ways = ways_of_training()
    ours, theirs = (ways["stepper"](way, ways["small"](), num_tokens) for way in ("ours", "lora"))
    assert ours() == pytest.approx(theirs(), rel=1e-4)
    ours_s, theirs_s = best_times_s(ours, theirs, num_rounds=3, clock=time.process_time)
    benchmark.pedantic(ours, rounds=1)
    name = f"z training step against PEFT LoRA r = 16, {num_tokens:,} tokens"
    row(f"{name}, one thread", theirs_s / ours_s, goal=1, detail=f"{ours_s * 1e3:.0f} ms, {theirs_s * 1e3:.0f} ms")
    peaks = [_added_bytes(run_child, way, num_tokens) for way in ("ours", "lora")]
    detail = f"{peaks[0] / 1e6:.0f} MB, {peaks[1] / 1e6:.0f} MB"
    row(f"{name}: peak memory beside the model", peaks[1] / peaks[0], detail=detail)
    assert theirs_s / ours_s > 0.25


def _added_bytes(run_child, way: str, num_tokens: int) -> int:
    child = run_child(sys.executable, "-W", "ignore", "-c", MEMORY, way, str(num_tokens))
    steps = [num_bytes for moment_s, num_bytes in child.anon_bytes if moment_s >= child.said["began"]]
    return max(steps) - child.said["held"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the module docstring as a Hugging Face directory."""
    torch.manual_seed(0)
    config = HavocConfig.preset("edge-135m")
    model = HavocModel(dataclasses.replace(config, num_layers=4, vocab_size=1024))
    place = tmp_path_factory.mktemp("rollouts")
    model.save_pretrained(place / "base")
    return export_huggingface(place / "base", place / "hf")


@pytest.mark.parametrize("num_samples", [1, 8])
def test_rollouts_against_transformers(
    benchmark: BenchmarkFixture, row, one_thread, folder: Path, num_samples: int
) -> None:
    """64 sampled completions of 32 tokens behind prompts of 64: of 64 prompts, and of 8 with 8 samples each."""
    from transformers import LlamaForCausalLM

    num_prompts, num_prompt, num_new = 64 // num_samples, 64, 32
    ours, theirs = HavocModel.load_pretrained(folder).eval(), LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 1024, (num_prompts, num_prompt), generator=torch.Generator().manual_seed(0))
    found: dict[str, torch.Tensor] = {}

    def sample() -> None:
        generator = torch.Generator().manual_seed(0)
        kept = {"eos_id": (), "generator": generator, "num_samples": num_samples}
        found["ours"] = sample_tokens(ours, ids, max_new_tokens=num_new, **kept)

    @torch.inference_mode()
    def generate() -> None:
        length = {"max_new_tokens": num_new, "min_new_tokens": num_new, "num_return_sequences": num_samples}
        kept = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), **length, **kept)
        found["theirs"] = text[:, num_prompt:]

    ours_s, theirs_s = best_times_s(sample, generate, num_rounds=2, clock=time.process_time)
    benchmark.pedantic(sample, rounds=1)
    assert found["ours"].shape == found["theirs"].shape == (64, num_new)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids[:2]), theirs(ids[:2]).logits, atol=1e-3, rtol=1e-3)
    many = f"{num_prompts} prompts" if num_samples == 1 else f"{num_prompts} prompts, {num_samples} samples each"
    detail = f"{64 * num_new / ours_s:,.0f} and {64 * num_new / theirs_s:,.0f} tokens per CPU second"
    row(f"rollouts against transformers generate, batch 64, {many}", theirs_s / ours_s, goal=2, detail=detail)
    assert theirs_s / ours_s > 0.7
