"""The bill of materials is CycloneDX 1.6, lists every file with its hash, and is the same when made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from havoc_core.adapt.expert import Expert
from havoc_core.errors import HavocError
from havoc_core.export.bom import BOM_FILE
from havoc_core.export.huggingface import export_huggingface
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.companions import Licence, licence_of
from havoc_core.export.source import Source
from havoc_core.model.structure import Structure


def bom_of(artifact: Path) -> dict:
    return json.loads((artifact / BOM_FILE).read_text())


def with_files(base: Path, folder: Path, **texts: str) -> Path:
    """A copy of a base with further files: `README_md="..."` is README.md."""
    copy = Path(shutil.copytree(base, folder))
    for name, text in texts.items():
        (copy / name.replace("_md", ".md")).write_text(text)
    return copy


def test_it_is_valid(mixed: Path) -> None:
    """The official schema in its strict form has nothing to say, and the standard's own library reads it."""
    text = (mixed / BOM_FILE).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = Bom.from_json(json.loads(text))
    assert bom.metadata.component is not None
    assert bom.metadata.component.type.value == "machine-learning-model"


def test_it_lists_every_file_with_its_hash(mixed: Path) -> None:
    """All that the manifest lists but the bill itself, with the same SHA-256; the manifest lists the bill."""
    files = {part["name"]: part["hashes"][0]["content"] for part in bom_of(mixed)["components"]}
    listed = {name: file.sha256 for name, file in read_manifest(mixed).files.items()}
    assert BOM_FILE in listed
    assert files == {name: value for name, value in listed.items() if name != BOM_FILE}
    assert {"experts/z_vectors_math.safetensors", "model.onnx.data", "README.md"} <= set(files)


def test_it_names_base_experts_tools_and_parity(mixed: Path, experts: list[Expert]) -> None:
    """What an inventory asks for: ancestors with their hashes, versions of the tools, measured parity."""
    document, manifest = bom_of(mixed), read_manifest(mixed)
    model = document["metadata"]["component"]
    base, *found = model["pedigree"]["ancestors"]
    assert {"name": "havoc:weight_hash", "value": manifest.base_hash} in base["properties"]
    assert [part["name"] for part in found] == ["math expert", "code expert"]
    for part, expert, alpha in zip(found, experts, ("1.2", "0.5"), strict=True):
        properties = {item["name"]: item["value"] for item in part["properties"]}
        assert properties == {"havoc:expert_hash": expert.hash, "havoc:alpha": alpha, "havoc:rule": "delta"}
    tools = {part["name"]: part["version"] for part in document["metadata"]["tools"]["components"]}
    assert tools == manifest.versions
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {metric.get("slice") for metric in metrics} >= {case["name"] for case in manifest.parity["cases"]}


def test_it_is_the_same_when_made_again(source: Source, experts: list[Expert], mixed: Path, tmp_path: Path) -> None:
    """No time, no random number: two exports are equal byte for byte, and another one has another serial."""
    again = export_artifact(source, tmp_path / "again", experts=experts, alpha=(1.2, 0.5), structure=Structure("int8"))
    for name in [*read_manifest(mixed).files, "manifest.json"]:
        assert (again / name).read_bytes() == (mixed / name).read_bytes(), name
    other = export_artifact(source, tmp_path / "other")
    assert bom_of(other)["serialNumber"] != bom_of(mixed)["serialNumber"]


def test_random_weights_are_said(tmp_path: Path) -> None:
    """In the model's limits; and without a directory there is no licence to name."""
    out = export_artifact("pico", tmp_path / "a")
    model = bom_of(out)["metadata"]["component"]
    assert "The weights are random" in model["modelCard"]["considerations"]["technicalLimitations"][0]
    assert "licenses" not in model
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str((out / BOM_FILE).read_text()) is None


# --- the model card and what it says of the licence


@pytest.mark.parametrize(
    ("readme", "licence", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", None, Licence(identifier="apache-2.0")),
        ("---\nlicense: 'llama3.2'\ntags: [x]\n---\n", "text", Licence(identifier="llama3.2", file="LICENSE")),
        ("---\ntags: [x]\n---\nlicense: mit\n", "text", Licence(file="LICENSE")),
        ("---\nlicense: [mit]\n---\n", None, Licence()),
        ("\xff---", None, Licence()),
        (None, None, Licence()),
    ],
    ids=["named", "named-and-text", "text", "list", "no-front-matter", "nothing"],
)
def test_the_licence_is_what_the_base_says(
    tmp_path: Path, readme: str | None, licence: str | None, expected: Licence
) -> None:
    """The front matter of its model card and its LICENSE file; nothing is made up."""
    for name, text in (("README.md", readme), ("LICENSE", licence)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == expected


def test_card_and_bill_carry_the_licence(text_base_directory: Path, tmp_path: Path) -> None:
    """Front matter, section and bill say the same; chat template and licence text come along, in both forms."""
    texts = {
        "README_md": "---\nlicense: apache-2.0\n---\n",
        "LICENSE": "terms",
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "a b",
    }
    base = with_files(text_base_directory, tmp_path / "base", **texts)
    artifact = export_artifact(base, tmp_path / "a")
    huggingface = export_huggingface(base, tmp_path / "hf")
    for folder in (artifact, huggingface):
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
        assert [(folder / name).read_text() for name in ("LICENSE", "merges.txt")] == ["terms", "a b"]
        card = (folder / "README.md").read_text()
        assert "\nlicense: apache-2.0\n" in card.split("---")[1]
        assert "apache-2.0; the text is in `LICENSE`" in card
    assert bom_of(artifact)["metadata"]["component"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]


def test_the_card_tells_how_to_run_it(text_base_directory: Path, mixed: Path, tmp_path: Path) -> None:
    """Commands for HAVOC, code for genai where genai can run it, parity, limits; no licence: it says to ask."""
    card = (export_artifact(text_base_directory, tmp_path / "a", structure=Structure("int4")) / "README.md").read_text()
    for part in ("havoc generate .", "og.Model", "| prefill |", "int4 weights keep", "Its directory names no licence"):
        assert part in card
    assert "og.Model" not in (mixed / "README.md").read_text()


# --- what is carried along


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "tokenizer.json"])
def test_a_link_out_of_the_base_is_not_published(text_base_directory: Path, tmp_path: Path, name: str) -> None:
    """A base from somewhere else cannot make the export copy a private file into what will be published."""
    base = with_files(text_base_directory, tmp_path / "base")
    (tmp_path / "private").write_text((base / "tokenizer.json").read_text())
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "private")
    for export in (export_artifact, export_huggingface):
        with pytest.raises(HavocError, match=f"{name}: a link that leads out"):
            export(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "private"]


def test_the_hubs_cache_is_read(text_base_directory: Path, tmp_path: Path) -> None:
    """There every file is a link into `blobs` beside the snapshots."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in text_base_directory.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    out = export_artifact(snapshot, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (text_base_directory / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()


def test_a_tokenizer_that_is_a_directory_is_named(text_base_directory: Path, tmp_path: Path) -> None:
    """Not taken for a base without text."""
    base = with_files(text_base_directory, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").mkdir()
    with pytest.raises(HavocError, match=r"tokenizer\.json: not a regular file"):
        export_artifact(base, tmp_path / "out")
