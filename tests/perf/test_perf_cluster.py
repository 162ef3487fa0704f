"""Candidates a second scored by four loopback workers over one: the same search, base, rows and machine, in turns."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.candidate import Candidate
from havoc_core.adapt.expert import Expert, expert_path, save_expert
from havoc_core.cluster.address import Address, TlsFiles
from havoc_core.cluster.fleet import Fleet
from havoc_core.cluster.measurer import FleetMeasurer
from havoc_core.config import Recipe
from havoc_core.cores import num_physical_cores
from havoc_core.errors import HavocError
from havoc_core.jobs import Place
from havoc_core.measuring import bind
from havoc_core.model.checkpoint import load_base
from havoc_core.model.structure import Structure
from havoc_core.progress import SILENT

NUM_CANDIDATES, NUM_ROUNDS, GOAL = 16, 3, 1.8
RECIPE = Recipe.model_validate(
    {"experts": {"tasks": ["math", "code"], "num_validation_rows": 20}, "search": {"num_rows": 100}}
)


@contextlib.contextmanager
def workers(number: int, folder: Path) -> Iterator[Fleet]:
    """A scheduler on loopback with so many workers that score."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    processes = [subprocess.Popen([sys.executable, *scheduler], **quiet)]
    command = [sys.executable, "-m", "havoc_core", "worker", address, "--store", str(folder / "store")]
    processes += [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet) for _ in range(number)]
    try:
        with _connected(address, number) as fleet:
            yield fleet
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def _connected(address: str, number: int) -> Fleet:
    """Connect once so many workers are there."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        with contextlib.suppress(HavocError):
            fleet = Fleet.connect(Address.parse(address), TlsFiles())
            if len(fleet.workers) == number:
                return fleet
            fleet.close()
        time.sleep(0.5)
    pytest.fail(f"{number} workers did not start within 120 s")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cluster")
    basis = base_basis(load_base("nano"), folder, SILENT)
    for seed, name in enumerate(("math", "code")):
        generator = torch.Generator().manual_seed(seed)
        deltas = {
            matrix: 0.1 * torch.randn(part.num_directions, generator=generator)
            for matrix, part in basis.matrices.items()
        }
        save_expert(Expert(domain=name, deltas=deltas, base_hash=basis.base_hash, basis_hash=basis.hash), folder)
        assert expert_path(folder, name).exists()
    return Place(RECIPE, folder, folder, num_threads=1)


@pytest.mark.skipif(num_physical_cores() < 2, reason="one core cannot do the work of two")
def test_four_workers_against_one(benchmark: Any, row: Callable[..., None], place: Place) -> None:
    """Two cores score nearly twice as many candidates; the answers are the same."""
    pytest.importorskip("distributed")
    seconds: dict[int, list[float]] = {1: [], 4: []}
    answers: dict[int, Any] = {}
    base, bound = load_base("nano"), bind(RECIPE)

    def scored(number: int, measurer: FleetMeasurer, start: int) -> None:
        alphas = [(0.01 * (start + place), 1.0) for place in range(NUM_CANDIDATES)]
        began_s = time.perf_counter()
        answers[number] = list(measurer.answers([Candidate(alpha, Structure()) for alpha in alphas], sample=0))
        seconds[number].append(time.perf_counter() - began_s)

    def rounds() -> None:
        for number in (1, 4):
            with workers(number, place.out) as fleet, FleetMeasurer(fleet, place, base, bound=bound) as measurer:
                scored(number, measurer, 0)  # every worker reads base and rows once
                seconds[number].clear()
                for turn in range(NUM_ROUNDS):
                    scored(number, measurer, 100 * turn)

    benchmark.pedantic(rounds, rounds=1, iterations=1)
    assert answers[1] == answers[4]
    ratio = min(seconds[1]) / min(seconds[4])
    row("candidates scored a second, four loopback workers over one", ratio, goal=GOAL)
