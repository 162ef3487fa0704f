"""The worker: lean, seeded, honest about what it sees."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from havoc_core.bench import own_process
from havoc_core.bench.judge.record import Workload
from havoc_core.bench.own_process import SurroundingsWatch
from havoc_core.bench.profiles import PROFILES, Series
from havoc_core.bench.requests import Mark
from havoc_core.bench.timing import Measured, rounds
from havoc_core.bench.watched_run import open_session
from havoc_core.bench.worker import Bench, measure_latency, plain_ids

pytestmark = pytest.mark.alone


def test_worker_loads_little() -> None:
    """What the worker imports is charged to the artifact, so it takes neither torch, scipy nor pydantic."""
    script = "import sys, havoc_core.bench.worker as w; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "scipy", "pydantic", "onnx", "rich"} & {name.partition(".")[0] for name in loaded}
    assert not [name for name in loaded if "gguf" in name]  # no artifact is a GGUF file


def test_inputs_are_seeded_and_varied(tiny_artifact: Path, small_workload: Workload) -> None:
    """The same seed and process give the same prompts, another process others, and every call a new one."""
    with open_session(tiny_artifact, profile=PROFILES["quick"], workload=small_workload, num_threads=1) as session:
        first, again, other = (Bench(session.request(process), lambda _: None) for process in (0, 0, 1))
    prompts = [bench.prompt(24) for bench in (first, again, other)]
    assert (prompts[0] == prompts[1]).all()
    assert (prompts[0] != prompts[2]).any()
    assert (first.prompt(24) != prompts[0]).any()
    assert set(prompts[0].ravel()) <= set(plain_ids(first.session.config))
    assert first.session.config.vision.image_token_id not in plain_ids(first.session.config)


def test_broken_logits_are_counted(tiny_artifact: Path, small_workload: Workload) -> None:
    """NaN and infinity are counted, and equal outputs are one output."""
    with open_session(tiny_artifact, profile=PROFILES["quick"], workload=small_workload, num_threads=1) as session:
        bench = Bench(session.request(0), lambda _: None)
    for _ in range(2):
        bench.check(np.array([[1.0, np.nan, -np.inf]], dtype=np.float32))
    bench.check(np.array([[1.0, 2.0, 3.0]], dtype=np.float32))
    assert bench.num_nonfinite_logits == 4
    assert len(bench.outputs) == 2


BRIEF = replace(
    PROFILES["quick"],
    warmup_window_s=0.0,
    warmup_max_s=0.1,
    prefill=Series(3, 0.0, 2.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(2, 0.0, 2.0),
)


def test_no_garbage_is_collected_while_calls_are_timed(tiny_artifact: Path, small_workload: Workload) -> None:
    """The collector runs before the first counted call and after the last one, and not between them."""
    marks: dict[str, bool] = {}

    def tell(mark: Mark) -> None:
        marks[mark.name] = gc.isenabled()

    with open_session(tiny_artifact, profile=BRIEF, workload=small_workload, num_threads=1) as session:
        measure_latency(session.request(0), tell)
    assert marks == {
        "load": True,
        "first_run": True,
        "warmup": True,
        "prefill": False,
        "ttft": False,
        "decode": False,
        "end": False,
    }
    assert gc.isenabled()


def test_reused_buffers_change_no_answer(tiny_artifact: Path, small_workload: Workload) -> None:
    """Prefills and decode steps in buffers that earlier calls filled give the logits of a fresh past."""
    with open_session(tiny_artifact, profile=BRIEF, workload=small_workload, num_threads=1) as session:
        bench = Bench(session.request(0), lambda _: None)
    bench.time_episode()
    bench.time_prefill(Measured())
    ids = bench.prompt(16)
    ours, ours_past = bench.prefill(ids)
    theirs, theirs_past = bench.session.prefill(ids)
    np.testing.assert_array_equal(ours, theirs)
    step = bench.prompt(1)
    ours, theirs = (bench.session.decode(step, None, past)[0] for past in (ours_past, theirs_past))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("passes", [1, 2])
def test_every_pass_is_inside_the_timed_span(tiny_artifact: Path, small_workload: Workload, passes: int) -> None:
    """A prefill and a first token of two passes read the prompt twice between two clock readings; the answer is one."""
    workload = small_workload.model_copy(update={"passes": passes})
    with open_session(tiny_artifact, profile=BRIEF, workload=workload, num_threads=1) as session:
        bench = Bench(session.request(0), lambda _: None)
    real, seen = bench.prefill, []

    def slow(ids: np.ndarray) -> object:
        seen.append(ids)
        time.sleep(0.02)
        return real(ids)

    bench.prefill = slow
    for timed in (bench.time_prefill, bench.time_first_token):
        calls = Measured()
        seen.clear()
        timed(calls)
        assert len(calls.duration_ns) == 1
        assert calls.duration_ns[0] >= passes * 20e6
        assert len(seen) == passes
        assert all(np.array_equal(ids, seen[0]) for ids in seen)
    ids = bench.prompt(16)
    np.testing.assert_array_equal(bench.read(ids)[0], bench.session.prefill(ids)[0])


@pytest.mark.parametrize(
    ("windows_ms", "word", "num_windows"),
    [
        ([400, 400, 400], "flat", 2),
        ([480, 440, 410, 405, 100], "warmup", 4),
        ([400, 600, 602], "slowdown", 3),
        ([400, 600] * 9, "no_steady_state", 7),
    ],
)
def test_warm_up_ends_when_two_windows_agree(windows_ms: list[int], word: str, num_windows: int) -> None:
    """At the first two windows that agree, or after the longest time; every call is kept, and stands in a window."""
    bench = object.__new__(Bench)
    bench.request = SimpleNamespace(profile=replace(BRIEF, warmup_window_s=1.2, warmup_max_s=10.0))
    script = iter([call for ms in windows_ms for call in (ms, ms - 3, ms + 3)])
    bench.time_prefill = lambda calls: calls.add(0, next(script) * 1_000_000)
    found = bench.warm_up()
    assert found["classification"] == word
    assert found["window_ns"] == [ms * 1_000_000 for ms in windows_ms[:num_windows]]
    assert len(found["calls"]["duration_ns"]) == 3 * num_windows


def test_every_graph_must_run_on_the_provider(tiny_artifact: Path, small_workload: Workload) -> None:
    """The proof of placement covers embedding and vision, not the decoder alone."""
    with open_session(tiny_artifact, profile=BRIEF, workload=small_workload, num_threads=1) as session:
        placement = Bench(session.request(0), lambda _: None).session.placement().by_provider
    assert set(placement) == {"CPUExecutionProvider"}
    graphs = {node.partition(":")[0] for node in placement["CPUExecutionProvider"]}
    assert graphs == {"model.onnx", "embedding.onnx", "vision.onnx"}


def test_busy_time_of_a_release_is_reached() -> None:
    """Played on a clock that each call moves: 600 s busy over the five processes, whatever a call takes."""
    release = PROFILES["release"]
    for call_s in (0.004, 0.1, 3.0):
        total_s = 0.0
        for series in (release.prefill, release.ttft, release.decode):
            clock = Clock()
            for _ in rounds(series, lambda clock=clock: clock.busy_s, now=lambda clock=clock: clock.now_s):
                clock.work(call_s)
            assert clock.now_s < series.max_s
            total_s += clock.busy_s
        assert release.num_processes * total_s >= 600


@dataclass
class Clock:
    """Time that passes only by working, a tenth of it outside the calls."""

    busy_s: float = 0.0
    now_s: float = 0.0

    def work(self, call_s: float) -> None:
        self.busy_s += call_s
        self.now_s += 1.1 * call_s


def test_rounds_meet_both_minima_or_stop() -> None:
    """A series ends when calls and busy time suffice, or when the time is over and there are two."""
    busy = Measured()

    def call(duration_s: float) -> None:
        busy.add(0, round(duration_s * 1e9))

    for _ in rounds(Series(3, 1.0, 60.0), lambda: busy.busy_s):
        call(0.25)
    assert len(busy.duration_ns) == 4
    for least in (1, 2):
        assert len(list(rounds(Series(9, 9.0, 0.0, least=least), lambda: 0.0))) == least


def test_peak_follows_an_allocation() -> None:
    """The kernel's high-water mark sees memory that is already freed, and can be started anew.

    A fresh process does it: in this one, what earlier tests left behind may be collected meanwhile.
    """
    allocate = """
