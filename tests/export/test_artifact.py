"""Hostile and broken folders end in one clear line, before the runtime maps anything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.runtime import external
from havoc_core.export.runtime.artifact import read_manifest, verify_hashes
from havoc_core.export.runtime.session import DecoderSession
from havoc_core.export.verify import verify_artifact
from tests.export.listed import relist


def edit(artifact: Path, change) -> None:
    path = artifact / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refused(artifact: Path, kind: type[HavocError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        verify_artifact(artifact)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_whole_artifact_passes(artifact: Path) -> None:
    """Hashes, graph and fingerprint are checked and named."""
    manifest, checks = verify_artifact(artifact)
    assert [check.name for check in checks] == ["hashes", "manifest", "graph", "provider", "fingerprint"]
    assert manifest.base_name == "talker"


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "tokenizer.json", "mixture.json", "README.md", "vision.onnx"]
)
def test_one_changed_byte_is_found(artifact: Path, name: str) -> None:
    """Any file of the manifest, the same size: exit code 5 and the file's name."""
    content = bytearray((artifact / name).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / name).write_bytes(content)
    refused(artifact, IdentityError, f"{name}: the file was changed")


def test_a_missing_file_is_named(artifact: Path) -> None:
    """Exit code 2."""
    (artifact / "embedding.onnx").unlink()
    refused(artifact, HavocError, r"embedding.onnx: listed in manifest.json but No such file")
    with pytest.raises(HavocError, match="embedding"):
        DecoderSession.open(artifact)


