"""HAVOC beside the tools people use today, on the same weights in one run: edge-135m, random, saved once for all.

Exports run in processes of their own. HAVOC's ends with a proof that the graph computes what torch computes; its rivals
do not have one, so both are shown: the whole export, and the part until the proof begins. "After imports" leaves out
what Python, torch and transformers need to load. Anonymous memory is what no file backs: mapped weights are not in it.

onnxruntime-genai's builder lives in the environment that `make genai` makes, with torch, transformers and onnx-ir
installed there, or in the one whose interpreter HAVOC_GENAI_PYTHON names.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from havoc_core.export.huggingface import export_huggingface
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.completion import generate_ids
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.blocks import LayerCache
from havoc_core.model.checkpoint import BUNDLED_NANO
from havoc_core.model.config import HavocConfig
from havoc_core.model.generation import decode_one, prefill
from havoc_core.model.structure import Structure
from havoc_core.model.transformer import HavocModel
from tests.perf.turns import best_times_s

FORMATS = ("fp32", "int8", "int4")
pytestmark = pytest.mark.timeout(1200)  # rivals are slow beside other work
CONTEXT, NUM_NEW = 512, 64
OURS = """
import json, sys, time
from pathlib import Path
import numpy, onnx_ir, torch
from havoc_core.export import package
from havoc_core.model.structure import Structure
said = {"imported": time.monotonic()}
prove = package._prove
def timed(*args, **kwargs):
    said["unproved"] = time.monotonic()
    proof = prove(*args, **kwargs)
    said["proved"] = time.monotonic()
    return proof
package._prove = timed
package.export_artifact(Path(sys.argv[1]), Path(sys.argv[2]), structure=Structure(sys.argv[3]))
print(json.dumps(said))
"""
BUILDER = """
import contextlib, json, runpy, sys, time
import onnxruntime_genai.models.builder
said = {"imported": time.monotonic()}
with contextlib.redirect_stdout(sys.stderr):
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
print(json.dumps(said))
"""
DYNAMO = """
import contextlib, json, sys, time
import onnxscript, torch
from torch import nn
from havoc_core.model.transformer import HavocModel
said = {"imported": time.monotonic()}
class Flat(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, input_ids, attention_mask, *past):
        pairs = list(zip(past[::2], past[1::2]))
        logits, present = self.model(input_ids, attention_mask, pairs, use_cache=True, last_only=True)
        return (logits, *(tensor for pair in present for tensor in pair))
model = HavocModel.load_pretrained(sys.argv[1])
attention = model.config.attention
past = [torch.zeros(1, attention.num_kv_heads, 4, attention.head_dim) for _ in range(2 * model.config.num_layers)]
shapes = ({0: "batch", 1: "new"}, {0: "batch", 1: "total"}, tuple({0: "batch", 2: "past"} for _ in past))
with contextlib.redirect_stdout(sys.stderr):
    torch.onnx.export(
        Flat(model), (torch.ones(1, 3, dtype=torch.long), torch.ones(1, 7, dtype=torch.long), *past), sys.argv[2],
        input_names=["input_ids", "attention_mask", *(f"past{index}" for index in range(len(past)))],
        dynamo=True, opset_version=23, dynamic_shapes=shapes, external_data=True, verbose=False,
    )
print(json.dumps(said))
"""
LOAD = """
import json, sys
import onnxruntime as ort
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]
before = resident()
session = ort.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
print(json.dumps(dict(zip(("anon", "file"), (now - then for now, then in zip(resident(), before))))))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edge-135m with random weights as a Hugging Face directory; any tokenizer will do."""
    directory = export_huggingface("edge-135m", tmp_path_factory.mktemp("rivals") / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_NANO / file, directory / file)
    return directory


@pytest.fixture(scope="module")
def build(base: Path, genai_python: Path, run_child) -> Callable[..., Any]:
    """Build with onnxruntime-genai's builder in a process of its own."""

    def built(out: Path, weight_format: str) -> Any:
        words = ["-i", base, "-o", out, "-p", weight_format, "-e", "cpu", "-c", out / "cache"]
        return run_child(genai_python, "-W", "ignore", "-c", BUILDER, *words)

    return built


