"""A GGUF file's own blocks in the graph: not one value is rounded again, and what cannot be kept is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch

from havoc_core import cli
from havoc_core.adapt.basis import compute_basis
from havoc_core.adapt.expert import Expert
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.candidates import CandidateSessions
from havoc_core.export.datafile import StoredWeights
from havoc_core.export.keep import kept_formats
from havoc_core.export.layout import DATA_FILE, plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.rebuilt import require_own_graphs
from havoc_core.export.rederive import rederive
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.source import open_source
from havoc_core.model.gguf import GgufTensors
from havoc_core.model.structure import Structure
from tests.gguf_files import write_gguf

EXACT = Structure("keep", compute="fp32")
TYPES = ["Q4_0", "Q4_1", "Q8_0", "Q6_K"]


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory):
    """`file_of(block)`: a small model whose matrices are all stored so."""
    folder, written = tmp_path_factory.mktemp("gguf"), {}

    def file(block: str, architecture: str = "llama") -> Path:
        key = f"{architecture}-{block}.gguf"
        if key not in written:
            write_gguf(folder / key, block=block, architecture=architecture)
            written[key] = folder / key
        return written[key]

    return file


def library_values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file as the gguf library dequantizes it, by the file's names and in its row order."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("block", TYPES)
def test_every_value_is_that_of_the_file_bit_for_bit(file_of, tmp_path: Path, block: str, architecture: str) -> None:
    """What the data file stores, dequantized, is what the gguf library makes of the file: all rows, all matrices."""
    path = file_of(block, architecture)
    artifact = export_artifact(path, tmp_path / "a", structure=EXACT)
    source = open_source(path)
    assert isinstance(source.tensors, GgufTensors)
    stored = StoredWeights(artifact / DATA_FILE, plan_layout(source.config, EXACT, kept_formats(source.tensors)))
    for name in source.tensors:
        assert torch.equal(stored[name], source.tensors[name]), name
    theirs = library_values(path)
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj"),
    ):
        assert np.array_equal(stored[f"{ours}.weight"].numpy(), theirs[name])
    ours_q, theirs_q = stored["model.layers.0.self_attn.q_proj.weight"].numpy(), theirs["blk.0.attn_q.weight"]
    assert {row.tobytes() for row in ours_q + 0.0} == {row.tobytes() for row in theirs_q + 0.0}  # -0 is 0


@pytest.mark.parametrize("options", [GraphOptions(), GraphOptions(dialect="contrib", cache="static")], ids=str)
@pytest.mark.parametrize("block", TYPES)
def test_the_artifact_answers_as_the_file_does(file_of, tmp_path: Path, block: str, options: GraphOptions) -> None:
    """KL 0 to the file's values where products are exact, in both dialects; the data file is as small as the blocks."""
    artifact = export_artifact(file_of(block), tmp_path / "a", structure=EXACT, options=options)
    manifest = read_manifest(artifact)
    assert manifest.format_cost is not None
    assert manifest.format_cost["kl_mean"] < 1e-8
    assert manifest.format_cost["top1_share"] == 1
    fast = read_manifest(export_artifact(file_of(block), tmp_path / "b", structure=Structure("keep"), options=options))
    assert fast.format_cost is not None
    assert 1e-8 < fast.format_cost["kl_mean"] < 0.1
    assert fast.graph["accuracy_level"] == 4
    (check,) = rederive(artifact, manifest, file_of(block))
    assert "bit for bit" in check.finding
    bits = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5, "Q6_K": 10}[block]
    assert manifest.files[DATA_FILE].num_bytes < manifest.num_parameters * bits / 8 * 1.1 + 100_000