def test_a_truncated_data_file_is_found_without_hashing(artifact: Path) -> None:
    """Opening a session notices the size."""
    with (artifact / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(IdentityError, match="1000 bytes, the manifest says"):
        DecoderSession.open(artifact)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_manifest_is_no_artifact(artifact: Path, share: float) -> None:
    """Cut anywhere, it is refused as JSON."""
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(artifact, HavocError, "not valid JSON")


def test_a_folder_without_manifest_is_no_artifact(artifact: Path, tmp_path: Path) -> None:
    """What an interrupted export would leave is said to be none."""
    (artifact / "manifest.json").unlink()
    refused(artifact, HavocError, "not an artifact")
    refused(tmp_path / "nowhere", HavocError, "no such artifact directory")


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_links_are_refused(artifact: Path, tmp_path: Path, kind: str) -> None:
    """External data that is a link to a file elsewhere is never mapped, its right bytes notwithstanding."""
    data = artifact / "model.onnx.data"
    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    data.symlink_to(elsewhere) if kind == "symbolic" else os.link(elsewhere, data)
    refused(artifact, HavocError, f"{kind} link")
    with pytest.raises(HavocError, match=f"{kind} link"):
        DecoderSession.open(artifact)


def test_a_linked_folder_inside_is_refused(artifact: Path, tmp_path: Path) -> None:
    """A listed file behind a linked folder is outside the artifact."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.txt").write_text("x")
    (artifact / "experts").symlink_to(tmp_path / "out")
    edit(artifact, lambda d: d["files"].update({"experts/x.txt": {"sha256": "0" * 64, "num_bytes": 1}}))
    refused(artifact, HavocError, "symbolic link")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "./model.onnx",
        "",
        "a//b",
        "a\0b",
        "my file.txt",
        ".gitattributes",
        "a\n",
        "x" * 201,
    ],
)
def test_a_name_that_leads_out_is_refused(artifact: Path, name: str) -> None:
    """Path traversal by the manifest is a damaged manifest, and so is a name that no record could keep."""
    edit(artifact, lambda d: d["files"].update({name: {"sha256": "0" * 64, "num_bytes": 1}}))
    refused(artifact, HavocError, "not a plain relative path")


def test_a_graph_that_is_not_listed_is_refused(artifact: Path) -> None:
    """Nothing loadable lies in an artifact unhashed."""
    shutil.copy(artifact / "model.onnx", artifact / "other.onnx")
    refused(artifact, HavocError, "other.onnx: not listed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(format="other"), "not the manifest"),
        (lambda d: d.update(format_version=2), "format version 2"),
        (lambda d: d.pop("base"), "damaged manifest"),
        (lambda d: d.update(files=[]), "damaged manifest"),
        (lambda d: d["files"].pop("model.onnx.data"), "model.onnx.data not listed"),
        (lambda d: d["files"]["model.onnx"].update(num_bytes=-1), "num_bytes is -1"),
        (lambda d: d["files"]["model.onnx"].update(num_bytes=True), "num_bytes is True"),
        (lambda d: d["files"]["model.onnx"].update(sha256="zz"), "not a SHA-256"),
        (lambda d: d["mixture"].update(alpha={"math": "x"}), "damaged manifest"),
        (lambda d: d["mixture"].update(alpha={"math": True}), "True is not a finite number"),
        (lambda d: d["mixture"].update(rule="r" * 600), "a text of 600 characters"),
        (lambda d: d["mixture"].update(rule=["delta"]), "not of type str"),
        (lambda d: d["base"].update(random_weights="no"), "'no' is not of type bool"),
        (lambda d: d.update(num_parameters=-5), "num_parameters is -5"),
        (lambda d: d.update(num_parameters="7"), "num_parameters is '7'"),
        (lambda d: d.update(num_parameters=10**40), "num_parameters is 1000"),
        (lambda d: d.update(graph=[["dialect", "standard"]]), "damaged manifest"),
        (lambda d: d["graph"].update({"g" * 600: 1}), "a text of 600 characters"),
        (lambda d: d.update(parity=[]), "is not of type dict"),
        (lambda d: d.update(fingerprint=[["token_ids", 1]]), "is not of type dict"),
    ],
    ids=(
        "format version no-base file-list no-data size bool-size hash alpha bool-alpha rule rule-list randomness "
        "negative-count text-count large-count graph graph-key parity fingerprint"
    ).split(),
)
def test_a_manifest_of_another_shape_is_refused(artifact: Path, change, match: str) -> None:
    """Every field is checked before it is used."""
    edit(artifact, change)
    refused(artifact, HavocError, match)


@pytest.mark.parametrize("target", [b"../../../secret", b"/proc/self/maps", b"a/../../secret/"])
def test_an_external_path_in_a_rehashed_graph_is_refused(artifact: Path, tmp_path: Path, target: bytes) -> None:
    """A forged graph that points its weights elsewhere, with a manifest forged to match, still does not open."""
    content = (artifact / "model.onnx").read_bytes()
    forged = content.replace(b"model.onnx.data", target)
    assert forged != content
    (artifact / "model.onnx").write_bytes(forged)
    (tmp_path / "secret").write_bytes((artifact / "model.onnx.data").read_bytes())
    with pytest.raises(HavocError, match="manifest.json does not list"):
        DecoderSession.open(artifact)


def relocated(artifact: Path, location: str, *, only_first: bool = False) -> None:
    """Let the graph take its weights from `location`, copied there, and forge the manifest to match."""
    home = artifact / location
    home.parent.mkdir(exist_ok=True)
    shutil.copy(artifact / "model.onnx.data", home)
    graph = onnx.load(artifact / "model.onnx", load_external_data=False)
    entries = [entry for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    for entry in entries[:1] if only_first else entries:
        entry.value = location
    relist(artifact, "model.onnx", graph.SerializeToString())


@pytest.mark.parametrize("location", ["weights.bin", "sub/x.data", ".hid", "experts"])
@pytest.mark.parametrize("only_first", [True, False])
def test_weights_in_a_file_that_no_hash_covers(artifact: Path, location: str, *, only_first: bool) -> None:
    """A graph, hashed anew, that reads a file the manifest does not list is neither verified nor opened."""
    relocated(artifact, location, only_first=only_first)
    refused(artifact, HavocError, f"takes weights from '{location}', which manifest.json does not list")
    with pytest.raises(HavocError, match="manifest.json does not list"):
        DecoderSession.open(artifact)


def test_weights_of_a_nested_graph_are_seen(artifact: Path) -> None:
    """In an attribute, a branch of a branch, a function or a sparse tensor: each is a way to another file."""
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="elsewhere.bin")
    inner = onnx.GraphProto(sparse_initializer=[onnx.SparseTensorProto(values=tensor)])
    constant = onnx.NodeProto(attribute=[onnx.AttributeProto(name="value", t=tensor)])
    branch = onnx.NodeProto(attribute=[onnx.AttributeProto(name="then_branch", g=inner)])
    loop = onnx.NodeProto(attribute=[onnx.AttributeProto(graphs=[onnx.GraphProto(node=[branch])])])
    for hidden in (
        onnx.ModelProto(graph=onnx.GraphProto(node=[constant])),
        onnx.ModelProto(graph=onnx.GraphProto(node=[loop])),
        onnx.ModelProto(functions=[onnx.FunctionProto(node=[loop])]),
        onnx.ModelProto(training_info=[onnx.TrainingInfoProto(initialization=inner)]),
    ):
        relist(artifact, "model.onnx", hidden.SerializeToString())
        refused(artifact, HavocError, "takes weights from 'elsewhere.bin'")


def test_every_way_to_a_tensor_is_walked() -> None:
    """The fields that are followed are all those of onnx.proto that lead to a home of weights."""
    reached, waiting = set(), {"ModelProto"}
    while waiting:
        reached |= waiting
        waiting = {kind for name in waiting for kind in external._MESSAGES[name].values()} - reached - {external._ENTRY}
    assert reached == set(external._MESSAGES) > {"TensorProto"}
    for name, fields in external._MESSAGES.items():
        held = {
            field.number: field.message_type.name
            for field in getattr(onnx, name).DESCRIPTOR.fields
            if field.message_type is not None and not field.name.endswith(("metadata_props", "_binding"))
        }
        assert {
            number: kind for number, kind in held.items() if kind in {*external._MESSAGES, external._ENTRY}
        } == fields


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\x3a\xff\x01x", b"\x08" + b"\xff" * 11, b"\x3b", b"\x3a\x02\x2a\x09"]
)
def test_a_graph_that_is_none(artifact: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no graph, hashed anew: one line, by whoever finds it first."""
    relist(artifact, "model.onnx", content)
    with pytest.raises(HavocError, match=r"not an ONNX graph|not the graph"):
        verify_artifact(artifact)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)  # as on a device, which builds no graph
    refused(artifact, HavocError, "not an ONNX graph|ONNX Runtime cannot open it")


