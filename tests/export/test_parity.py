"""The exported graph computes what torch computes, in every way it is used; and parity notices when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from havoc_core.errors import MeasurementError
from havoc_core.export.options import GraphOptions
from havoc_core.export.package import export_artifact
from havoc_core.export.parity import LIMITS, StreamedModel, compare, reference_logits
from havoc_core.export.probe import make_probe
from havoc_core.export.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.checkpoint import assemble
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure

VARIANTS = [
    GraphOptions(logits="all"),
    GraphOptions(cache="static", logits="all"),
    GraphOptions(dialect="contrib", logits="all"),
    GraphOptions(dialect="contrib", cache="static"),
]
CASES = ["prefill", "empty past", "single steps", "chunked prefill", "left-padded batch", "left-padded steps"]


def logits_of_model(config: HavocConfig, source: Source) -> np.ndarray:
    return reference_logits(assemble(config, source.tensors, source="test"), config)


def test_fp32_agrees_with_the_model_within_1e_4(config: HavocConfig, source_with, tmp_path: Path) -> None:
    """HavocModel itself against ONNX Runtime, on every kind of decoder and every way of running it."""
    source = source_with(config)
    session = DecoderSession.open(export_artifact(source, tmp_path / "a"))
    report = compare(logits_of_model(config, source), session, Structure())
    assert [case.name for case in report.cases] == CASES
    assert report.max_abs_diff < 1e-4
    assert report.top1_share == 1.0


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_way_to_write_the_graph_agrees_within_1e_4(
    config: HavocConfig, source_with, with_wide_heads, tmp_path: Path, options: GraphOptions
) -> None:
    """Dialects, caches and all logits against HavocModel itself; with all logits at every position that is read."""
    source = source_with(with_wide_heads(config))
    session = DecoderSession.open(export_artifact(source, tmp_path / "a", options=options))
    report = compare(logits_of_model(source.config, source), session, Structure())
    assert [case.name for case in report.cases] == CASES
    num_positions = {case.name: case.num_positions for case in report.cases}
    assert num_positions["left-padded batch"] == (24 + 19 + 12 if options.logits == "all" else 3)
    assert report.max_abs_diff < 1e-4


@pytest.mark.parametrize(("weight_format", "activation_dtype"), sorted(LIMITS))
@pytest.mark.parametrize("options", VARIANTS[1:], ids=str)
def test_limits_are_those_of_the_formats(
    configs: dict[str, HavocConfig],
    source_with,
    with_wide_heads,
    tmp_path: Path,
    options: GraphOptions,
    weight_format: str,
    activation_dtype: str,
) -> None:
    """Neither dialect nor cache needs a wider one, in fp16 either, where the CPU has kernels for all of them."""
    source, structure = source_with(with_wide_heads(configs["text"])), Structure(weight_format, activation_dtype)
    export_artifact(source, tmp_path / "a", structure=structure, options=options)


@pytest.mark.parametrize(("weight_format", "activation_dtype"), sorted(LIMITS))
@pytest.mark.parametrize("kind", ["text", "vision", "untied", "odd-sizes"])
def test_every_format_stays_within_its_limit(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, kind: str, weight_format: str, activation_dtype: str
) -> None:
    """Export ends with parity for each weight format and activation dtype, and the manifest keeps its figures."""
    structure = Structure(weight_format, activation_dtype)
    artifact = export_artifact(source_with(configs[kind]), tmp_path / "a", structure=structure)
    session = DecoderSession.open(artifact)
    logits, _ = session.prefill(np.array([[5, 6, 7]]))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_streamed_reference_is_the_model(config: HavocConfig, source_with) -> None:
    """The layer-by-layer reference gives HavocModel's logits."""
    tensors = source_with(config).tensors
    probe = make_probe(config)
    ids, mask = torch.from_numpy(probe.ids), torch.from_numpy(probe.mask)
    patches = None if probe.patches is None else torch.from_numpy(probe.patches)
    with torch.inference_mode():
        ours = StreamedModel(config, tensors)(ids, mask, patches=patches)
        theirs = assemble(config, tensors, source="test")(ids, mask, patches=patches)
    assert torch.allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "model_class", "config_class"),
    [
        ("text", LlamaForCausalLM, LlamaConfig),
        ("untied", LlamaForCausalLM, LlamaConfig),
        ("llama3-rope", LlamaForCausalLM, LlamaConfig),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config),
        ("qwen3", Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_artifact_agrees_with_transformers(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, kind: str, model_class, config_class
) -> None:
    """An independent implementation gives the artifact's logits, also past the original context."""
    config = configs[kind]
    source = source_with(config)
    theirs = model_class(config_class(**config.to_hf())).eval()
    theirs.load_state_dict({"lm_head.weight": source.tensors["model.embed_tokens.weight"], **source.tensors})
    session = DecoderSession.open(export_artifact(source, tmp_path / "a"))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 90))
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids)).logits[:, -1].numpy()
    ours, _ = session.prefill(ids)
    assert np.abs(ours - expected).max() < 1e-4


@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
def test_large_logits_are_rounded_in_large_steps(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, weight_format: str
) -> None:
    """A head a hundred times as large is no other graph; one weight of it that is off by a thousandth is."""
    source = source_with(configs["untied"])
    tensors = dict(source.tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 100
    large = Source("test", source.config, tensors, None)
    structure = Structure(weight_format)
    out = export_artifact(large, tmp_path / "a", structure=structure)
    cases = json.loads((out / "manifest.json").read_text())["parity"]["cases"]
    assert min(case["spread"] for case in cases) > 50
    if weight_format == "fp32":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        tensors["lm_head.weight"][0] *= 1.001
        with pytest.raises(MeasurementError, match="largest difference"):
            compare(logits_of_model(large.config, large), DecoderSession.open(out), structure)


def test_ordinary_logits_have_the_limit_they_had() -> None:
    """Up to a spread of four the limit is 1e-4."""
    limit = LIMITS["fp32", "fp32"]
    assert limit.max_abs == 1e-4 == limit.max_relative * 4


def test_a_wrong_weight_is_noticed(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """A graph that runs with one matrix off by a thousandth is refused, naming the case and the numbers."""
    config = configs["text"]
    source = source_with(config)
    artifact = export_artifact(source, tmp_path / "a")
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = np.ascontiguousarray(source.tensors[name].numpy().T * 1.001)
    session = DecoderSession.open(artifact, weights={name: wrong})
    with pytest.raises(MeasurementError, match=r"prefill: largest difference .* allowed 0.0001"):
        compare(logits_of_model(config, source), session, Structure())


def test_a_logit_that_is_not_finite_is_noticed(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """NaN never passes as agreement."""
    config = configs["text"]
    source = source_with(config)
    artifact = export_artifact(source, tmp_path / "a")
    bad = np.full(config.d_model, np.nan, np.float32)
    session = DecoderSession.open(artifact, weights={"model.norm.weight": bad})
    with pytest.raises(MeasurementError, match="not finite"):
        compare(logits_of_model(config, source), session, Structure())
