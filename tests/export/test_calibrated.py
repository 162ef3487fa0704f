"""Structures that a text decides: exported, derived again, searched, and honest about which text it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from havoc_core import cli
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.calibration import BUNDLED, held_out, read_calibration
from havoc_core.export.layout import plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.precision import choose_promoted, measure_losses
from havoc_core.export.rederive import rederive
from havoc_core.export.runtime.artifact import MANIFEST, read_manifest
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.sample import BUNDLED as SAMPLE
from havoc_core.export.runtime.sample import read_sample
from havoc_core.export.source import open_source
from havoc_core.export.storing import bits_per_weight, plan_storage
from havoc_core.export.verify import verify_artifact
from havoc_core.model.config import HavocConfig
from havoc_core.model.cost import weight_bytes
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import EMBEDDING

NAMES = ("int4-gptq", "int4a-gptq", "int4-gptq-mix5.5", "int4a-gptq-b16-cfp32", "int4-mix6.0", "int4a-gptq-fp16")
KINDS = ("text", "untied", "odd-sizes", "qwen2", "qwen3", "vision")
GRAPHS = (GraphOptions(), GraphOptions(dialect="contrib", cache="static"))
PAIRWISE = [(kind, name, GRAPHS[(i + j) % 2]) for i, kind in enumerate(KINDS) for j, name in enumerate(NAMES)]
"""Every kind with every structure, and each of both in either graph."""
TEXT = " ".join(f"On day {day} the ferry took {day * 7 % 13} crates and {day % 5} goats over." for day in range(200))


@pytest.mark.parametrize(("kind", "name", "options"), PAIRWISE, ids=str)
def test_every_kind_of_decoder(
    configs: dict[str, HavocConfig],
    source_with,
    with_wide_heads,
    tmp_path: Path,
    kind: str,
    name: str,
    options: GraphOptions,
) -> None:
    """Both dialects agree with torch over the stored blocks, for blocks that end within a row too."""
    structure = Structure.named(name)
    artifact = export_artifact(
        source_with(with_wide_heads(configs[kind])), tmp_path / "a", structure=structure, options=options
    )
    manifest = read_manifest(artifact)
    assert Structure.from_fields(manifest.structure) == structure
    assert manifest.calibration is not None
    assert manifest.calibration["text"] == "random ids"
    if structure.average_bits is not None:
        assert structure.blocks.bits_per_weight < manifest.calibration["bits_per_weight"]


def test_nano_loses_less_by_gptq_and_less_still_with_more_bits(tmp_path: Path) -> None:
    """On text that did not calibrate, with trained weights: gptq at 4.5 bits beats rtn at 5, each step up beats it."""
    cost = {}
    for name in ("int4", "int4-gptq", "int4-gptq-mix5.5"):
        manifest = read_manifest(export_artifact("nano", tmp_path / name, structure=Structure.named(f"{name}-cfp32")))
        assert manifest.format_cost is not None
        cost[name] = manifest.format_cost["kl_mean"]
    assert cost["int4-gptq"] < 0.6 * cost["int4"]
    assert cost["int4-gptq-mix5.5"] < 0.8 * cost["int4-gptq"]


def test_calibration_and_measurement_read_different_texts(base_directory: Path, tmp_path: Path) -> None:
    """The bundled pages share no paragraph; a file of one's own is cut, and its parts do not overlap."""
    pages = [set(path.read_text().split("\n\n")) for path in (BUNDLED, SAMPLE)]
    assert not pages[0] & pages[1]
    (tmp_path / "text.txt").write_text(TEXT)
    source = open_source(base_directory)
    whole = read_sample(source.config, source.tokenizer, file=tmp_path / "text.txt")
    calibration = read_calibration(source.config, source.tokenizer, file=tmp_path / "text.txt")
    measured = held_out(whole)
    cut = len(whole.token_ids) - len(measured.token_ids)
    assert measured.token_ids == whole.token_ids[cut:]
    assert len(measured.token_ids) == pytest.approx(len(whole.token_ids) / 4, abs=1)
    start = set(whole.prefix)
    first, *_, last = ([token for token in window if token not in start] for window in calibration.windows.tolist())
    assert first == list(whole.token_ids[: len(first)])
    assert last == list(whole.token_ids[cut - len(last) : cut])