@pytest.fixture(scope="module", params=FORMATS)
def graphs(request: pytest.FixtureRequest, base: Path, build, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The same weights in one precision: HAVOC's graph, HAVOC's with the logits of every token, and the builder's."""
    folder = tmp_path_factory.mktemp(request.param)
    structure = Structure(request.param)
    export_artifact(base, folder / "ours", structure=structure)
    export_artifact(base, folder / "all", structure=structure, options=GraphOptions(logits="all"))
    build(folder / "theirs", request.param)
    return {"format": request.param, **{name: folder / name for name in ("ours", "all", "theirs")}}


def compare_exports(row, name: str, ours: list, theirs: list) -> None:
    """Time and memory of the best of a few runs each: whole, then without imports and without HAVOC's proof."""
    ours_s, theirs_s = (min(child.wall_s for child in children) for children in (ours, theirs))
    row(
        f"export against {name}: time, all of it",
        theirs_s / ours_s,
        goal=3,
        detail=f"{ours_s:.1f} s with its proof, {theirs_s:.1f} s without one",
    )
    ours_s = min(child.said["unproved"] - child.said["imported"] for child in ours)
    finish_s = min(child.started_s + child.wall_s - child.said["proved"] for child in ours)
    theirs_s = min(child.started_s + child.wall_s - child.said["imported"] for child in theirs)
    row(
        f"export against {name}: time after imports, without proof",
        theirs_s / (ours_s + finish_s),
        goal=3,
        detail=f"{ours_s + finish_s:.2f} s, {theirs_s:.2f} s",
    )
    ours_bytes, theirs_bytes = (min(child.peak_anon_bytes() for child in children) for children in (ours, theirs))
    bare = min(child.peak_anon_bytes(before_s=child.said["unproved"]) for child in ours)
    row(
        f"export against {name}: peak anonymous memory",
        theirs_bytes / ours_bytes,
        goal=3,
        detail=f"{ours_bytes / 1e6:.0f} MB ({bare / 1e6:.0f} MB until the proof), {theirs_bytes / 1e6:.0f} MB",
    )
    ours_bytes, theirs_bytes = (min(child.peak_rss_bytes for child in children) for children in (ours, theirs))
    row(
        f"export against {name}: peak resident memory, mapped files included",
        theirs_bytes / ours_bytes,
        detail=f"{ours_bytes / 1e6:.0f} MB, {theirs_bytes / 1e6:.0f} MB",
    )


@pytest.mark.parametrize("weight_format", FORMATS)
def test_export_against_the_genai_builder(
    benchmark, row, base: Path, build, run_child, tmp_path: Path, weight_format: str
) -> None:
    """From the same directory to a folder with one graph and its weights, the formats' bytes alike."""
    ours, theirs = [], []

    def both_in_turn() -> None:
        ours.append(run_child(sys.executable, "-c", OURS, base, tmp_path / "ours", weight_format))
        theirs.append(build(tmp_path / f"theirs-{len(theirs)}", weight_format))

    benchmark.pedantic(both_in_turn, rounds=2)
    compare_exports(row, f"genai builder, {weight_format}", ours, theirs)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (tmp_path / "ours", tmp_path / "theirs-0")]
    assert sizes[0] < 1.05 * sizes[1]


def test_export_against_dynamo(benchmark, row, base: Path, run_child, tmp_path: Path) -> None:
    """The same module traced by torch.onnx in fp32."""
    ours = []
    benchmark.pedantic(
        lambda: ours.append(run_child(sys.executable, "-c", OURS, base, tmp_path / "ours", "fp32")), rounds=2
    )
    theirs = [run_child(sys.executable, "-W", "ignore", "-c", DYNAMO, base, tmp_path / "theirs.onnx")]
    compare_exports(row, "torch dynamo, fp32", ours, theirs)


class Loop:
    """One graph in ONNX Runtime, run the same way whoever built it: values bound, outputs left to the runtime."""

    def __init__(self, folder: Path, num_past: int) -> None:
        attention = HavocConfig.preset("edge-135m").attention
        past = np.zeros((1, attention.num_kv_heads, num_past, attention.head_dim), np.float32)
        self.session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.num_past, self.past = num_past, ort.OrtValue.ortvalue_from_numpy(past)

    def run(self, num_new: int) -> np.ndarray:
        """The logits of the last of `num_new` tokens after a past of zeros."""
        tokens, num_all = np.arange(num_new)[None], self.num_past + num_new
        values = {"input_ids": tokens + 7, "position_ids": tokens + self.num_past}
        values["attention_mask"] = np.ones((1, num_all), np.int64)
        binding = self.session.io_binding()
        for name in self.inputs:
            if name in values:
                binding.bind_cpu_input(name, values[name])
            else:
                binding.bind_ortvalue_input(name, self.past)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[self.outputs.index("logits")].numpy()[0, -1]


def test_graph_against_the_builders(benchmark, row, graphs: dict) -> None:
    """Prefill of 512 tokens and one step at context 512, both graphs in the same loop, taking turns."""
    weight_format = graphs["format"]
    names = ("ours", "all", "theirs")
    empty = [Loop(graphs[name], 0) for name in names]
    ours, theirs = empty[0].run(24), empty[2].run(24)
    difference = np.abs(ours - theirs).max() / theirs.std()
    prefills = best_times_s(*(partial(loop.run, CONTEXT) for loop in empty), num_rounds=5)
    del empty
    filled = [Loop(graphs[name], CONTEXT) for name in names]
    steps = best_times_s(*(partial(loop.run, 1) for loop in filled), num_rounds=100)
    benchmark.pedantic(filled[0].run, args=(1,), rounds=20, warmup_rounds=2)
    name = f"graph against genai builder's, {weight_format}"
    row(
        f"{name}: prefill of 512",
        prefills[2] / prefills[0],
        goal=1,
        detail=f"{prefills[0] * 1e3:.0f} ms for the last token's logits, {prefills[2] * 1e3:.0f} ms for every token's",
    )
    row(
        f"{name}: prefill of 512, both with every token's logits",
        prefills[2] / prefills[1],
        goal=1,
        detail=f"{prefills[1] * 1e3:.0f} ms, {prefills[2] * 1e3:.0f} ms",
    )
    row(
        f"{name}: step at context 512",
        steps[2] / steps[0],
        goal=1,
        detail=f"{steps[0] * 1e3:.2f} ms, {steps[2] * 1e3:.2f} ms; logits differ by {difference:.1e} of their spread",
    )
    assert difference < (1e-3 if weight_format != "int8" else 0.3)


