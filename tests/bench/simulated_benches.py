"""Thousands of simulated benches beside random load, judged by the product's own code: how often is a verdict wrong?

    .venv/bin/python tests/bench/simulated_benches.py --benches 5000       (make simulate)

The machine is a model, the judging is not: samples, counters and CPU times become a record, processes are repeated as
`attempt_problems` says, and `judge` gives the verdict. What the model knows of a machine:

- processes differ (lognormal), calls of one process are correlated (AR(1)), and a few are interrupted for a moment;
- 0 to 3 neighbours work now and then, for stretches of a tenth of a second to minutes. On CPUs that the model uses they
  slow it down to its share; where CPUs are free, by what memory bandwidth and shared cores cost;
- counters are read every 0.2 s between calls, CPU time in ticks of 10 ms with an error of one tick;
- half of all machines count no waiting of threads, as kernels without scheduler statistics do.

The truth is the quiet machine's: the p90 and the mean rate over processes and calls without load. Limits lie between
half and twice of it. A pass where the truth misses the limit, or a fail where it holds it, is a false verdict.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import random
import runpy
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from havoc_core.bench.findings import attempt_problems
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import ProcessSamples, Record
from havoc_core.bench.judge.targets import Target, load_target
from havoc_core.bench.own_process import LOOK_INTERVAL_NS
from havoc_core.bench.profiles import PROFILES
from havoc_core.bench.watched_run import Attempt

samples = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample_records.py"))))
DOMAIN_FREE = ("prefill_ms", "decode_tok_per_s")
DECODE_STEPS = 31
TICK_NS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine and what works on it beside the bench."""

    num_cpus: int
    num_threads: int
    call_ms: float = 6.0
    step_ms: float = 1.5
    between: float = 0.02
    within: float = 0.02
    num_neighbours: int = 0
    shared_cost: float = 0.15
    on_s: float = 2.0
    off_s: float = 2.0
    counts_waiting: bool = True


@dataclass
class Clock:
    """Time on a machine with neighbours that come and go; counters as a process there would read them."""

    machine: Machine
    generator: random.Random
    now_ns: float = 0.0
    own_ns: float = 0.0
    foreign_ns: float = 0.0
    waited_ns: float = 0.0
    busy: list[bool] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    columns: dict[str, list[int]] = field(default_factory=dict)
    next_look_ns: float = 0.0

    def __post_init__(self) -> None:
        machine = self.machine
        share_on = machine.on_s / (machine.on_s + machine.off_s)
        self.busy = [self.generator.random() < share_on for _ in range(machine.num_neighbours)]
        self.switches = [self._span_ns(is_on) for is_on in self.busy]
        names = ["t_ns", "busy_ns", "own_ns", "stolen_ns", *(["waited_ns"] if machine.counts_waiting else [])]
        self.columns = {name: [] for name in names}

    def _span_ns(self, is_on: bool) -> float:
        return 1e9 * self.generator.expovariate(1 / (self.machine.on_s if is_on else self.machine.off_s))

    def slowdown(self) -> tuple[float, float]:
        """How many times slower a computation is now, and what part of its time its slowest thread waits."""
        machine, num_busy = self.machine, sum(self.busy)
        num_free = machine.num_cpus - machine.num_threads
        beside = min(num_busy, num_free)
        factor = 1.0 + machine.shared_cost * beside
        on_its_cpus = num_busy - beside
        if on_its_cpus:
            shared = 1.0 + math.ceil(on_its_cpus / machine.num_threads)
            return factor * shared, 1 - 1 / shared
        return factor, 0.0

    def work(self, quiet_ns: float) -> tuple[int, int, int]:
        """Compute what takes `quiet_ns` on a quiet machine; return its start, its duration and its CPU time in ns."""
        begin, own_before, left = self.now_ns, self.own_ns, quiet_ns
        while left > 0:
            factor, waiting = self.slowdown()
            until = min([left * factor, *(switch - self.now_ns for switch in self.switches)])
            self._pass(max(until, 0.0), waiting, is_working=True)
            left -= max(until, 0.0) / factor
            if left < 1e-3:
                break
        return int(begin), max(int(self.now_ns - begin), 1), int(self.own_ns - own_before)

    def idle(self, duration_ns: float) -> None:
        end = self.now_ns + duration_ns
        while self.now_ns < end - 1e-3:
            self._pass(max(min([end, *self.switches]) - self.now_ns, 0.0), 0.0, is_working=False)

    def _pass(self, duration_ns: float, waiting: float, *, is_working: bool) -> None:
        machine = self.machine
        threads = machine.num_threads if is_working else 1
        self.now_ns += duration_ns
        own = duration_ns * (threads - waiting)  # the others spin while they wait for it
        self.own_ns += own
        self.waited_ns += waiting * duration_ns
        self.foreign_ns += min(sum(self.busy) * duration_ns, machine.num_cpus * duration_ns - own)
        for place, switch in enumerate(self.switches):
            if switch <= self.now_ns + 1e-3:
                self.busy[place] = not self.busy[place]
                self.switches[place] = self.now_ns + self._span_ns(self.busy[place])

    def look(self, *, force: bool = False) -> None:
        if self.now_ns < self.next_look_ns and not force:
            return
        self.next_look_ns = self.now_ns + LOOK_INTERVAL_NS
        exact = self.own_ns + self.foreign_ns + self.generator.uniform(-TICK_NS, TICK_NS)
        values = {
            "t_ns": self.now_ns,
            "busy_ns": TICK_NS * math.floor(max(exact, 0.0) / TICK_NS),
            "own_ns": self.own_ns,
            "stolen_ns": 0,
            "waited_ns": self.waited_ns,
        }
        for name, column in self.columns.items():
            column.append(int(values[name]))


