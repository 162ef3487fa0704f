"""A worker gets each content once, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from havoc_core.cluster.store import Store, pieces_of, tree_of
from havoc_core.cluster.worker_requests import StoredFile, Tree
from havoc_core.errors import HavocError, MeasurementError


def folder_with(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def fill(store: Store, tree: Tree, sources: dict[str, Path]) -> int:
    """Send what is lacking; the number of contents sent."""
    files = {file.sha256: file for file in tree.files.values()}
    lacking = store.lacking(tree)
    for sha256 in lacking:
        for start, data in pieces_of(sources[sha256]):
            store.keep(files[sha256], start, data)
    return len(lacking)


def test_a_folder_arrives_as_it_was_and_its_contents_once(tmp_path: Path) -> None:
    """Two names for one content are sent once, a second folder only what is new in it; long files come in pieces."""
    store = Store(tmp_path / "store")
    first = folder_with(tmp_path / "first", a=b"same", b=b"same", c=b"x" * 9_000_000, empty=b"")
    tree, sources = tree_of({"base": first})
    assert fill(store, tree, sources) == 3
    arrived = store.folder_of(tree, is_linked=True) / "base"
    assert {path.name: path.read_bytes() for path in arrived.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }
    second, more = tree_of({"base": first, "one.txt": folder_with(tmp_path / "second", d=b"new") / "d"})
    assert fill(store, second, more) == 1
    assert fill(Store(tmp_path / "store"), second, more) == 0
    assert store.folder_of(second, is_linked=True).joinpath("one.txt").read_bytes() == b"new"


def test_an_artifact_has_files_of_its_own(tmp_path: Path) -> None:
    """A file with a second name could be changed by it while it is measured, so an artifact is copied."""
    store = Store(tmp_path / "store")
    tree, sources = tree_of({".": folder_with(tmp_path / "artifact", model=b"graph")})
    fill(store, tree, sources)
    assert (store.folder_of(tree, is_linked=False) / "model").stat().st_nlink == 1
    assert (store.folder_of(tree, is_linked=True) / "model").stat().st_nlink == 2


def test_other_bytes_than_the_hash_says_are_refused(tmp_path: Path) -> None:
    """A file that changed while it was sent is not kept, and nothing is left of it."""
    store = Store(tmp_path / "store")
    file = StoredFile(sha256="0" * 64, num_bytes=3)
    with pytest.raises(MeasurementError, match="changed while it was sent"):
        store.keep(file, 0, b"abc")
    assert store.lacking(Tree({"a": file})) == ["0" * 64]
    assert list((tmp_path / "store" / "files").iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "a//b", "a\\b"])
def test_no_path_leads_out_of_the_store(name: str) -> None:
    """Whoever can send a tree cannot write elsewhere by it."""
    with pytest.raises(HavocError, match="not a path inside a folder"):
        Tree({name: StoredFile(sha256="0" * 64, num_bytes=0)})


def test_a_content_is_named_by_a_hash_alone(tmp_path: Path) -> None:
    """A hash that is a path is refused too."""
    with pytest.raises(HavocError, match="not a SHA-256"):
        Store(tmp_path / "store").keep(StoredFile(sha256="../x", num_bytes=1), 0, b"x")