@pytest.mark.parametrize("options", [GraphOptions(), GraphOptions(dialect="contrib", cache="static")], ids=str)
@pytest.mark.parametrize("block", TYPES)
def test_its_graph_is_built_anew_without_the_file(file_of, tmp_path: Path, block: str, options: GraphOptions) -> None:
    """What the graph declares of its matrices decides the layout, and nothing else of it is believed."""
    artifact = export_artifact(file_of(block), tmp_path / "a", structure=EXACT, options=options)
    manifest, graph = read_manifest(artifact), artifact / "model.onnx"
    assert require_own_graphs(artifact, manifest) == 1
    whole = onnx.load(graph, load_external_data=False)
    kept = next(place for place, tensor in enumerate(whole.graph.initializer) if "_Q" in tensor.name)
    for spoil in (
        lambda model: model.graph.node.add(op_type="Identity", input=["input_ids"], output=["unused"]),
        lambda model: model.graph.initializer.pop(kept),
        lambda model: model.graph.initializer[kept].dims.pop(),
        lambda model: model.graph.initializer[kept].dims.__setitem__(-1, 0),
        lambda model: model.graph.initializer[kept].ClearField("dims"),
        lambda model: [tensor.ClearField("data_type") for tensor in model.graph.initializer],
    ):
        model = onnx.ModelProto.FromString(whole.SerializeToString())
        spoil(model)
        graph.write_bytes(model.SerializeToString())
        with pytest.raises(IdentityError):
            require_own_graphs(artifact, manifest)
    graph.write_bytes(b"\xff" * 100)
    with pytest.raises(IdentityError, match="no graph"):
        require_own_graphs(artifact, manifest)


def test_another_file_does_not_pass_for_it(file_of, tmp_path: Path) -> None:
    """A byte of a block, or a file of other blocks: verify names it."""
    artifact = export_artifact(file_of("Q4_1"), tmp_path / "a", structure=EXACT)
    with pytest.raises(IdentityError, match="made from base"):
        rederive(artifact, read_manifest(artifact), file_of("Q4_0"))
    data = bytearray((artifact / DATA_FILE).read_bytes())
    data[5000] ^= 0xF0
    (artifact / DATA_FILE).write_bytes(data)
    with pytest.raises(IdentityError, match="of its range off base"):
        rederive(artifact, read_manifest(artifact), file_of("Q4_1"))


def test_a_file_without_blocks_is_refused(tmp_path: Path) -> None:
    """A file of F16 matrices alone has no blocks to keep."""
    write_gguf(tmp_path / "half.gguf", block="F16")
    with pytest.raises(HavocError, match=r"half: holds F16, .*Q4_0, Q4_1, Q8_0 and Q6_K"):
        export_artifact(tmp_path / "half.gguf", tmp_path / "a", structure=EXACT)
    assert not (tmp_path / "a").exists()


def test_only_an_unfolded_file_keeps_its_blocks(
    file_of, base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory, a fold and a search have no blocks of their own: one line, exit 2, nothing written."""
    out = tmp_path / "a"
    assert cli.main(["export", str(base_directory), "--weights", "keep", "--out", str(out), "--quiet"]) == 2
    assert "--weights keep" in capsys.readouterr().err
    words = ["export", str(file_of("Q4_0")), "--weights", "keep", "--block-size", "64", "--out", str(out)]
    assert cli.main(words) == 2
    assert "leave out block size 64" in capsys.readouterr().err
    source = open_source(file_of("Q4_0"))
    basis = compute_basis(source.tensors, base_hash=source.hash)
    deltas = {name: torch.full((size,), 0.1) for name, size in basis.num_directions().items()}
    expert = Expert(domain="math", deltas=deltas, base_hash=source.hash, basis_hash=basis.hash)
    with pytest.raises(HavocError, match="leave one of them out"):
        export_artifact(source, out, experts=[expert], alpha=(1.0,), structure=EXACT)
    assert not out.exists()
    with pytest.raises(HavocError, match="GGUF file, but a mixture"):
        CandidateSessions(source, basis, [expert]).open((1.0,), EXACT)


def test_the_command_says_what_it_kept(file_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--weights keep` from end to end: summary, card, verify, generation."""
    out = tmp_path / "a"
    assert cli.main(["export", str(file_of("Q4_1")), "--weights", "keep", "--out", str(out), "--quiet"]) == 0
    assert "the weights of the file as they are, fp32 activations computed in int8" in capsys.readouterr().out
    assert "blocks of the file" in (out / "README.md").read_text()
    assert cli.main(["verify", str(out), "--base", str(file_of("Q4_1")), "--json", "--quiet"]) == 0
    assert "bit for bit" in json.loads(capsys.readouterr().out)["checks"][-1]["finding"]
    session = DecoderSession.open(out)
    assert np.isfinite(session.prefill(np.array([[5, 6, 7]]))[0]).all()
