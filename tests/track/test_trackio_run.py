"""The real package trackio: what it was told is read back from its SQLite store."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason='trackio is not installed: pip install "havoc-core[trackio]"'
)

LOGS = """
import sys
from pathlib import Path
from havoc_core.track.tracker import About, Tracking
folder, last = Path(sys.argv[1]), int(sys.argv[2])
about = About(folder=folder, config={"phase": 7, "num_experts": 4}, job="run", group="one recipe")
with Tracking(about, ["trackio"]) as tracking:
    for step in range(1, last + 1):
        tracking.log("svf/math/step", step, {"svf/math/loss": 1 / step})
    tracking.log(None, None, {"final/accuracy": 0.9})
    tracking.table("adas/front", ["key", "alpha/math"], [["a", 1.0], ["b", None]])
    artifact = folder / "artifact"
    artifact.mkdir(exist_ok=True)
    (artifact / "model.onnx").write_bytes(b"graph")
    tracking.reference("artifact", "model", artifact, "0" * 64)
"""


def log_into(folder: Path, last: int, **more: str) -> subprocess.CompletedProcess[str]:
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    return subprocess.run(
        [sys.executable, "-c", LOGS, str(folder), str(last)],
        env={**environment, "HOME": str(home), "HF_HUB_OFFLINE": "1", **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told three steps, and then went on to the fifth."""
    path = tmp_path_factory.mktemp("trackio") / "out"
    for last in (3, 5):
        done = log_into(path, last)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def stored(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "trackio" / "agent-forge-v2.db") as store:
        found = store.execute(query).fetchall()
    store.close()
    return found


def test_the_store_holds_each_step_once(folder: Path) -> None:
    """Values beside their axis under its step, in one run, though two processes told them."""
    found = [json.loads(text) for (text,) in stored(folder, "select metrics from metrics order by id")]
    losses = [line for line in found if "svf/math/loss" in line]
    assert losses == [{"svf/math/step": step, "svf/math/loss": 1 / step} for step in (1, 2, 3, 4, 5)]
    assert [line for line in found if "final/accuracy" in line] == [{"final/accuracy": 0.9}]
    (names,) = zip(*stored(folder, "select distinct run_name from metrics"), strict=True)
    assert len(names) == 1
    assert names[0].startswith("phase7_transformer2_adas-")
    steps = stored(folder, "select step, metrics from metrics order by id")
    assert [step for step, text in steps if b"svf/math/loss" in text] == [1, 2, 3, 4, 5]


def test_configuration_table_and_artifact_are_there(folder: Path) -> None:
    """The seed's configuration, the front with its rows, and the artifact by reference."""
    config = json.loads(stored(folder, "select config from configs")[0][0])
    assert (config["phase"], config["num_experts"], config["_Group"]) == (7, 4, "one recipe")
    lines = [json.loads(text) for (text,) in stored(folder, "select metrics from metrics")]
    (table,) = [line["adas/front"] for line in lines if "adas/front" in line]
    assert table["_value"] == [{"key": "a", "alpha/math": 1.0}, {"key": "b", "alpha/math": None}]
    ((name, kind, manifest),) = stored(
        folder, "select a.name, a.type, v.manifest from artifacts a join artifact_versions v on v.artifact_id = a.id"
    )
    assert (name, kind) == ("artifact", "model")
    assert (folder / "artifact").resolve().as_uri() in (manifest if isinstance(manifest, str) else manifest.decode())


def test_nothing_lies_in_the_home_of_the_user(folder: Path) -> None:
    """The store is in the folder of the run."""
    assert [path for path in (folder.parent / "home").rglob("*") if path.is_file()] == []


def test_offline_it_stays_here_whatever_the_environment_says(tmp_path: Path) -> None:
    """A Space or a server that other work of the user logs to is told nothing."""
    done = log_into(tmp_path / "out", 2, TRACKIO_SPACE_ID="nobody/nothing", TRACKIO_SERVER_URL="http://127.0.0.1:9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(stored(tmp_path / "out", "select metrics from metrics")) == 4
