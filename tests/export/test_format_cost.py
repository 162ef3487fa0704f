"""What a format costs is measured by running the artifact on a text, and the text is one that can be read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from havoc_core.errors import HavocError
from havoc_core.export.format_cost import block_error, block_limit, num_positions_for, windows_of
from havoc_core.export.layout import plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.sample import BUNDLED, Sample, read_sample
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.model.checkpoint import BUNDLED_NANO
from havoc_core.model.config import HavocConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tokenizer import Tokenizer
from havoc_core.model.transformer import HavocModel


def cost_of(artifact: Path) -> dict:
    cost = read_manifest(artifact).format_cost
    assert cost is not None
    return cost


def test_the_figures_are_those_of_the_distributions(
    configs: dict[str, HavocConfig], source_with, tmp_path: Path
) -> None:
    """KL, its percentile, top-1 and perplexity, computed here from the logits of torch and of the session."""
    config, source = configs["text"], source_with(configs["text"])
    artifact = export_artifact(source, tmp_path / "a", structure=Structure("int4"))
    sample = read_sample(config, None)
    windows = windows_of(sample, config, max_tokens=config.max_seq_len, num_parameters=1)
    session, model = DecoderSession.open(artifact), HavocModel.from_tensors(config, source.tensors, source="test")
    kls, same, lost = [], [], []
    for window in windows:
        with torch.inference_mode():
            log_p = model(torch.from_numpy(window[None]))[0].double().log_softmax(-1).numpy()
        past = session.empty_past(1, capacity=len(window))
        for place, token in enumerate(window):
            logits, past = session.extend(np.array([[token]]), None, past)
            log_q = torch.from_numpy(logits[0]).double().log_softmax(-1).numpy()
            kls.append((np.exp(log_p[place]) * (log_p[place] - log_q)).sum())
            same.append(log_p[place].argmax() == log_q.argmax())
            if place + 1 < len(window):
                lost.append(log_p[place, window[place + 1]] - log_q[window[place + 1]])
    cost = cost_of(artifact)
    assert cost["num_positions"] == len(kls) == windows.size
    assert cost["kl_mean"] == pytest.approx(np.mean(kls), rel=0.05)  # int8 products of one row and of many differ
    assert cost["kl_p99"] == pytest.approx(np.quantile(kls, 0.99), rel=0.2)
    assert cost["top1_share"] == pytest.approx(np.mean(same), abs=0.02)
    assert cost["perplexity_ratio"] == pytest.approx(math.exp(np.mean(lost)), rel=0.05)
    assert np.mean(cost["kl_chunks"]) == pytest.approx(cost["kl_mean"])


def test_a_coarser_format_costs_more(configs: dict[str, HavocConfig], source_with, tmp_path: Path) -> None:
    """fp32 nothing, fp16 next to nothing, int8 little, int4 much; and none of them is refused."""
    source = source_with(configs["untied"])
    names = ["fp32", "fp16", "int8", "int4"]
    costs = [cost_of(export_artifact(source, tmp_path / name, structure=Structure(name))) for name in names]
    kl = [cost["kl_mean"] for cost in costs]
    assert kl[0] < 1e-9 < kl[1] < kl[2] / 10 < kl[3] / 100
    assert [cost["text_sha256"] for cost in costs] == [None] * 4
    assert {cost["text"] for cost in costs} == {"random ids"}


def test_a_text_of_ones_own_is_measured_on(text_base_directory: Path, tmp_path: Path) -> None:
    """The bundled page unless a file is named; the manifest says which by its hash."""
    mine = tmp_path / "mine.txt"
    mine.write_text("A short story about a fox and a hen. " * 40)
    bundled = cost_of(export_artifact(text_base_directory, tmp_path / "a", structure=Structure("int8")))
    own = cost_of(export_artifact(text_base_directory, tmp_path / "b", structure=Structure("int8"), calibration=mine))
    assert (bundled["text"], own["text"]) == ("bundled text", "given text")
    assert bundled["text_sha256"] != own["text_sha256"]
    assert bundled["kl_mean"] != own["kl_mean"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "mine.txt"), (b"\xff\xfe\x00", "not UTF-8 text"), (b"too short", "at least 64 are needed")],
    ids=["missing", "no-text", "short"],
)
def test_a_text_that_cannot_be_used_is_refused_before_any_work(
    text_base_directory: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    """One line, and no folder."""
    mine = tmp_path / "mine.txt"
    if content is not None:
        mine.write_bytes(content)
    with pytest.raises(HavocError, match=message):
        export_artifact(text_base_directory, tmp_path / "a", calibration=mine)
    assert not (tmp_path / "a").exists()


def test_a_base_without_a_tokenizer_reads_no_text(configs, source_with, tmp_path: Path) -> None:
    """A file for it is refused; without one the ids are random and no text is named."""
    with pytest.raises(HavocError, match="has no tokenizer"):
        export_artifact(source_with(configs["text"]), tmp_path / "a", calibration=BUNDLED)


def test_the_bundled_text_is_read_by_nano() -> None:
    """Enough of it for all positions, in ids that the model has."""
    config = HavocConfig.preset("nano")
    tokenizer = Tokenizer.load(BUNDLED_NANO)
    sample = read_sample(config, tokenizer)
    windows = windows_of(sample, config, max_tokens=config.max_seq_len, num_parameters=1)
    assert windows.size >= num_positions_for(1) == 768
    assert 0 <= windows.min() <= windows.max() < config.vocab_size


def test_windows_begin_as_prompts_do() -> None:
    """What the tokenizer puts before a text stands before every piece of it."""
    sample = Sample(token_ids=tuple(range(10, 110)), name="given text", text_sha256="0" * 64, prefix=(1,))
    windows = sample.windows(length=9, num_windows=3)
    assert windows.shape == (3, 9)
    assert set(windows[:, 0]) == {1}
    assert (windows[0, 1], windows[-1, -1]) == (10, 109)


def test_large_models_read_fewer_positions() -> None:
    """A proof of seven billion parameters must end too."""
    assert [num_positions_for(count) for count in (10**6, 135 * 10**6, 7 * 10**9)] == [768, 768, 256]


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_no_right_block_is_beyond_its_limit(weight_format: str, block_size: int) -> None:
    """One value a hundred times the others, or long tails: what rounding loses of a block stays within the limit."""
    config = HavocConfig.pico().replace(d_model=256)
    structure = Structure(weight_format, block_size=block_size)
    weight = plan_layout(config, structure)["model.layers.0.mlp.up_proj.weight"]
    limit = block_limit(weight, structure.quantizer)
    from havoc_core.export.quantize import dequantize_blocks, quantize_blocks

    generator = torch.Generator().manual_seed(block_size)
    exact = torch.randn(weight.source_shape, generator=generator)
    exact[:, ::block_size] *= torch.logspace(0, 2, len(exact))[:, None]
    assert weight.blocks is not None
    blocks = quantize_blocks(exact, weight.blocks, structure.quantizer)
    stored = torch.from_numpy(dequantize_blocks(blocks, num_bits=weight.blocks.num_bits, num_columns=256))
    assert 0 < block_error(stored, exact, size=limit.size) <= limit.error
    stored[3, :block_size] = 0
    assert block_error(stored, exact, size=limit.size) > limit.error
    assert block_error(stored, exact, size=limit.size) > block_limit(weight, "gptq").error >= limit.error