def test_alpha_beyond_every_number(artifact: Path) -> None:
    """JSON has no infinity, but numbers that a float64 cannot hold."""
    path = artifact / "manifest.json"
    forged = path.read_text().replace('"alpha": {}', '"alpha": {"math": 1e999}')
    path.write_text(forged)
    assert "1e999" in forged
    refused(artifact, HavocError, "1e999 is too large")


def test_another_model_has_another_fingerprint(artifact: Path) -> None:
    """Logits that are not those stored end in exit code 5, though every hash is right."""
    edit(artifact, lambda d: d["fingerprint"]["logits"].update({"0": 123.0}))
    refused(artifact, IdentityError, "stored logits differ")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_in_the_manifest_never_crashes(artifact: Path, whole: Path, data: st.DataObject) -> None:
    """A fuzzed manifest is read, or refused with a HavocError; nothing else comes out."""
    content = bytearray((whole / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (artifact / "manifest.json").write_bytes(content)
    try:
        verify_hashes(artifact, read_manifest(artifact))
    except HavocError as error:
        assert "\n" not in str(error)


def test_numbers_that_are_none_in_the_manifest(artifact: Path) -> None:
    """A count beyond every number is a damaged manifest; a stored logit that is no number is another model."""
    manifest = artifact / "manifest.json"
    document = json.loads(manifest.read_text())
    for value in (None, [1], "x", 10**400):
        document["fingerprint"]["logits"]["0"] = value
        manifest.write_text(json.dumps(document))
        with pytest.raises(IdentityError, match="stored logits"):
            verify_artifact(artifact)
    manifest.write_text(json.dumps(document | {"num_parameters": 10**400}))
    with pytest.raises(HavocError, match="damaged manifest"):
        read_manifest(artifact)
