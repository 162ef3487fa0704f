"""The file that says an artifact was verified: bound, sealed, and read strictly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from havoc_core.cli import main
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export import rebuilt, verify
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.verification import Verified, load_verified
from havoc_core.storage import sha256_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified") / "artifact"
    assert main(["export", "nano", "--weights", "int4", "--out", str(folder), "--quiet"]) == 0
    return folder


def test_a_verification_is_written_for_the_gate(artifact: Path, tmp_path: Path) -> None:
    """Folded again from its base, and bound to the manifest, whose hash holds every other file's."""
    path = tmp_path / "verified.json"
    assert main(["verify", str(artifact), "--base", "nano", "--out", str(path), "--quiet"]) == 0
    assert load_verified(path) == Verified(read_manifest(artifact).sha256, is_folded=True, is_rebuilt=True)
    names = [check["name"] for check in json.loads(path.read_text())["checks"]]
    assert {"hashes", "fold"} <= set(names)


def test_graphs_are_built_anew_where_that_can_be(
    text_base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no base: the graphs alone are, and where that cannot be not even they."""
    path, folder = tmp_path / "verified.json", tmp_path / "artifact"
    assert main(["export", str(text_base_directory), "--out", str(folder), "--quiet"]) == 0
    for why_not in (None, "onnx-ir is not installed"):
        for module in (verify, rebuilt):
            monkeypatch.setattr(module, "why_not_rebuilt", lambda why_not=why_not: why_not)
        assert main(["verify", str(folder), "--out", str(path), "--quiet"]) == 0
        found = Verified(read_manifest(folder).sha256, is_folded=False, is_rebuilt=why_not is None)
        assert load_verified(path) == found


def test_a_failed_verification_writes_nothing(artifact: Path, tmp_path: Path) -> None:
    """Another base: exit 5, and no file that a gate could take."""
    path = tmp_path / "verified.json"
    assert main(["verify", str(artifact), "--base", "pico", "--out", str(path), "--quiet"]) == 5
    assert not path.exists()


def test_an_edited_verification_is_refused(artifact: Path, tmp_path: Path) -> None:
    """Another hash in it, another form, a wrong type under a right seal: one line each."""
    path = tmp_path / "verified.json"
    assert main(["verify", str(artifact), "--out", str(path), "--quiet"]) == 0
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "manifest_sha256": "0" * 64}))
    with pytest.raises(IdentityError, match="edited after it was written"):
        load_verified(path)
    path.write_text(json.dumps({**document, "checks": 12345}).replace("12345", "1e999"))
    with pytest.raises(HavocError, match="1e999 is too large"):
        load_verified(path)
    path.write_text("[]")
    with pytest.raises(HavocError, match="verification"):
        load_verified(path)
    changed = {key: value for key, value in document.items() if key != "sha256"} | {"is_folded": "yes"}
    path.write_text(json.dumps({**changed, "sha256": sha256_json(changed)}))
    with pytest.raises(HavocError, match="damaged"):
        load_verified(path)
    for is_folded in (True, False):  # written before there was the word
        old = {key: value for key, value in document.items() if key not in {"sha256", "is_rebuilt"}}
        old["is_folded"] = is_folded
        path.write_text(json.dumps({**old, "sha256": sha256_json(old)}))
        assert load_verified(path).is_rebuilt is is_folded
