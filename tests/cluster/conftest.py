"""A real scheduler and real workers on loopback; two cards that a simulated NVML shows."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from havoc_core.model.checkpoint import BUNDLED_NANO
from tests.random_experts import write_experts

HERE = Path(__file__).parent
SIMULATOR = HERE.parent / "bench" / "nvml_simulator"
COMPILER = shutil.which("gcc") or shutil.which("cc")
UUIDS = ("0a1b2c3d4e5f60718293a4b5c6d7e8f9", "1a1b2c3d4e5f60718293a4b5c6d7e8f9")
RECIPE = """
[experts]
tasks = ["math", "code"]
num_validation_rows = 2
[search]
population = 6
generations = 2
num_rows = 8
weight_formats = ["fp32", "int8"]
on_this_machine = true
"""


@dataclass
class Command:
    """A command of havoc under way: where it writes, and what it says."""

    out: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def journal(self) -> Path:
        return self.out / "search" / "journal.jsonl"

    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def wait_until(self, words: str) -> None:
        """Wait until the command has said these words."""
        while words not in self.said:
            assert self.is_running(), self.said
            time.sleep(0.05)


@dataclass
class Cluster:
    """A scheduler, the workers that a test has started, and where their scripted measurements are logged."""

    address: str
    folder: Path
    libraries: Path | None
    scheduler: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / "measured.log"

    def worker(
        self,
        *,
        card: int | None = None,
        name: str = "",
        version: str = "",
        seconds: float = 0.1,
        words: Sequence[str] = (),
        is_real: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a worker that scores; with `card` (0 or 1) it measures on that simulated card, too.

        Unless it `is_real`, its answers and measurements are scripted.
        """
        environment = os.environ | {"SCRIPTED_LOG": str(self.log), "SCRIPTED_SECONDS": str(seconds)}
        environment |= {"SCRIPTED_VERSION": version, "TMPDIR": str(self.folder)}
        environment["OMP_NUM_THREADS"] = "1"
        if card is not None:
            if self.libraries is None:
                pytest.skip("the simulated cards need a C compiler and Linux")
            environment |= {"LD_LIBRARY_PATH": str(self.libraries), "HAVOC_NVML_SCENARIO": str(self._scenario(card))}
        program = ["-m", "havoc_core", "worker"] if is_real else [HERE / "scripted_worker.py"]
        command = [sys.executable, *program, self.address, "--store", self.folder / f"store{name}"]
        command += [*words, *(["--measures"] if card is not None else [])]
        with (self.folder / "workers.log").open("ab") as log:
            worker = subprocess.Popen(list(map(str, command)), env=environment, stderr=log, start_new_session=True)
        self.workers.append(worker)
        return worker

    def _scenario(self, card: int) -> Path:
        path = self.folder / f"card{card}.scenario"
        uuid = UUIDS[card]
        text = (SIMULATOR / "gtx1660.scenario").read_text()
        dashed = "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))
        first = "-".join((UUIDS[0][:8], UUIDS[0][8:12], UUIDS[0][12:16], UUIDS[0][16:20], UUIDS[0][20:]))
        path.write_text(text.replace(first, dashed).replace(UUIDS[0], uuid))
        return path

    def wait_for(self, num_workers: int) -> None:
        """Wait until so many workers have said that they serve."""
        deadline_s = time.monotonic() + 120
        while self.said().count("havoc worker: ") < num_workers:
            assert time.monotonic() < deadline_s, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        path = self.folder / "workers.log"
        return path.read_text() if path.exists() else ""

    def search(self, out: Path, experts: Path, *words: str, recipe: str = RECIPE) -> Command:
        """Start `havoc search` on this cluster."""
        path = self.folder / "recipe.toml"
        path.write_text(recipe)
        found = ["--experts", experts, "--target", "gtx1660", "--recipe", path]
        return self.start(out, "search", BUNDLED_NANO, *found, *words)

    def start(self, out: Path, *words: object) -> Command:
        """Start a command of havoc on this cluster."""
        line = [sys.executable, "-m", "havoc_core", *words, "--cluster", self.address, "--out", out]
        log = out.with_name(f"{out.name}.said")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            process = subprocess.Popen(list(map(str, line)), stdout=file, stderr=file, env=environment)
        self.commands.append(Command(out, log, process))
        return self.commands[-1]

    def restart(self) -> None:
        """Start a scheduler at the same address."""
        self.scheduler = start_scheduler(self.address)

    def end(self) -> None:
        for process in [*(command.process for command in self.commands), *self.workers, self.scheduler]:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """NVML and the CUDA driver, simulated; None where there is no compiler for them."""
    if COMPILER is None or sys.platform != "linux":
        return None
    folder = tmp_path_factory.mktemp("simulator")
    for source, name in (("nvml.c", "libnvidia-ml.so.1"), ("cuda.c", "libcuda.so.1")):
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        subprocess.run([COMPILER, *flags, "-o", folder / name, SIMULATOR / source], check=True)
    return folder


@contextlib.contextmanager
def running_cluster(folder: Path, libraries: Path | None, scheme: str = "tcp", *words: str) -> Iterator[Cluster]:
    """A scheduler on loopback; it, its workers and their commands are ended afterwards."""
    pytest.importorskip("distributed")
    folder.mkdir(exist_ok=True)
    address = f"{scheme}://127.0.0.1:{free_port()}"
    found = Cluster(address, folder, libraries, start_scheduler(address, *words))
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
def start_cluster(tmp_path: Path, libraries: Path | None) -> Callable[..., contextlib.AbstractContextManager[Cluster]]:
    """How a test starts a scheduler of its own: with a scheme, and words for `dask scheduler`."""
    return functools.partial(running_cluster, tmp_path / "cluster", libraries)


@pytest.fixture
def cluster(tmp_path: Path, libraries: Path | None) -> Iterator[Cluster]:
    """A scheduler on loopback, without TLS."""
    with running_cluster(tmp_path / "cluster", libraries) as found:
        yield found


@pytest.fixture(scope="session")
def quiet_journal(tmp_path_factory: pytest.TempPathFactory, libraries: Path | None, two_experts: Path) -> bytes:
    """The journal of a search whose workers all live, with the seed 0: what every other one must come to."""
    folder = tmp_path_factory.mktemp("quiet")
    with running_cluster(folder, libraries) as found:
        found.worker(card=0)
        found.wait_for(1)
        search = found.search(folder / "out", two_experts)
        assert search.wait() == 0, search.said
    return search.journal.read_bytes()


def start_scheduler(address: str, *words: str) -> subprocess.Popen[bytes]:
    host, _, port = address.partition("://")[2].rpartition(":")
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", host, "--port", port, "--no-dashboard"]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random experts of nano for math and code."""
    return write_experts(tmp_path_factory.mktemp("experts"), ("math", "code"))
