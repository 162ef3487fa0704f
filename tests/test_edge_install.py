"""The edge install: the wheel in an environment of its own, without torch, does on a device all that a device is for.

It downloads what the wheel depends on, once for this file; without a network it is skipped, and says so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from havoc_core.bench.doctor import LAB_PACKAGES

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = ("Connection refused", "Failed to establish a new connection", "Temporary failure in name resolution")
pytestmark = [
    pytest.mark.alone,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform == "win32", reason="paths as on Unix"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


def sources(folder: Path) -> Path:
    """A copy of what git tracks or would: a wheel built in the checkout leaves its traces there."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the checkout: what belongs into the wheel is what git tracks")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*command, str(sources(folder / "sources"))], check=True, capture_output=True)
    (built,) = folder.glob("havoc_core-*.whl")
    return built


@pytest.fixture(scope="module")
def edge(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the wheel and what its edge asks for, nothing else."""
    return installed(f"{wheel}[edge]", tmp_path_factory.mktemp("edge"))


@pytest.fixture(scope="module")
def gate(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of one that holds the wheel as it is, which judges."""
    return installed(str(wheel), tmp_path_factory.mktemp("gate"))


def installed(requirement: str, folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    command = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", requirement]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    if any(words in done.stderr for words in NO_NETWORK):
        pytest.skip("no network: the packages of the edge install cannot be downloaded")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def havoc(edge: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the installed command in an empty folder, away from the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(edge / "havoc"), *map(str, words)]
        environment = {**os.environ, "PYTHONPATH": "", "PATH": f"{edge}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, exported by the lab install that runs these tests."""
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    command = [sys.executable, "-m", "havoc_core", "export", "nano", "--out", str(folder), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def measured(havoc: Run, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record measured by the edge install."""
    out = tmp_path_factory.mktemp("measured")
    done = havoc("bench", artifact, "--profile", "quick", "--n", "20", "--out", out, "--quiet")
    assert done.returncode in {0, 4}, done.stderr  # 4 where this machine is too busy to measure
    return out / "record.json"


def test_nothing_of_the_lab_is_there(edge: Path, tmp_path: Path) -> None:
    """No torch and no other lab package can be imported; the program runs from the environment, not the checkout."""
    code = (
        "import importlib.util, json, pathlib, havoc_core\n"
        f"found = [name for name in {LAB_PACKAGES!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([found, havoc_core.__file__]))"
    )
    done = subprocess.run([edge / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    found, file = json.loads(done.stdout)
    assert found == []
    assert Path(file).is_relative_to(edge.parent)


def test_the_environment_is_small(edge: Path) -> None:
    """What a device must hold, most of it ONNX Runtime: under 700 MB, where torch alone takes more."""
    files = [path for path in edge.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    num_bytes = sum(path.stat().st_blocks * 512 for path in files)
    print(f"edge install: {num_bytes / 1e6:.0f} MB in {len(files)} files")
    assert num_bytes < 700e6


def test_the_gate_is_small_and_judges_alike(gate: Path, measured: Path, artifact: Path, tmp_path: Path) -> None:
    """Under 60 MB beside pip, no ONNX Runtime, no NumPy: the same verdicts on the same records, word for word."""
    files = [path for path in gate.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    own = [path for path in files if not {"pip", "setuptools"} & set(path.parts)]
    num_bytes = sum(path.stat().st_blocks * 512 for path in own)
    print(f"gate install: {num_bytes / 1e6:.0f} MB in {len(own)} files")
    assert num_bytes < 60e6
    card = ROOT / "reports" / "2026-11-27-smollm2-h200"
    for words in (
        (measured, "--target", "host", "--artifact", artifact),
        (measured, "--target", "gtx1660"),
        (card, "--target", card / "target.toml"),
    ):
        command = [gate / "havoc", "gate", *words, "--json"]
        light = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        lab = subprocess.run(
            [sys.executable, "-m", "havoc_core", *map(str, command[1:])], capture_output=True, text=True
        )
        assert (light.returncode, light.stdout, light.stderr) == (lab.returncode, lab.stdout, lab.stderr)
    for words in (("bench", artifact, "--out", "x"), ("compare", card, card), ("verify", artifact)):
        done = subprocess.run([gate / "havoc", *words], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert 'pip install "havoc-core[edge]"' in done.stderr
    assert subprocess.run([gate / "havoc", "doctor"], capture_output=True, cwd=tmp_path).returncode == 0


def test_artifact_is_verified(havoc: Run, artifact: Path) -> None:
    """Hashes and fingerprint by the runtime alone; it says that folding again needs the lab."""
    done = havoc("verify", artifact)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "verified"
    assert "no torch" in done.stdout


def test_measured_and_judged(havoc: Run, measured: Path, artifact: Path) -> None:
    """The edge measures and gates; its verdict on a record is the lab's, word for word."""
    record = json.loads(measured.read_text())
    assert record["tool"]["git_commit"] is None
    assert "torch" not in record["host"]["versions"]
    assert len(record["samples"]) == 5
    words = ("gate", measured, "--target", "host", "--artifact", artifact, "--json")
    ours = havoc(*words)
    lab = subprocess.run([sys.executable, "-m", "havoc_core", *map(str, words)], capture_output=True, text=True)
    assert (ours.returncode, ours.stdout) == (lab.returncode, lab.stdout)
    assert ours.returncode in {1, 3, 4}
    assert havoc("gate", measured, "--target", "gtx1660").returncode == 5


def test_planned_and_compared(havoc: Run, measured: Path) -> None:
    """What 7b can never do, what a small model may; a record equals itself, and a disturbed one is refused with 4."""
    assert havoc("plan", "7b", "--target", "gtx1660").returncode == 1
    assert havoc("plan", "edge-135m", "--target", "gtx1660").returncode == 0
    same = havoc("compare", measured, measured, "--json")
    if havoc("gate", measured, "--target", "host").returncode == 4:  # this machine was busy when it was measured
        assert same.returncode == 4
        return
    assert same.returncode == 0
    assert {row["change"] for row in json.loads(same.stdout)["metrics"]} <= {"equal", "undecided", "not_measured"}


def test_doctor_says_what_is_missing(havoc: Run) -> None:
    """A diagnosis without torch, which names it among what the lab would add."""
    done = havoc("doctor", "--json")
    lab = next(finding for finding in json.loads(done.stdout)["findings"] if finding["question"].startswith("lab"))
    assert (done.returncode, lab["answer"]) == (0, "no")
    assert "torch" in lab["reason"]


def test_text_and_accuracy(havoc: Run, artifact: Path) -> None:
    """The artifact answers and is scored."""
    assert havoc("generate", artifact, "--prompt", "What is 3 + 4?").returncode == 0
    scored = havoc("eval", artifact, "--domain", "math", "--n", "20", "--quiet", "--json")
    assert json.loads(scored.stdout)["accuracy"]["math"]["num_rows"] == 20


OWN_TASK = """
kind = "choice"
metric = "acc"
[data]
path = "sums.{ending}"
problem = ["q"]
splits = {{ gate = "data" }}
[prompt]
template = "Question: {{{{ q }}}}\\nAnswer:"
[choice]
choices = "[a, b]"
label = "right"
"""


def test_a_task_of_ones_own_is_scored(havoc: Run, artifact: Path, tmp_path: Path) -> None:
    """Rows in jsonl need nothing more; parquet names the extra that reads it, in one line."""
    rows = [{"q": f"{n} + 1", "a": str(n + 1), "b": str(n + 7), "right": 0} for n in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.parquet").write_bytes(b"PAR1")
    for ending in ("jsonl", "parquet"):
        (tmp_path / f"{ending}.toml").write_text(OWN_TASK.format(ending=ending))
    scored = havoc("eval", artifact, "--task", tmp_path / "jsonl.toml", "--quiet", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["accuracy"]["jsonl"]["num_rows"] == 12
    refused = havoc("eval", artifact, "--task", tmp_path / "parquet.toml", "--quiet")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert 'pip install "havoc-core[data]"' in refused.stderr


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("report", ("report", "{run}")),
        ("lab", ("export", "nano", "--out", "x")),
        ("lab", ("train", "nano", "--domain", "math", "--out", "x")),
    ],
    ids=["report", "export", "train"],
)
def test_what_is_missing_is_asked_for_in_one_line(
    havoc: Run, measured: Path, extra: str, words: tuple[str, ...]
) -> None:
    """A verb that needs more than the edge names the package and what brings it: exit 2, nothing written."""
    done = havoc(*(word.format(run=measured.parent) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f'pip install "havoc-core[{extra}]"' in done.stderr
    assert [path.name for path in measured.parent.iterdir()] == ["record.json"]