class Noise:
    """Quiet durations of one process: its own level, correlated scatter, and a few interruptions."""

    def __init__(self, machine: Machine, generator: random.Random) -> None:
        self._machine, self._generator = machine, generator
        self._level = math.exp(generator.gauss(0, machine.between))
        self._state = generator.gauss(0, 1)

    def draw(self, usual_ms: float) -> float:
        rho = 0.6
        self._state = rho * self._state + math.sqrt(1 - rho**2) * self._generator.gauss(0, 1)
        spike = self._generator.uniform(1.1, 1.8) if self._generator.random() < 0.02 else 1.0
        return usual_ms * 1e6 * self._level * math.exp(self._machine.within * self._state) * spike


def measured_process(index: int, machine: Machine, generator: random.Random) -> dict[str, Any]:
    """Return the samples of one process as JSON values, in the order in which the worker measures."""
    clock, noise = Clock(machine, generator), Noise(machine, generator)
    plan = PROFILES["quick"]
    clock.look(force=True)
    load_ns = clock.work(150e6)[1]
    cold_ns = clock.work(2 * noise.draw(machine.call_ms))[1]
    for _ in range(30):
        clock.work(noise.draw(machine.call_ms))
        clock.look()
    clock.look(force=True)
    first = (clock.now_ns, clock.own_ns, clock.foreign_ns)
    prefill = _series(clock, noise, machine.call_ms, plan.prefill.min_calls, plan.prefill.min_busy_s)
    ttft = _series(clock, noise, 1.05 * machine.call_ms, plan.ttft.min_calls, plan.ttft.min_busy_s)
    runs: list[dict[str, Any]] = []
    while len(runs) < plan.decode.min_calls or _busy_ns(runs) < plan.decode.min_busy_s * 1e9:
        start_ns, prefill_ns, _ = clock.work(noise.draw(machine.call_ms))
        steps = []
        for _ in range(DECODE_STEPS):
            steps.append(clock.work(noise.draw(machine.step_ms))[1])
            clock.look()
        runs.append({"start_ns": start_ns, "prefill_ns": prefill_ns, "step_ns": steps, "num_tokens": 1 + DECODE_STEPS})
    clock.look(force=True)
    elapsed_ns = clock.now_ns - first[0]
    return {
        "process": index,
        "load_ns": load_ns,
        "cold_ns": cold_ns,
        "warmup": {"classification": "flat", "calls": {}},
        "prefill": prefill,
        "ttft": ttft,
        "decode": runs,
        "nodes_by_provider": {"CPUExecutionProvider": 120},
        "num_distinct_outputs": 20,
        "foreign_cpu_share": min((clock.foreign_ns - first[2]) / elapsed_ns / machine.num_cpus, 1.0),
        "steal_share": 0.0,
        "surroundings": {"num_cpus": machine.num_cpus, **clock.columns},
        "busy_ns": 0,
    }


