"""Measure two sides in lockstep: a fresh process of each side, with turns of about 50 ms; then a fresh pair again.

The state of the machine (other programs, caches, clocks) changes within seconds, so two turns in a row meet the same
state. One process may be slower than the next for its whole life, so several pairs of processes run. A side may be
another checkout: then `python` is an interpreter that finds `havoc_core` there, timed by this checkout's `ruler.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HavocError, MeasurementError
from ..export.runtime.child import death, isolation, started
from ..export.runtime.devices import CPU_PROVIDER
from ..messages import Answer, read
from ..progress import SILENT
from .engines import ENGINES
from .judge.paired import FIRST, LOAD, PEAK, PREFILL, STEP, Block, Turn
from .judge.schema import Workload
from .own_process import peak_rss_of
from .ruler import RulerEpisode, RulerReady, RulerRequest, TimedCalls

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence

    from ..progress import Progress

    Hear = Callable[[Sequence[int], Sequence[int]], None]

NUM_BLOCKS = 8
NUM_EXCHANGES = 20
FEWEST_EXCHANGES = 6
SHARE = 0.9  # share of a block's budget: processes also need time to start and end
NUM_WARMUPS = 3
TIMEOUT_S = 300.0  # of one block
_QUANTITIES: dict[str, Callable[[RulerEpisode], TimedCalls]] = {
    PREFILL: lambda episode: episode.prefill,
    STEP: lambda episode: episode.decode,
    FIRST: lambda episode: episode.first,
}
_RULER = Path(__file__).with_name("ruler.py")
_NAME = f"{__package__}.ruler"
_ENGINES = Path(__file__).with_name("engines") / "engine.py"
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
sys.modules[sys.argv[1]] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.exit(module.main())
"""
"""Runs this checkout's `ruler.py` as a module of the package that the interpreter finds."""


def _hear_nothing(_old: Sequence[int], _new: Sequence[int]) -> None:
    """Compare no tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two sides that are compared: its name, its artifact, and the interpreter that imports its code.

    With `engine`, one of the files in `engines`, it is that engine's model: a file, a folder or an address. `num_ids`
    is its number of token ids, if known.
    """

    name: str
    artifact: Path | str
    python: Path = Path(sys.executable)
    engine: str | None = None
    num_ids: int | None = None


def measure_in_lockstep(
    old: Side,
    new: Side,
    *,
    num_blocks: int = NUM_BLOCKS,
    num_exchanges: int = NUM_EXCHANGES,
    budget_s: float | None = None,
    workload: Workload | None = None,
    provider: str = CPU_PROVIDER,
    num_threads: int = 1,
    progress: Progress = SILENT,
) -> list[Block]:
    """Measure `num_blocks` pairs of processes, or as many as end within `budget_s` seconds; no result stops it early.

    See `blocks_in_lockstep`.
    """
    with progress.stage(f"measure {old.name} and {new.name} in lockstep", num_blocks, unit="blocks") as stage:
        blocks = []
        for block in blocks_in_lockstep(
            old,
            new,
            num_blocks=num_blocks,
            num_exchanges=num_exchanges,
            budget_s=budget_s,
            workload=workload,
            provider=provider,
            num_threads=num_threads,
        ):
            blocks.append(block)
            stage.advance()
    return blocks


def blocks_in_lockstep(
    old: Side,
    new: Side,
    *,
    num_blocks: int = NUM_BLOCKS,
    num_exchanges: int = NUM_EXCHANGES,
    budget_s: float | None = None,
    workload: Workload | None = None,
    provider: str = CPU_PROVIDER,
    num_threads: int = 1,
    num_ids: int | None = None,
    hear: Hear = _hear_nothing,
) -> Iterator[Block]:
    """Measure pairs of processes, one after another, and yield each block, within `budget_s` seconds in total.

    Each pair takes `num_exchanges` turns, or as many as end within its part of the budget: on a busy machine there are
    first fewer turns and then fewer blocks. `hear` gets the greedy tokens of both sides after the same prompt, for the
    turns that count. Prompts are drawn from the first `num_ids` ids (None: from all ids of a side). With several
    threads, waiting threads spin, so CPU time says less if other programs run. A side that dies, or a block that takes
    longer than `TIMEOUT_S`, is a `MeasurementError` with the side's name.
    """
    work = workload or Workload()
    request = RulerRequest(
        artifact="",  # each side has its own
        provider=provider,
        num_threads=num_threads,
        prompt_tokens=work.prompt_tokens,
        decode_tokens=work.decode_tokens,
        seed=0,
        num_ids=num_ids,
    )
    most_s = math.inf if budget_s is None else SHARE * budget_s / num_blocks
    for place in _places(num_blocks, budget_s):
        yield _block(old, new, replace(request, seed=place), num_exchanges, most_s, hear)


