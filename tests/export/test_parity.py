"""The exported graph computes what its weights say, in every way it is used; and the proof notices when it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from havoc_core.errors import HavocError, MeasurementError
from havoc_core.export.package import export_artifact
from havoc_core.export.parity import MAX_RATIO, ParityCase, Reference, compare, read_reference
from havoc_core.export.reference import EXACT, FP32, Batch, StreamedModel, fp16_activations, int8_products, logits_of
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.probe import make_probe
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import Source
from havoc_core.model.config import HavocConfig
from havoc_core.model.hf_config import to_hf
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import EMBEDDING
from havoc_core.model.transformer import HavocModel

FORMATS = [
    ("fp32", "fp32"),
    ("fp16", "fp32"),
    ("int8", "fp32"),
    ("int4", "fp32"),
    ("fp16", "fp16"),
    ("int8", "fp16"),
    ("int4", "fp16"),
]
VARIANTS = [
    GraphOptions(logits="all"),
    GraphOptions(cache="static", logits="all"),
    GraphOptions(dialect="contrib", logits="all"),
    GraphOptions(dialect="contrib", cache="static"),
]
CASES = [
    "prefill",
    "prefill, new buffers at every call",
    "single steps",
    "chunked prefill",
    "left-padded batch",
    "left-padded steps",
]


def reference_of(source: Source) -> Reference:
    return read_reference(StreamedModel(source.config, source.tensors), make_probe(source.config))


def cases_of(artifact: Path) -> list[dict]:
    return json.loads((artifact / "manifest.json").read_text())["parity"]["cases"]


def test_fp32_is_as_near_to_float64_as_torch_is(config: HavocConfig, source_with, tmp_path: Path) -> None:
    """Over the base's own tensors, on every kind of decoder and every way of running it."""
    source = source_with(config)
    session = DecoderSession.open(export_artifact(source, tmp_path / "a"))
    cases = compare(reference_of(source), session, FP32)
    assert [case.name for case in cases] == CASES
    assert max(case.max_abs_diff for case in cases) < 1e-4
    assert {case.top1_share for case in cases} == {1.0}


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_way_to_write_the_graph_is_proved(
    config: HavocConfig, source_with, with_wide_heads, tmp_path: Path, options: GraphOptions
) -> None:
    """Dialects, caches and all logits; with all logits at every position that is read."""
    source = source_with(with_wide_heads(config))
    session = DecoderSession.open(export_artifact(source, tmp_path / "a", options=options))
    cases = compare(reference_of(source), session, FP32)
    assert [case.name for case in cases] == [name for name in CASES if options.cache == "dynamic" or "new" not in name]
    num_positions = {case.name: case.num_positions for case in cases}
    assert num_positions["left-padded batch"] == (24 + 19 + 12 if options.logits == "all" else 3)
    assert max(case.max_abs_diff for case in cases) < 1e-4


@pytest.mark.parametrize(("weight_format", "activation_dtype"), FORMATS)
@pytest.mark.parametrize("options", VARIANTS[1:], ids=str)
def test_no_dialect_or_cache_needs_a_wider_limit(
    configs: dict[str, HavocConfig],
    source_with,
    with_wide_heads,
    tmp_path: Path,
    options: GraphOptions,
    weight_format: str,
    activation_dtype: str,
) -> None:
    """In fp16 neither, where the CPU has kernels for all of them."""
    source, structure = source_with(with_wide_heads(configs["text"])), Structure(weight_format, activation_dtype)
    artifact = export_artifact(source, tmp_path / "a", structure=structure, options=options)
    assert all(0 < case["ratio"] <= MAX_RATIO for case in cases_of(artifact))
    ways = [name for name in CASES if options.cache == "dynamic" or "new" not in name]
    is_rounded = weight_format in {"int8", "int4"} and activation_dtype == "fp32"  # products of int8 activations
    exact = [f"exact products, {name}" for name in ways] if is_rounded else []
    assert [case["name"] for case in cases_of(artifact)] == ways + exact