def _series(clock: Clock, noise: Noise, usual_ms: float, min_calls: int, min_busy_s: float) -> dict[str, list[int]]:
    calls: dict[str, list[int]] = {"start_ns": [], "duration_ns": [], "cpu_ns": []}
    while len(calls["duration_ns"]) < min_calls or sum(calls["duration_ns"]) < min_busy_s * 1e9:
        clock.idle(0.3e6)
        for column, value in zip(calls.values(), clock.work(noise.draw(usual_ms)), strict=True):
            column.append(value)
        clock.look()
    return calls


def _busy_ns(runs: list[dict[str, Any]]) -> int:
    return sum(run["prefill_ns"] + sum(run["step_ns"]) for run in runs)


def simulated_record(machine: Machine, generator: random.Random) -> Record:
    """Measure five processes as the quick profile does, each repeated while it is disturbed and the bound allows it."""
    found, num_retries = [], 0
    for index in range(PROFILES["quick"].num_processes):
        process = measured_process(index, machine, generator)
        while num_retries < PROFILES["quick"].num_retries and attempt_problems(_attempt(process)):
            num_retries += 1
            process = measured_process(index, machine, generator)
        found.append(process)
    document = copy.deepcopy(samples.document("cpu"))
    document["samples"] = found
    document["workload"] = {"decode_tokens": 1 + DECODE_STEPS}
    document["accuracy"] = {}
    return samples.sealed(document)


def _attempt(process: dict[str, Any]) -> Attempt:
    return Attempt(
        samples=ProcessSamples.model_validate(process, strict=False),
        telemetry=(),
        decode_joules=None,
        decode_span_s=1.0,
        decode_tokens=1,
        parent_cpu_share=0.0,
    )


@functools.cache
def truth(machine: Machine, num_processes: int = 400) -> dict[str, float]:
    """Return the p90 of prefills and the mean rate of decoding on the quiet machine."""
    generator = random.Random(5)
    times, steps = [], []
    for _ in range(num_processes):
        noise = Noise(machine, generator)
        times += [noise.draw(machine.call_ms) / 1e6 for _ in range(60)]
        steps += [noise.draw(machine.step_ms) / 1e6 for _ in range(60)]
    p90 = statistics.quantiles(times, n=10, method="inclusive")[8]
    return {"prefill_ms": p90, "decode_tok_per_s": 1e3 / statistics.fmean(steps)}


def target_with(limits: dict[str, float]) -> Target:
    """Return the sample CPU's target with limits on prefill and decode."""
    host = load_target("host")
    kept = []
    for limit in host.limits:
        if limit.metric in limits:
            side = "below" if limit.sign == "<" else "above"
            kept.append(limit.model_copy(update={side: limits[limit.metric]}))
    workload = host.workload.model_copy(update={"decode_tokens": 1 + DECODE_STEPS})
    return host.model_copy(update={"limits": tuple(kept), "workload": workload})