@pytest.mark.parametrize("name", ["int4-gptq", "int4a-gptq-mix6.0"])
def test_a_calibrated_export_is_derived_again_bit_for_bit(base_directory: Path, tmp_path: Path, name: str) -> None:
    """The same base and text give every byte again; twice exported, the same folder."""
    structure = Structure.named(name)
    first, second = (export_artifact(base_directory, tmp_path / out, structure=structure) for out in "ab")
    assert {f.name: f.read_bytes() for f in first.iterdir() if f.is_file()} == {
        f.name: f.read_bytes() for f in second.iterdir() if f.is_file()
    }
    verify_artifact(first)
    (check,) = rederive(first, read_manifest(first), base_directory)
    num_items = check.finding.split(" ", 1)[0]
    assert f"{num_items} tensors from base" in check.finding
    assert f"{num_items} bit for bit" in check.finding
    assert "held to the fold" not in check.finding


def test_a_text_of_ones_own_is_asked_for(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the text every block is derived again; without it each is held to the fold; another text is refused."""
    text, other, out = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "a"
    text.write_text(TEXT)
    other.write_text(TEXT.replace("goats", "sheep"))
    words = ["--weights", "int4", "--quantizer", "gptq", "--bits", "5.5", "--calibration", str(text), "--quiet"]
    assert cli.main(["export", str(base_directory), *words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "of the given text: 5." in shown
    assert " matrices in int8" in shown
    document = json.loads((out / MANIFEST).read_text())["calibration"]
    assert document["text"] == "given text"
    assert document["bits_per_weight"] <= 5.5
    assert document["int8"]
    verify = ["verify", str(out), "--base", str(base_directory), "--quiet"]
    assert cli.main([*verify, "--calibration", str(text)]) == 0
    assert "held to the fold" not in capsys.readouterr().out
    assert cli.main(verify) == 0
    assert "calibration text was not given" in capsys.readouterr().out
    assert cli.main([*verify, "--calibration", str(other)]) == 5
    assert "its hash is" in capsys.readouterr().err
    plain = export_artifact(base_directory, tmp_path / "b", structure=Structure("int4"))
    assert cli.main(["verify", str(plain), "--base", str(base_directory), "--calibration", str(text), "--quiet"]) == 2
    assert "made without a text" in capsys.readouterr().err


def test_a_wrong_block_is_noticed_without_the_text(base_directory: Path, tmp_path: Path) -> None:
    """A quantized matrix that is another one's fails, whichever text made it; so does a budget that is not kept."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    structure = Structure.named("int4-gptq-mix5.5")
    out = export_artifact(base_directory, tmp_path / "a", structure=structure, calibration=text)
    manifest = read_manifest(out)
    assert manifest.calibration is not None
    source = open_source(base_directory)
    layout = plan_storage(source, structure, source.tensors, text).layout
    weight = next(
        w for w in layout.weights if w.blocks is not None and w.blocks.num_bits == 4 and w.source != EMBEDDING
    )
    item = weight.initializers[0]
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[item.offset_bytes : item.offset_bytes + item.num_bytes] = bytes(
        reversed(data[item.offset_bytes : item.offset_bytes + item.num_bytes])
    )
    (out / "model.onnx.data").write_bytes(data)
    with pytest.raises(IdentityError, match=f"a block of {weight.source} is"):
        rederive(out, manifest, base_directory)
    everything = [w.source for w in layout.weights if w.blocks is not None]
    manifest.calibration["int8"] = everything
    with pytest.raises(IdentityError, match=r"int8 matrices .*8\.\d+ bits a weight"):
        rederive(out, manifest, base_directory)
    manifest.calibration["int8"] = ["model.norm.weight"]
    with pytest.raises(IdentityError, match=r"promotes model.norm.weight, which"):
        rederive(out, manifest, base_directory)


def test_too_little_text_is_refused_before_any_work(base_directory: Path, tmp_path: Path) -> None:
    """One line with the number of tokens, and nothing is written."""
    (tmp_path / "short.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    with pytest.raises(HavocError, match=r"short.txt: \d+ tokens of text; .* 256"):
        export_artifact(
            base_directory, tmp_path / "a", structure=Structure.named("int4-gptq"), calibration=tmp_path / "short.txt"
        )
    assert not (tmp_path / "a").exists()


def test_the_budget_is_spent_where_it_saves_most() -> None:
    """By gain per byte, within the budget, smaller matrices after one that does not fit; worse in int8 never."""
    shapes = {"a": (32, 64), "b": (32, 64), "c": (320, 64), "d": (32, 64)}
    losses = {"a": (1.0, 0.0), "b": (3.0, 0.0), "c": (25.0, 0.0), "d": (0.1, 0.2)}
    num_weights = sum(rows * columns for rows, columns in shapes.values())
    for budget, expected in (
        (4.5, ()),
        (4.5 + 4 * 2048 / num_weights, ("b",)),
        (4.5 + 4 * 4096 / num_weights, ("a", "b")),
    ):
        structure = Structure("int4", quantizer="gptq", average_bits=budget + 1e-9)
        assert choose_promoted(losses, shapes, structure) == expected
    assert choose_promoted(losses, shapes, Structure("int4", quantizer="gptq", average_bits=8.5)) == ("a", "b", "c")


def test_losses_are_the_divergence_to_second_order(configs: dict[str, HavocConfig], source_with) -> None:
    """Each matrix rounded alone moves the logits of the model itself by about the divergence that was told for it."""
    from havoc_core.export.precision import _rounded
    from havoc_core.export.reference import StreamedModel

    source, structure = source_with(configs["text"]), Structure.named("int4-gptq-mix5.5")
    layout = plan_layout(source.config, structure)
    windows = np.random.default_rng(0).integers(0, source.config.vocab_size, (24, 48))
    losses = measure_losses(source.tensors, source.config, layout, structure, windows)
    ids = torch.from_numpy(windows)
    exact = StreamedModel(source.config, source.tensors)(ids).log_softmax(-1)
    ratios = []
    for name in losses:
        moved = {
            **source.tensors,
            name: source.tensors[name]
            + (_rounded(source.tensors[name], structure.promoted_blocks) - source.tensors[name]),
        }
        log_q = StreamedModel(source.config, moved)(ids).log_softmax(-1)
        measured = float((exact.exp() * (exact - log_q)).sum(-1).mean())
        ratios.append(losses[name][1] / measured)
    assert 0.5 < np.median(ratios) < 2
    assert min(ratios) > 0.2
    assert max(ratios) < 5


def test_the_size_on_disk_is_within_the_budget(tmp_path: Path) -> None:
    """Stored bits are at most what the structure says, and the cost model counts the budget."""
    source, structure = open_source("nano"), Structure.named("int4-gptq-mix5.5")
    storage = plan_storage(source, structure, source.tensors)
    bits = bits_per_weight(storage.layout)
    assert bits is not None
    assert 5.3 < bits <= 5.5
    told = weight_bytes(source.config, structure)
    plain = weight_bytes(source.config, Structure.named("int4-gptq"))
    assert plain < told < plain * 5.6 / 4.5


def rows_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first train rows of a public data set."""
    (path, *_) = sorted(folder.glob("train*.parquet"))
    return pq.read_table(path).slice(0, count).to_pylist()


@pytest.mark.real
@pytest.mark.parametrize("structure", ["int4-gptq-mix5.0", "int4"])
def test_five_bits_a_weight_are_enough_for_a_real_model(
    real_model: Path, real_data: Path, structure: str, tmp_path: Path
) -> None:
    """SmolLM2-135M on questions and answers like those that calibrated, others than those: at most 0.10 nats at no
    more than 5 bits a weight, the table counted once; rounding to nearest loses more.
    """
    text = tmp_path / "text.txt"
    sums, facts = rows_of(real_data / "gsm8k" / "main", 150), rows_of(real_data / "ai2_arc" / "ARC-Easy", 150)
    solved = [f"{row['question']}\n{row['answer']}" for row in sums]
    chosen = [f"Question: {row['question']}\nAnswer: {row['choices']['text'][0]}" for row in facts]
    text.write_text("\n\n".join(part for pair in zip(solved, chosen, strict=True) for part in pair))
    out = export_artifact(real_model, tmp_path / "a", structure=Structure.named(structure), calibration=text)
    manifest = read_manifest(out)
    assert manifest.format_cost is not None
    assert manifest.format_cost["text"] == "given text"
    if structure == "int4":
        assert manifest.format_cost["kl_mean"] > 0.20
    else:
        assert manifest.calibration is not None
        assert manifest.calibration["bits_per_weight"] <= 5.0
        assert manifest.format_cost["kl_mean"] <= 0.10
