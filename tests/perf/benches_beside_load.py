"""Real benches beside real load, held against the quiet truth: how often is a verdict wrong?

    .venv/bin/python tests/perf/benches_beside_load.py ARTIFACT --out DIR [--benches 200]      (make load-test)

It needs a machine that does nothing else, and hours. First it measures the artifact a few times on the quiet machine:
the truth. Then it measures it again and again beside 0 to 3 busy processes that work now and then, and judges each
record against limits from half to twice the truth. Every bench is a line of DIR/benches.jsonl, so that a run which was
stopped goes on where it was. Exit 1 where more than 1 % of the verdicts are false passes or false fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from havoc_core.bench.device import identify_cpu
from havoc_core.bench.judge.gate import judge, why_invalid
from havoc_core.bench.judge.record import Record
from havoc_core.bench.judge.targets import Target, load_target
from havoc_core.bench.measure import measure
from havoc_core.bench.neighbours import wait_until_quiet
from havoc_core.progress import make_progress

NUM_QUIET = 6
MOST_WRONG_SHARE = 0.01
NEIGHBOUR = """
import os, random, sys, time
seed, on_s, off_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
generator, parent = random.Random(seed), os.getppid()
while os.getppid() == parent:
    end = time.monotonic() + generator.expovariate(1 / on_s)
    while time.monotonic() < end:
        sum(range(1000))
    time.sleep(generator.expovariate(1 / off_s))
"""


@contextlib.contextmanager
def neighbours(number: int, *, on_s: float, off_s: float, seed: int) -> Iterator[None]:
    """Keep that many processes busy now and then; each ends with this process too."""
    command = [sys.executable, "-c", NEIGHBOUR]
    running = [subprocess.Popen([*command, str(seed + place), str(on_s), str(off_s)]) for place in range(number)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def figures(record: Record) -> dict[str, float]:
    """Return the p90 of prefills in ms and the mean rate of decoding."""
    times = [ms for process in record.samples for ms in process.prefill_ms]
    runs = [run for process in record.samples for run in process.decode]
    rate = sum(len(run.step_ns) for run in runs) / (sum(sum(run.step_ns) for run in runs) / 1e9)
    return {"prefill_ms": statistics.quantiles(times, n=10, method="inclusive")[8], "decode_tok_per_s": rate}


def target_with(limits: dict[str, float]) -> Target:
    """Return this machine's target with limits on prefill and decode."""
    host = load_target("host")
    kept = []
    for limit in host.limits:
        if limit.metric in limits:
            side = "below" if limit.sign == "<" else "above"
            kept.append(limit.model_copy(update={side: limits[limit.metric]}))
    return host.model_copy(update={"limits": tuple(kept)})


def quiet_bench(artifact: Path) -> dict[str, Any]:
    """Measure on the quiet machine; a record that is not valid is no truth."""
    wait_until_quiet(600.0, progress=make_progress())
    record = measure(artifact, profile="quick", wait_s=600.0)
    return {"kind": "quiet", "why_invalid": why_invalid(record), "figures": figures(record)}


def loaded_bench(artifact: Path, place: int, truth: dict[str, float]) -> dict[str, Any]:
    """Measure beside random load and judge against random limits."""
    generator = random.Random(place)
    number, on_s = generator.randint(0, 3), math.exp(generator.uniform(math.log(0.1), math.log(30)))
    off_s = on_s * math.exp(generator.uniform(-1.5, 2.5))
    with neighbours(number, on_s=on_s, off_s=off_s, seed=1000 * place):
        record = measure(artifact, profile="quick", wait_s=0.0)
    limits = {name: value * 2 ** generator.uniform(-1, 1) for name, value in truth.items()}
    judgement = judge([record], target_with(limits), this_cpu=identify_cpu())
    wrong = []
    for line in judgement.lines:
        true = truth[line.metric]
        is_met = true < line.limit if line.sign == "<" else true > line.limit
        if (line.verdict, is_met) in {("pass", False), ("fail", True)}:
            wrong.append(f"{line.verdict} {line.metric}: {line.low} to {line.high}, limit {line.limit}, truth {true}")
    load = {"neighbours": number, "on_s": on_s, "off_s": off_s}
    return {"kind": "loaded", "place": place, **load, "verdict": judgement.verdict, "wrong": wrong}


def main() -> int:
    """Measure what is missing, print what came of all."""
    parser = argparse.ArgumentParser(description="count false verdicts of real benches beside real load")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--benches", type=int, default=200)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "benches.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def keep(found: dict[str, Any]) -> None:
        lines.append(found)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def of(kind: str) -> list[dict[str, Any]]:
        return [line for line in lines if line["kind"] == kind and not line.get("why_invalid")]

    while len(of("quiet")) < NUM_QUIET:
        keep(quiet_bench(chosen.artifact))
        print(f"quiet: {lines[-1]}", flush=True)
    names = ("prefill_ms", "decode_tok_per_s")
    truth = {name: statistics.median(line["figures"][name] for line in of("quiet")) for name in names}
    while len(of("loaded")) < chosen.benches:
        keep(loaded_bench(chosen.artifact, len(of("loaded")), truth))
        print(f"{len(of('loaded'))} of {chosen.benches}: {lines[-1]}", flush=True)
    wrong = [line for line in of("loaded") if line["wrong"]]
    verdicts = [line["verdict"] for line in of("loaded")]
    print(f"truth {truth}; verdicts { {word: verdicts.count(word) for word in sorted(set(verdicts))} }")
    print(f"{len(wrong)} of {len(verdicts)} wrong", *wrong, sep="\n")
    return int(len(wrong) > MOST_WRONG_SHARE * len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