def test_memory_after_load(benchmark, row, graphs: dict, run_child) -> None:
    """What a process holds more after opening the graph. Pages of a mapped file can be taken back at any time."""
    ours = benchmark.pedantic(run_child, args=(sys.executable, "-c", LOAD, graphs["ours"]), rounds=1).said
    theirs = run_child(sys.executable, "-c", LOAD, graphs["theirs"]).said
    assert 0 < ours["anon"] < 2 * theirs["anon"]
    row(
        f"anonymous memory after load against genai builder's, {graphs['format']}",
        theirs["anon"] / ours["anon"],
        goal=1,
        detail=f"{ours['anon'] / 1e6:.0f} MB and {ours['file'] / 1e6:.0f} MB of the mapped file, "
        f"{theirs['anon'] / 1e6:.0f} MB and {theirs['file'] / 1e6:.0f} MB",
    )


def test_against_torch_eager(benchmark, row, base: Path, tmp_path: Path) -> None:
    """Prefill of 512 and one step at context 512 in fp32: the artifact against this package's own torch model."""
    session = DecoderSession.open(export_artifact(base, tmp_path / "a"))
    model = HavocModel.load_pretrained(base)
    config = model.config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, CONTEXT))
    shape = (1, config.attention.num_kv_heads, CONTEXT + 1, config.attention.head_dim)

    @torch.inference_mode()
    def eager() -> list[LayerCache]:
        cache = [LayerCache(torch.empty(shape), torch.empty(shape)) for _ in range(config.num_layers)]
        prefill(model, torch.from_numpy(ids), None, None, cache)
        return cache

    @torch.inference_mode()
    def eager_step() -> None:
        for layer in cache:
            layer.length = CONTEXT
        decode_one(model, torch.from_numpy(ids[:, 0]), None, cache)

    cache, (_, past) = eager(), session.prefill(ids)
    ours_s, theirs_s = best_times_s(lambda: session.prefill(ids), eager, num_rounds=5)
    detail = f"{ours_s * 1e3:.0f} ms, {theirs_s * 1e3:.0f} ms"
    row("artifact against torch eager, fp32: prefill of 512", theirs_s / ours_s, goal=1, detail=detail)
    ours_s, theirs_s = best_times_s(lambda: session.decode(ids[:, :1], None, past), eager_step, num_rounds=30)
    detail = f"{ours_s * 1e3:.1f} ms, {theirs_s * 1e3:.1f} ms"
    row("artifact against torch eager, fp32: step at context 512", theirs_s / ours_s, goal=1, detail=detail)
    benchmark.pedantic(session.prefill, args=(ids,), rounds=2)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_against_transformers_generate(benchmark, row, base: Path, tmp_path: Path, weight_format: str) -> None:
    """Greedy text, 64 tokens after 64: `transformers` in fp32 against the artifact in each precision."""
    from transformers import LlamaForCausalLM

    session = DecoderSession.open(export_artifact(base, tmp_path / "a", structure=Structure(weight_format)))
    model = LlamaForCausalLM.from_pretrained(base).eval()
    prompt = np.random.default_rng(0).integers(0, session.config.vocab_size, (1, NUM_NEW))
    found: dict[str, list[int]] = {}

    def ours() -> None:
        found["ours"] = generate_ids(session, prompt.tolist(), max_new_tokens=NUM_NEW)[0]

    @torch.inference_mode()
    def theirs() -> None:
        ids = torch.from_numpy(prompt)
        length = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
        found["theirs"] = text[0, NUM_NEW:].tolist()

    ours_s, theirs_s = best_times_s(ours, theirs, num_rounds=2)
    benchmark.pedantic(ours, rounds=1)
    row(
        f"artifact in {weight_format} against transformers generate in fp32: 64 tokens after 64",
        theirs_s / ours_s,
        goal=1,
        detail=f"{NUM_NEW / ours_s:.0f} and {NUM_NEW / theirs_s:.0f} tokens a second",
    )
    assert len(found["ours"]) == NUM_NEW
    if weight_format == "fp32":
        assert found["ours"][:8] == found["theirs"][:8]
