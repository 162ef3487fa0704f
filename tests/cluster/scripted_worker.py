"""`havoc worker` whose answers and measurements are scripted: the rest, training, identity and lease too, is real.

A measurement is a child process that writes "begin" and "end" with its device and the time into SCRIPTED_LOG, and
lives on when its worker is killed. Answers follow from alpha and structure, costs from the artifact's size. Once there
is a file slow-DEVICE beside SCRIPTED_LOG, that device measures half the speed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import havoc_core
from havoc_core.children import start_process
from havoc_core.cli import main
from havoc_core.cluster import commands, duties
from havoc_core.processes import Workers
from havoc_core.storage import sha256_json

LOG = Path(os.environ["SCRIPTED_LOG"])
SECONDS = os.environ.get("SCRIPTED_SECONDS", "0.1")
CHILD = """
import sys, time
log, device, seconds = sys.argv[1:]
def say(word):
    with open(log, "a") as file:
        file.write(f"{word} {device} {time.monotonic_ns()}\\n")
say("begin")
time.sleep(float(seconds))
say("end")
"""


def measured(artifact: Path, *, device: Any, **_: object) -> Any:
    """Let a child play a measurement of the artifact."""
    child = start_process([sys.executable, "-S", "-c", CHILD, str(LOG), uuid_of(device), SECONDS])
    child.wait()
    size = sum(path.stat().st_size for path in artifact.iterdir())
    slow = 2.0 if LOG.with_name(f"slow-{uuid_of(device)}").exists() else 1.0
    return SimpleNamespace(
        prefill_ms=slow * size / 1e5, decode_tok_per_s=1e9 / size / slow, peak_bytes=size, disturbance=""
    )


def uuid_of(device: Any) -> str:
    return device.gpu.nvml.uuid_sha256 if device.gpu else "cpu"


class ScriptedModel:
    """Stands for the child process that scores."""

    def __init__(self, _num_processes: int, num_threads: int) -> None:
        self.num_threads = num_threads

    def end(self) -> None: ...

    def run(self, function: str, requests: Sequence[Any], **listen: Any) -> Iterator[Any]:
        if function == ".jobs:train":
            with Workers(1, self.num_threads) as child:
                yield from child.run(function, requests, **listen)
            return
        for request in requests:
            place = request.mixtures.place
            assert (place.out / "basis.safetensors").is_file()
            assert all((place.experts / f"z_vectors_{name}.safetensors").is_file() for name in ("math", "code"))
            time.sleep(float(SECONDS))
            if function == ".jobs:diverge":
                yield [{"math": sum(alpha) / 100, "code": alpha[0] / 100} for alpha in request.alphas]
                continue
            assert place.recipe.model.base == "nano" or Path(place.recipe.model.base, "config.json").is_file()
            asked = [list(request.alpha), request.structure, request.rows.start]
            yield {
                task: f"{int(sha256_json([task, *asked])[:8], 16):032b}"[: request.rows.size] for task in request.tasks
            }


if __name__ == "__main__":
    duties.measure_cost = measured
    duties.Workers = ScriptedModel
    if version := os.environ.get("SCRIPTED_VERSION"):
        commands.__version__ = version
    assert Path(havoc_core.__file__).parent == Path(__file__).parents[2]
    sys.exit(main(["worker", *sys.argv[1:]]))