import numpy as np
from havoc_core.bench.own_process import peak_rss_bytes, reset_peak_rss, rss_bytes
before = rss_bytes()
block = np.ones(8_000_000, dtype=np.float64)
del block
first = peak_rss_bytes()
was_reset = reset_peak_rss()
print(before, first, int(was_reset), peak_rss_bytes())
"""
    ran = subprocess.run([sys.executable, "-c", allocate], capture_output=True, text=True, check=True)
    before, first, was_reset, second = map(int, ran.stdout.split())
    assert first >= before + 60_000_000
    if was_reset:
        assert second < before + 60_000_000


def test_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that use a fifth of one CPU all the time are told as that, however much this process works itself.

    The machine's counters are played, so that nobody else's work is in them.
    """
    began_ns = time.perf_counter_ns()

    def played(_: object) -> tuple[int, int]:
        elapsed_ns = time.perf_counter_ns() - began_ns
        return time.process_time_ns() + elapsed_ns // 5, elapsed_ns // 10

    monkeypatch.setattr(own_process, "busy_and_stolen_ns", played)
    around, values = SurroundingsWatch(zero_ns=began_ns), np.random.default_rng(0).random(300_000)
    began = time.process_time()
    while time.process_time() - began < 0.5:
        values = np.sort(values)[::-1]
    columns, shares = around.as_json(), around.shares()
    assert columns["own_ns"][-1] - columns["own_ns"][0] > 0.4e9
    assert shares["foreign_cpu_share"] == pytest.approx(0.2 / columns["num_cpus"], rel=0.05)
    assert shares["steal_share"] == pytest.approx(0.1 / columns["num_cpus"], rel=0.05)


def test_a_neighbour_is_foreign() -> None:
    """A busy process beside this one shows in `busy_ns`, not in `own_ns`, and this one's waiting shows too."""
    spin = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    neighbour = subprocess.Popen([sys.executable, "-c", spin])
    try:
        time.sleep(0.3)
        around = SurroundingsWatch(zero_ns=time.perf_counter_ns())
        began, value = time.perf_counter(), 0
        while time.perf_counter() - began < 1.0:
            value += 1
        columns = around.as_json()
    finally:
        neighbour.kill()
        neighbour.wait()
        os.sched_setaffinity(0, before)
    assert columns["num_cpus"] == 1
    assert around.shares()["foreign_cpu_share"] > 0.3
    if "waited_ns" in columns:
        assert columns["waited_ns"][-1] - columns["waited_ns"][0] > 0.3e9


def test_looks_are_taken_no_oftener_than_their_interval() -> None:
    """Looking after every call costs nothing: between two readings lies at least a tenth of a second."""
    around = SurroundingsWatch(zero_ns=time.perf_counter_ns())
    for _ in range(10_000):
        around.look()
    assert len(around) < 10
    times = around.as_json()["t_ns"]
    assert times == sorted(times)
