"""The real package wandb, offline: its run file is read back; online with a key that a server refuses."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.track import wandb_files as files

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason='wandb is not installed: pip install "havoc-core[wandb]"'
)

LOGS = """
import sys
from pathlib import Path
from havoc_core.track.tracker import About, Tracking
folder = Path(sys.argv[1])
config = {"phase": 7, "num_experts": 4, "adas_generations": 100, "adas_population": 50}
about = About(folder=folder, config=config, job="run", group="one recipe", online=sys.argv[2] == "online")
with Tracking(about, ["wandb"]) as tracking:
    for step in (1, 2, 3):
        tracking.log("svf/math/step", step, {"svf/math/loss": 1 / step, "svf/math/accuracy": step / 4})
    for generation in (0, 1):
        values = {"adas/generation": generation, "adas/pareto_front_size": 3, "adas/best_accuracy": 0.5}
        tracking.log("adas/generation", generation, values)
    tracking.log(None, None, {"mixture/math": 1.2, "final/accuracy": 0.9})
    tracking.table("adas/front", ["key", "alpha/math", "is_chosen"], [["a", 1.0, True], ["b", None, False]])
    artifact = folder / "artifact"
    artifact.mkdir(exist_ok=True)
    (artifact / "model.onnx").write_bytes(b"graph")
    tracking.reference("artifact", "model", artifact, "0" * 64)
"""


def log_into(folder: Path, way: str = "offline", **more: str) -> subprocess.CompletedProcess[str]:
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", LOGS, str(folder), way],
        env={**environment, "HOME": str(home), **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wandb") / "out"
    done = log_into(path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def test_project_name_and_configuration_are_the_seeds(folder: Path) -> None:
    """As seed 003 writes them, with a group and the verb as the kind of job."""
    (run,) = files.of_kind(folder, "run")
    assert (run.project, run.display_name) == ("agent-forge-v2", "phase7_transformer2_adas")
    assert (run.run_group, run.job_type) == ("one recipe", "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    seed = {"phase": 7, "num_experts": 4, "adas_generations": 100, "adas_population": 50}
    assert {name: config.get(name) for name in seed} == seed


def test_the_run_file_holds_what_was_logged(folder: Path) -> None:
    """Every value beside its axis, in order."""
    lines = [line for line in files.history(folder) if "adas/front/nrows" not in line]
    assert lines == [
        *({"svf/math/step": step, "svf/math/loss": 1 / step, "svf/math/accuracy": step / 4} for step in (1, 2, 3)),
        *({"adas/generation": n, "adas/pareto_front_size": 3, "adas/best_accuracy": 0.5} for n in (0, 1)),
        {"mixture/math": 1.2, "final/accuracy": 0.9},
    ]


def test_metrics_are_defined_by_the_catalogue(folder: Path) -> None:
    """Against their axis, with the better end as the summary."""
    metrics = {metric.name: metric for metric in files.of_kind(folder, "metric")}
    assert metrics["svf/math/loss"].step_metric == "svf/math/step"
    assert metrics["svf/math/loss"].summary.min
    assert metrics["svf/math/accuracy"].summary.max
    assert metrics["adas/best_accuracy"].step_metric == "adas/generation"
    assert metrics["final/accuracy"].step_metric == ""
    assert metrics["svf/math/step"].options.hidden


def test_the_front_is_a_table(folder: Path) -> None:
    """Its columns and rows lie in the run's own folder."""
    (path,) = folder.glob("wandb/offline-run-*/files/media/table/adas/front_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["key", "alpha/math", "is_chosen"]
    assert table["data"] == [["a", 1.0, True], ["b", None, False]]


def test_the_artifact_is_a_reference(folder: Path) -> None:
    """Name, kind, where it lies and what it hashes to; its bytes stay where they are."""
    (artifact,) = [one for one in files.of_kind(folder, "artifact") if one.type == "model"]
    (entry,) = artifact.manifest.contents
    assert (artifact.name, entry.path, entry.size) == ("artifact", "model.onnx", 5)
    assert entry.ref == (folder / "artifact" / "model.onnx").resolve().as_uri()
    assert entry.digest


def test_nothing_is_said_of_machine_and_user(folder: Path) -> None:
    """Neither host name nor command line nor environment, and nothing lies in the user's home."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    (run,) = files.of_kind(folder, "run")
    assert run.host != socket.gethostname()
    assert not files.of_kind(folder, "environment")
    assert b"havoc_core.track" not in data
    assert [one for one in (folder.parent / "home").rglob("*") if one.is_file() and "logs" not in one.parts] == []


def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path) -> None:
    """And nothing is told twice: the second start adds no run where nothing is new."""
    for _ in range(2):
        assert log_into(tmp_path / "out").returncode == 0
    assert len(list((tmp_path / "out").glob("wandb/offline-run-*"))) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as W&B does to a key that it does not know."""

    def do_POST(self) -> None:
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("key", ["0123456789" * 4, "short", ""], ids=["unknown", "short", "none"])
def test_a_wrong_key_is_one_line_and_nothing_is_lost(key: str, refusing_server: str, tmp_path: Path) -> None:
    """The work ends as it would; the file holds every point, and told offline later the tracker gets them all."""
    keys = {"WANDB_API_KEY": key} if key else {}
    done = log_into(tmp_path / "out", "online", WANDB_BASE_URL=refusing_server, **keys)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1), done.stderr
    assert done.stderr.startswith("havoc: warning: wandb failed and gets no more metrics (")
    if key:
        assert key not in done.stderr
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 6
    assert log_into(tmp_path / "out").returncode == 0
    assert len(files.history(tmp_path / "out")) == 7
