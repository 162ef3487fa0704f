"""Measure two sides in turn: fresh processes, each with its side's own code and artifact, who begins alternates.

A side may be another checkout: then `python` is an interpreter that imports `havoc_core` from there, and the requests
are in the form of this one. What both do in a turn is the same short work on the CPU, on one thread unless told
otherwise: with more, threads that wait for each other spin, and CPU time is no witness beside neighbours any more.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..errors import MeasurementError
from ..export.child import run_worker
from ..progress import SILENT
from .device import CPU_PROVIDER
from .paired import Block
from .profiles import TURN
from .schema import ProcessSamples, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..progress import Progress

DEFAULT_BLOCKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two that are compared: what it is called, its artifact, and the interpreter that imports its code."""

    name: str
    artifact: Path
    python: Path = Path(sys.executable)


def measure_in_turn(
    old: Side,
    new: Side,
    *,
    num_blocks: int = DEFAULT_BLOCKS,
    budget_s: float | None = None,
    workload: Workload | None = None,
    provider: str = CPU_PROVIDER,
    num_threads: int = 1,
    progress: Progress = SILENT,
) -> list[Block]:
    """Measure `num_blocks` blocks, or as many as end within `budget_s` seconds, whatever they find.

    Raises what `take_turn` raises.
    """
    asked = {"workload": workload, "provider": provider, "num_threads": num_threads}
    blocks: list[Block] = []
    with progress.stage(f"measure {old.name} and {new.name} in turn", num_blocks, unit="blocks") as stage:
        for place in _places(num_blocks, budget_s):
            order = (old, new) if place % 2 == 0 else (new, old)
            found = {side.name: take_turn(side, place, **asked) for side in order}
            blocks.append(Block(old=found[old.name], new=found[new.name]))
            stage.advance()
    return blocks


def _places(num_blocks: int, budget_s: float | None) -> Iterator[int]:
    """Count blocks while the longest one so far would still end in time."""
    began = before = time.monotonic()
    longest_s = 0.0
    for place in range(num_blocks):
        if budget_s is not None and before - began + longest_s > budget_s:
            return
        yield place
        now = time.monotonic()
        longest_s, before = max(longest_s, now - before), now


def take_turn(
    side: Side,
    process: int,
    *,
    workload: Workload | None = None,
    provider: str = CPU_PROVIDER,
    num_threads: int = 1,
) -> ProcessSamples:
    """Time one fresh process of a side.

    An error of the side is raised under its name; samples that cannot be read are a `MeasurementError`.
    """
    request = {
        "task": "latency",
        "artifact": str(side.artifact.absolute()),
        "provider": provider,
        "num_threads": num_threads,
        "workload": (workload or Workload()).model_dump(mode="json"),
        "plan": TURN.plan(),
        "process": process,
    }
    result = run_worker(request, timeout_s=TURN.timeout_s, python=side.python)
    return _read(side, result)


def _read(side: Side, result: dict[str, Any]) -> ProcessSamples:
    """Read what a side answered; what only its code knows is left out."""
    known = {name: value for name, value in result["samples"].items() if name in ProcessSamples.model_fields}
    try:
        return ProcessSamples.model_validate(known, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MeasurementError(
            f"{side.name} answers in another form than this code reads: {where}: {first['msg']}"
        ) from error
