"""A live artifact is measured and scored at the mixture that it was opened at, and the record says which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from havoc_core.adapt.expert import Expert
from havoc_core.adapt.svf import compute_basis
from havoc_core.bench.accuracy import AccuracyRun, add_accuracy
from havoc_core.bench.judge.record import Workload
from havoc_core.bench.measure import measure_cost
from havoc_core.bench.report.folder import write_report
from havoc_core.bench.worker import Bench
from havoc_core.errors import HavocError, IdentityError
from havoc_core.export.package import export_artifact
from havoc_core.export.source import open_source
from tests.bench import sample_records as samples

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def live(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(tiny_artifact.parent / "base")
    basis = compute_basis(source.tensors, base_hash=source.hash)
    deltas = {name: torch.full((size,), 0.2) for name, size in basis.num_directions().items()}
    expert = Expert(domain="math", deltas=deltas, base_hash=source.hash, basis_hash=basis.hash)
    out = tmp_path_factory.mktemp("live") / "artifact"
    return export_artifact(source, out, experts=[expert], alpha=(0,), basis=basis, is_live=True)


def test_the_record_says_at_which_alpha(live: Path, small_workload: Workload) -> None:
    """What was asked for, and the manifest's mixture where nothing was; another expert is refused before a process."""
    for asked, found in ((None, {"math": 0.0}), ({"math": 0.5}, {"math": 0.5})):
        record = measure_cost(live, workload=small_workload, num_threads=1, alpha=asked).record
        assert record.subject.alpha == found
    with pytest.raises(HavocError, match="no expert is called code"):
        measure_cost(live, workload=small_workload, num_threads=1, alpha={"code": 1})


def test_the_child_opens_it_at_that_alpha(live: Path, small_workload: Workload) -> None:
    """The process that is timed answers with the mixture of its request."""
    from havoc_core.bench.profiles import PROFILES
    from havoc_core.bench.watched_run import open_session

    with open_session(live, profile=PROFILES["screen"], workload=small_workload, alpha={"math": 0.5}) as session:
        bench = Bench(session.request(0), lambda _: None)
    assert bench.session.alpha == {"math": 0.5}


def test_accuracy_of_another_mixture_is_not_joined() -> None:
    """A record of one mixture takes no score of another."""
    record = samples.record("cpu")
    run = AccuracyRun(
        files=record.subject.files,
        manifest_sha256=record.subject.manifest_sha256,
        tasks={},
        right={},
        alpha={"math": 1.0},
    )
    with pytest.raises(IdentityError, match="scored at alpha"):
        add_accuracy(record, run)


def test_the_line_to_repeat_names_the_mixture(tmp_path: Path) -> None:
    """Only of a live artifact, which is known by its experts' file."""
    files = {"model.onnx": "a" * 64, "model.onnx.data": "b" * 64}
    lines = []
    for name, more in (("plain", {}), ("live", {"experts.data": "c" * 64})):
        folder = tmp_path / name
        samples.record("cpu", subject__files={**files, **more}, subject__alpha={"math": 0.5}).save(
            folder / "record.json"
        )
        write_report(folder)
        lines.append((folder / "report.md").read_text())
    assert "--alpha" not in lines[0]
    assert "--alpha math=0.5 --out DIR" in lines[1]