@dataclass
class Tally:
    """Verdicts of many benches; `wrong` are false passes and false fails of single limits."""

    num_benches: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    num_wrong_benches: int = 0

    def add(self, record: Record, limits: dict[str, float], true: dict[str, float]) -> None:
        """Judge one bench and compare with the truth."""
        judgement = judge([record], target_with(limits), this_cpu=samples.THIS_CPU)
        self.num_benches += 1
        self.verdicts[judgement.verdict] = self.verdicts.get(judgement.verdict, 0) + 1
        is_wrong = False
        for line in judgement.lines:
            is_met = true[line.metric] < line.limit if line.sign == "<" else true[line.metric] > line.limit
            if (line.verdict, is_met) in {("pass", False), ("fail", True)}:
                is_wrong = True
                bounds = f"{line.value:.4g} [{line.low}, {line.high}]"
                self.wrong.append(f"{line.verdict} {line.metric} {bounds} limit {line.limit:.4g}")
        self.num_wrong_benches += is_wrong

    @property
    def wrong_share(self) -> float:
        """Share of benches with a false pass or a false fail."""
        return self.num_wrong_benches / self.num_benches

    def share(self, verdict: str) -> float:
        """Share of benches with this verdict."""
        return self.verdicts.get(verdict, 0) / self.num_benches


def beside_load(num_benches: int, *, seed: int) -> Tally:
    """Judge benches on random machines beside random load, against limits from half to twice the truth."""
    generator, tally = random.Random(seed), Tally()
    for _ in range(num_benches):
        num_cpus = generator.choice([2, 2, 4, 8, 16])
        span_s = math.exp(generator.uniform(math.log(0.1), math.log(30)))
        quiet = Machine(
            num_cpus=num_cpus,
            num_threads=generator.choice([num_cpus, max(num_cpus // 2, 1)]),
            between=generator.choice([0.005, 0.02, 0.04]),
            within=generator.choice([0.005, 0.02, 0.05]),
        )
        machine = Machine(
            **{
                **quiet.__dict__,
                "num_neighbours": generator.randint(0, 3),
                "on_s": span_s,
                "off_s": span_s * math.exp(generator.uniform(-1.5, 2.5)),
                "counts_waiting": generator.random() < 0.5,
            }
        )
        true = truth(Machine(num_cpus=2, num_threads=2, between=quiet.between, within=quiet.within))
        limits = {name: value * 2 ** generator.uniform(-1, 1) for name, value in true.items()}
        tally.add(simulated_record(machine, generator), limits, true)
    return tally


def quiet_machine(num_benches: int, *, seed: int, times: float) -> Tally:
    """Judge benches on a quiet machine, against limits that the truth meets `times` over (below 1: misses)."""
    generator, tally = random.Random(seed), Tally()
    machine = Machine(num_cpus=2, num_threads=2, within=0.02, between=0.01)
    true = truth(machine)
    limits = {"prefill_ms": times * true["prefill_ms"], "decode_tok_per_s": true["decode_tok_per_s"] / times}
    for _ in range(num_benches):
        tally.add(simulated_record(machine, generator), limits, true)
    return tally


def main() -> int:
    """Run as many benches as asked for and print what came of them; exit 1 above 1 % false verdicts."""
    parser = argparse.ArgumentParser(description="simulate benches beside load and count false verdicts")
    parser.add_argument("--benches", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    loaded = beside_load(chosen.benches, seed=chosen.seed)
    print(f"beside load: {loaded.num_benches} benches, {loaded.num_wrong_benches} false ({loaded.wrong_share:.2%})")
    print(f"  {loaded.verdicts}", *loaded.wrong[:20], sep="\n  ")
    for times, verdict in ((1.2, "pass"), (0.83, "fail")):
        quiet = quiet_machine(max(chosen.benches // 10, 20), seed=chosen.seed, times=times)
        print(f"quiet, limit {times} times the truth: {quiet.share(verdict):.1%} {verdict}, {quiet.verdicts}")
    return int(loaded.wrong_share > 0.01)


if __name__ == "__main__":
    sys.exit(main())