@pytest.mark.parametrize(("weight_format", "activation_dtype"), FORMATS)
@pytest.mark.parametrize("kind", ["text", "vision", "untied", "odd-sizes"])
def test_every_format_is_proved(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, kind: str, weight_format: str, activation_dtype: str
) -> None:
    """Export ends with the proof for each weight format and activation dtype, and the manifest keeps its figures."""
    structure = Structure(weight_format, activation_dtype)
    artifact = export_artifact(source_with(configs[kind]), tmp_path / "a", structure=structure)
    assert all(0 < case["ratio"] <= MAX_RATIO for case in cases_of(artifact))
    session = DecoderSession.open(artifact)
    logits, _ = session.prefill(np.array([[5, 6, 7]]))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["int8-cint8", "int4-cint8", "int8-cw8a8"])
def test_rounded_products_are_proved_twice(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, name: str
) -> None:
    """As they ship against int8 activations, and with exact products against fp32, which is a thousand times nearer."""
    structure = Structure.named(name)
    artifact = export_artifact(source_with(configs["text"]), tmp_path / "a", structure=structure)
    cases = {case["name"]: case for case in cases_of(artifact)}
    assert set(cases) == {*CASES, *(f"exact products, {name}" for name in CASES)}
    for case in CASES:
        assert cases[case]["measure"] == "torch fp32 over int8 activations"
        assert cases[f"exact products, {case}"]["measure"] == "torch fp32"
        assert cases[f"exact products, {case}"]["error"] * 1000 < cases[case]["error"]


@pytest.mark.parametrize("dialect", ["standard", "contrib"])
@pytest.mark.parametrize("kind", ["text", "vision", "untied", "odd-sizes"])
def test_products_of_integers_are_proved(
    configs: dict[str, HavocConfig], source_with, with_wide_heads, tmp_path: Path, kind: str, dialect: str
) -> None:
    """W8A8 in both dialects; a token whose embedding is zero gives finite logits."""
    structure, options = Structure("int8", compute="w8a8"), GraphOptions(dialect=dialect)
    source = source_with(with_wide_heads(configs[kind]))
    tensors = dict(source.tensors)
    tensors[EMBEDDING] = tensors[EMBEDDING].clone()
    tensors[EMBEDDING][5] = 0
    source = dataclasses.replace(source, tensors=tensors)
    artifact = export_artifact(source, tmp_path / "a", structure=structure, options=options)
    assert all(0 < case["ratio"] <= MAX_RATIO for case in cases_of(artifact))
    logits, _ = DecoderSession.open(artifact).prefill(np.array([[5, 6, 5]]))
    assert np.isfinite(logits).all()