def _places(num_blocks: int, budget_s: float | None) -> Iterator[int]:
    """Count blocks while one more would end in time, if it takes as long as the longest block so far."""
    began = before = time.monotonic()
    longest_s = 0.0
    for place in range(num_blocks):
        if budget_s is not None and before - began + longest_s > budget_s:
            return
        yield place
        now = time.monotonic()
        longest_s, before = max(longest_s, now - before), now


def _block(old: Side, new: Side, request: RulerRequest, num_exchanges: int, most_s: float, hear: Hear) -> Block:
    """Start both sides one after the other, warm them up in turn, then count their turns; the first side alternates.

    After `most_s` seconds `FEWEST_EXCHANGES` turns are enough.
    """
    found: dict[str, list[tuple[Turn, Turn]]] = {quantity: [] for quantity in _QUANTITIES}
    with contextlib.ExitStack() as stack:
        order = (0, 1) if request.seed % 2 == 0 else (1, 0)
        opened = {side: stack.enter_context(_opened((old, new)[side], request)) for side in order}
        before_it, after_it = opened[0], opened[1]
        began = time.monotonic()
        for place in range(NUM_WARMUPS + num_exchanges):
            if place >= NUM_WARMUPS + FEWEST_EXCHANGES and time.monotonic() - began > most_s:
                break
            if place % 2 == 0:
                before = before_it.ask()
                after = after_it.ask()
            else:
                after = after_it.ask()
                before = before_it.ask()
            if place >= NUM_WARMUPS:
                hear(before.tokens, after.tokens)
                for quantity, timed in _QUANTITIES.items():
                    found[quantity].append((_turn(timed(before)), _turn(timed(after))))
        told = {
            LOAD: (before_it.load_ns, after_it.load_ns),
            PEAK: (before_it.peak_bytes(), after_it.peak_bytes()),
        }
    once = {name: (float(old), float(new)) for name, (old, new) in told.items() if old and new}
    return Block({quantity: tuple(pairs) for quantity, pairs in found.items()}, once)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A side's process with its model open: `ask` returns one episode; `load_ns` is None if a server had loaded it."""

    ask: Callable[[], RulerEpisode]
    load_ns: int | None
    peak_bytes: Callable[[], int | None]


@contextlib.contextmanager
def _opened(side: Side, request: RulerRequest) -> Iterator[_Opened]:
    """Start a side's process and wait until it has opened its model."""
    child = ("-c", _START, _NAME, str(_RULER)) if side.engine is None else (str(_ENGINES), side.engine)
    command = [str(side.python), *isolation(), *child]
    with tempfile.TemporaryFile() as complaints, started(command, complaints) as process:
        expired = threading.Event()

        def end() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(TIMEOUT_S, end)
        timer.daemon = True
        timer.start()

        def hear(line: str, kind: type[Answer]) -> Answer:
            answer = _said(process, line, side, kind)
            if answer is None:
                process.wait()
                how = death(process.returncode, TIMEOUT_S if expired.is_set() else None, complaints)
                raise MeasurementError(f"{side.name}: {how}")
            return answer

        try:
            asked = replace(request, artifact=_place(side), num_own_ids=side.num_ids)
            ready = hear(json.dumps(asdict(asked)), RulerReady)
            yield _Opened(
                ask=lambda: hear("episode", RulerEpisode),
                load_ns=ready.load_ns,
                peak_bytes=lambda: None if ready.load_ns is None else peak_rss_of(process.pid),
            )
        finally:
            timer.cancel()


def _place(side: Side) -> str:
    return str(side.artifact.absolute()) if isinstance(side.artifact, Path) else side.artifact


def _turn(calls: TimedCalls) -> Turn:
    return Turn(calls.wall_ns, calls.cpu_ns)


def _said(process: subprocess.Popen[bytes], line: str, side: Side, kind: type[Answer]) -> Answer | None:
    """Write a line and read the answer; None if the process is gone.

    An engine that cannot open its model is a `HavocError`; one that fails later is a `MeasurementError`.
    """
    _write(process, line)
    answer = b"" if process.stdout is None else process.stdout.readline()
    if not answer.endswith(b"\n"):
        return None
    document = json.loads(answer)
    if "error" not in document:
        return read(kind, document)
    said = " ".join(str(document["error"]).split())[:400]
    engine = ENGINES.get(side.engine or "", "the engine")
    if document["is_open"]:
        raise MeasurementError(f"{side.name}: {engine} failed while it was measured ({said})")
    raise HavocError(f"{side.name}: {engine} cannot open {side.artifact} ({said})")


def _write(process: subprocess.Popen[bytes], line: str) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # it is gone: the read below reports it
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
