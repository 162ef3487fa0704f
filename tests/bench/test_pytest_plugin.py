"""The gate in somebody else's test run: red for everything but a proven pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.gate import hash_artifact
from havoc_core.export.runtime.artifact import MANIFEST
from havoc_core.export.runtime.verification import Verified, save_verified
from tests.bench import sample_records as samples

pytestmark = pytest.mark.alone

SUITE = """
def test_release(havoc_gate):
    havoc_gate()

def test_latency_alone(havoc_gate):
    havoc_gate("prefill_ms")

def test_a_limit_there_is_not(havoc_gate):
    havoc_gate("prefil_ms")
"""


def run(folder: Path, *words: str | Path, suite: str = SUITE) -> tuple[dict[str, str], str]:
    """Run the suite above in a fresh interpreter; return each test's outcome and the output."""
    (folder / "test_suite.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [*command, *map(str, words), "test_suite.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    outcomes = {}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" test_suite.py::")
        if word in {"PASSED", "FAILED", "ERROR"}:
            outcomes[rest.partition(" ")[0]] = word
    return outcomes, done.stdout


def saved(folder: Path, **changes: object) -> Path:
    cpu = identify_cpu().model_dump(mode="json")
    samples.record("cpu", device__cpu=cpu, device__name=cpu["name"], **changes).save(folder / "record.json")
    return folder / "record.json"


def test_a_good_record_is_green(tmp_path: Path) -> None:
    """Every limit and a single one pass; a limit that does not exist is red."""
    outcomes, _ = run(tmp_path, "--havoc-record", saved(tmp_path), "--havoc-target", "host")
    assert outcomes == {"test_release": "PASSED", "test_latency_alone": "PASSED", "test_a_limit_there_is_not": "FAILED"}


def test_a_missed_limit_is_red_where_it_counts(tmp_path: Path) -> None:
    """Missed accuracy fails the whole and not the latency; the table is in the output."""
    outcomes, out = run(tmp_path, "--havoc-record", saved(tmp_path, accuracy__math__num_right=700))
    assert outcomes["test_release"] == "FAILED"
    assert outcomes["test_latency_alone"] == "PASSED"
    assert "FAIL on host" in out


def test_one_limit_tells_of_itself(tmp_path: Path) -> None:
    """The test of one limit shows its line and its verdict, not the whole table; the target has its title."""
    suite = SUITE.replace("prefill_ms", "accuracy/math")
    outcomes, out = run(tmp_path, "--havoc-record", saved(tmp_path, accuracy__math__num_right=700).parent, suite=suite)
    assert outcomes["test_latency_alone"] == "FAILED"
    own = out.partition("_ test_latency_alone _")[2].partition("_ test_a_limit")[0]
    assert "accuracy, math, share right: FAIL on host (this machine's CPU)" in own
    assert "decode" not in own


@pytest.mark.parametrize(
    "changes", [{"samples": []}, {"purpose": "screen"}, {"evidence": "projected"}], ids=["empty", "screen", "projected"]
)
def test_no_data_is_not_green(tmp_path: Path, changes: dict[str, object]) -> None:
    """Undecided, invalid and projected records fail."""
    outcomes, _ = run(tmp_path, "--havoc-record", saved(tmp_path, **changes))
    assert outcomes["test_release"] == outcomes["test_latency_alone"] == "FAILED"


def test_an_artifact_is_verified_where_its_graphs_were_not_built_anew(tmp_path: Path, tiny_artifact: Path) -> None:
    """Red without what `havoc verify` found, green with it."""
    files = hash_artifact(tiny_artifact)
    manifest_sha256 = files.pop(MANIFEST)
    subject = {"subject__files": files, "subject__manifest_sha256": manifest_sha256, "subject__is_graph_rebuilt": None}
    words = ["--havoc-record", saved(tmp_path, **subject), "--havoc-artifact", tiny_artifact]
    outcomes, out = run(tmp_path, *words)
    assert outcomes["test_release"] == outcomes["test_latency_alone"] == "FAILED"
    assert "havoc verify" in out
    save_verified(tmp_path / "verified.json", Verified(manifest_sha256, is_folded=False, is_rebuilt=True), [])
    outcomes, _ = run(tmp_path, *words, "--havoc-verified", tmp_path / "verified.json")
    assert outcomes["test_release"] == outcomes["test_latency_alone"] == "PASSED"


def test_nothing_to_judge_is_red(tmp_path: Path) -> None:
    """Without a record or an artifact the fixture fails and says what to give."""
    outcomes, out = run(tmp_path)
    assert set(outcomes.values()) == {"ERROR"}
    assert "--havoc-record FILE" in out


def test_workers_do_not_measure(tmp_path: Path, tiny_artifact: Path) -> None:
    """Beside other workers only records are judged: the measurement is refused, not made."""
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_configure(config): config.workerinput = {'workerid': 'gw0'}\n"
    )
    outcomes, out = run(tmp_path, "-p", "no:benchmark", "--havoc-artifact", tiny_artifact)
    assert set(outcomes.values()) == {"ERROR"}
    assert "parallel workers" in out


def test_pytest_benchmark_learns_the_gpu(tmp_path: Path) -> None:
    """`machine_info` tells which card, or why none, beside what pytest-benchmark knows."""
    (tmp_path / "test_speed.py").write_text("def test_sum(benchmark): benchmark(sum, [1, 2])\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    command += [
        "--benchmark-json",
        "out.json",
        "--benchmark-max-time",
        "0.01",
        "--benchmark-min-rounds",
        "1",
        "test_speed.py",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    gpu = json.loads((tmp_path / "out.json").read_text())["machine_info"]["gpu"]
    assert gpu["name"] or gpu["reason"]