def test_products_of_integers_are_for_the_cpu(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """Neither proved nor opened on a card, whether this machine has one or not."""
    source, structure = source_with(configs["text"]), Structure("int8", compute="w8a8")
    with pytest.raises(HavocError, match="CPU only, not on a card"):
        export_artifact(source, tmp_path / "a", structure=structure, also_on={CUDA_PROVIDER: "a card"})
    artifact = export_artifact(source, tmp_path / "a", structure=structure)
    with pytest.raises(HavocError, match="CPU only"):
        DecoderSession.open(artifact, provider=CUDA_PROVIDER)


def test_a_graph_is_proved_on_another_device_too(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """Every case of the CPU once more, under that device's name; here the other device is the CPU again."""
    source = source_with(configs["text"])
    out = export_artifact(source, tmp_path / "out", also_on={CPU_PROVIDER: "another"})
    names = [case["name"] for case in read_manifest(out).parity["cases"]]
    assert names == [*CASES, *(f"another, {case}" for case in CASES)]


def test_another_device_that_computes_otherwise_is_noticed(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path
) -> None:
    """No card rounds activations to int8; this one, the CPU, does. Nothing is written then."""
    source, structure = source_with(configs["text"]), Structure(weight_format="int8", compute="int8")
    with pytest.raises(MeasurementError, match="another, prefill: .* times that of torch fp32"):
        export_artifact(source, tmp_path / "out", structure=structure, also_on={CPU_PROVIDER: "another"})
    assert not (tmp_path / "out").exists()


def test_streamed_reference_is_the_model(config: HavocConfig, source_with) -> None:
    """The layer-by-layer reference gives HavocModel's logits, in fp32 and, a million times nearer, in float64."""
    tensors = source_with(config).tensors
    probe = make_probe(config)
    ids, mask = torch.from_numpy(probe.ids), torch.from_numpy(probe.mask)
    patches = None if probe.patches is None else torch.from_numpy(probe.patches)
    streamed, model = StreamedModel(config, tensors), HavocModel.from_tensors(config, tensors, source="test")
    with torch.inference_mode():
        ours, theirs = streamed(ids, mask, patches=patches), model(ids, mask, patches=patches)
    assert torch.allclose(ours[mask == 1], theirs[mask == 1], atol=1e-5)
    (hidden,) = streamed.hidden(Batch(ids, mask, patches), [EXACT])
    exact = logits_of(hidden, streamed.head(), EXACT)[mask == 1]
    with torch.inference_mode():
        double = model.double()(ids, mask, patches=None if patches is None else patches.double())[mask == 1]
    assert exact.dtype == torch.float64
    assert float((exact - double).abs().max()) < 2e-6  # the model's rotary tables are fp32


def test_every_arithmetic_rounds_what_it_says(configs: dict[str, HavocConfig], source_with) -> None:
    """fp32 errs by 1e-7, fp16 results by 1e-3, int8 activations by 1e-2, on the same weights and inputs."""
    config = configs["text"]
    measures = [FP32, fp16_activations(), int8_products(32)]
    model = StreamedModel(config, source_with(config).tensors)
    reference = read_reference(model, make_probe(config), measures)
    fp32, fp16, int8 = (reference.errors[measure.name].mean() for measure in measures)
    assert 1e-8 < fp32 < 2e-6
    assert 1e-4 < fp16 < 1e-2
    assert 3e-3 < int8 < 1e-1


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
    theirs = model_class(config_class(**to_hf(config))).eval()
    theirs.load_state_dict({"lm_head.weight": source.tensors["model.embed_tokens.weight"], **source.tensors})
    session = DecoderSession.open(export_artifact(source, tmp_path / "a"))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 90))
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids)).logits[:, -1].numpy()
    ours, _ = session.prefill(ids)
    assert np.abs(ours - expected).max() < 1e-4


@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
def test_the_limit_knows_no_scale(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path, weight_format: str
) -> None:
    """A head a hundred times as large is no other graph; one row of it that is off by a thousandth is."""
    source = source_with(configs["untied"])
    tensors = dict(source.tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 100
    large = Source("test", source.config, tensors, None)
    out = export_artifact(large, tmp_path / "a", structure=Structure(weight_format, compute="fp32"))
    if weight_format == "fp32":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        tensors["lm_head.weight"][0] *= 1.001
        with pytest.raises(MeasurementError, match="function of its weights"):
            compare(reference_of(large), DecoderSession.open(out), FP32)


def test_a_wrong_weight_is_noticed(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """A graph that runs with one matrix off by a thousandth is refused, naming the case and the numbers."""
    config = configs["text"]
    source = source_with(config)
    artifact = export_artifact(source, tmp_path / "a")
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = np.ascontiguousarray(source.tensors[name].numpy().T * 1.001)
    session = DecoderSession.open(artifact, weights={name: wrong})
    with pytest.raises(MeasurementError, match=r"prefill: .*[\d,]+ times .* \(allowed 5\)"):
        compare(reference_of(source), session, FP32)


def test_a_logit_that_is_not_finite_is_noticed(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """NaN never passes as agreement."""
    config = configs["text"]
    source = source_with(config)
    artifact = export_artifact(source, tmp_path / "a")
    bad = np.full(config.d_model, np.nan, np.float32)
    session = DecoderSession.open(artifact, weights={"model.norm.weight": bad})
    with pytest.raises(MeasurementError, match="not finite"):
        compare(reference_of(source), session, FP32)


def test_one_bad_position_is_noticed_among_many() -> None:
    """The worst position is limited as the mean is."""
    case = ParityCase(
        name="a",
        measure="torch fp32",
        num_positions=100,
        error=2e-6,
        worst_error=2e-5,
        torch_error=1e-6,
        torch_worst_error=2e-6,
        max_abs_diff=1e-4,
        top1_share=1.0,
    )
    assert case.ratio == pytest.approx(10)
