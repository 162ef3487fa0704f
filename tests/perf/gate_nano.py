"""The way of a release, on this machine: export nano, measure it, gate it against the target `ci`.

    .venv/bin/python tests/perf/gate_nano.py      (make gate)

A proven miss ends in 1. A busy machine is no defect of the change: a record that is invalid or inconclusive is measured
again, after a wait for a quieter machine, until `DEADLINE_S` has passed; then this says so and ends in 0. Whatever the
machine does, the export must succeed, the record must hold every figure that has a limit, and the gate must end with
the right exit code for a missing file, another device, an edited record, another artifact and a limit nothing meets.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from havoc_core.bench.judge.targets import load_target
from havoc_core.storage import scratch_directory

TARGET = "ci"
DEADLINE_S = 200.0  # for the last measurement to end; the checks after it take a few seconds
WAIT_S = 20
PASS, MISS, UNDECIDED, INVALID = 0, 1, 3, 4
LEAST_LIMIT = '[impossible]\nextends = "ci"\n[[impossible.limits]]\nmetric = "peak_rss_bytes"\nbelow = 2\nunit = "MB"\n'


class BrokenError(Exception):
    """Something that must hold on any machine does not."""


def havoc(*words: object, timeout_s: float | None = None) -> tuple[int, dict[str, Any], str]:
    """Run a command; return its exit code, its JSON document and the last line of what it said."""
    command = [sys.executable, "-I", "-m", "havoc_core", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    document = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, document, (done.stderr.strip().splitlines() or [""])[-1]


def until_decided(attempt: Callable[[float], tuple[int, str]], *, now: Callable[[], float] = time.monotonic) -> int:
    """Measure and gate until a verdict is there or no further attempt would end in time; return the last exit code.

    `attempt` is given the seconds left and returns an exit code of the gate and its reason.
    """
    began = before = now()
    longest_s, code = 0.0, INVALID
    while before - began + longest_s <= DEADLINE_S:
        code, reason = attempt(DEADLINE_S - (before - began))
        print(f"gate: exit code {code}: {reason}", flush=True)
        if code in {PASS, MISS}:
            return code
        if code not in {UNDECIDED, INVALID}:
            raise BrokenError(f"the gate ended with {code}: {reason}")
        longest_s, before = max(longest_s, now() - before), now()
    return code


def measure_and_gate(folder: Path, left_s: float) -> tuple[int, str]:
    """One attempt: a record of the artifact in `folder`, and the gate's word on it."""
    artifact, record = folder / "artifact", folder / "record"
    words = (
        "bench",
        artifact,
        "--profile",
        "quick",
        "--n",
        0,
        "--wait",
        WAIT_S,
        "--out",
        record,
        "--replace",
        "--json",
    )
    try:
        code, measured, said = havoc(*words, timeout_s=left_s)
    except subprocess.TimeoutExpired:
        return INVALID, "the machine is too busy to measure in time"
    if code not in {PASS, INVALID}:
        raise BrokenError(f"bench ended with {code}: {said}")
    lacks = [limit.metric for limit in load_target(TARGET).limits if measured["metrics"].get(limit.metric) is None]
    if lacks:
        raise BrokenError(f"the record lacks {', '.join(lacks)}")
    code, judgement, said = havoc("gate", record, "--target", TARGET, "--artifact", artifact, "--json")
    return code, judgement.get("reason", said)


def require_ladder(folder: Path) -> None:
    """The gate's exit codes for what no machine can make pass; an invalid record proves no miss either."""
    artifact, record = folder / "artifact", folder / "record"
    edited, other, impossible = folder / "edited.json", folder / "other", folder / "impossible.toml"
    document = json.loads((record / "record.json").read_text())
    document["samples"][0]["load_ns"] += 1
    edited.write_text(json.dumps(document))
    shutil.copytree(artifact, other)
    (other / "generation_config.json").write_text("{}")
    impossible.write_text(LEAST_LIMIT)
    is_invalid = havoc("gate", record, "--target", TARGET)[0] == INVALID
    for what, words, expected in (
        ("a missing record", (folder / "none.json", "--target", TARGET), 2),
        ("another device", (record, "--target", "gtx1660"), 5),
        ("an edited record", (edited, "--target", TARGET), 5),
        ("another artifact", (record, "--target", TARGET, "--artifact", other), 5),
        ("a limit nothing meets", (record, "--target", impossible), INVALID if is_invalid else MISS),
    ):
        found, judgement, said = havoc("gate", *words, "--json")
        if found != expected:
            raise BrokenError(f"{what} ended with {found}, not {expected}: {judgement.get('reason', said)}")


def gate_in(folder: Path) -> int:
    """Export, measure and gate in a folder, and check what must hold on any machine; return the gate's last code."""
    code, _, said = havoc("export", "nano", "--out", folder / "artifact")
    if code != PASS:
        raise BrokenError(f"export ended with {code}: {said}")
    code = until_decided(lambda left_s: measure_and_gate(folder, left_s))
    if (folder / "record" / "record.json").exists():
        require_ladder(folder)
    return code


def main() -> int:
    """Say in one line what came of it."""
    with scratch_directory("havoc-gate-") as folder:
        try:
            code = gate_in(folder)
        except BrokenError as broken:
            print(f"FAILED: {broken}")
            return 1
    if code == MISS:
        print(f"FAILED: nano misses a limit of the target {TARGET}")
        return 1
    print("PASSED" if code == PASS else "NOT JUDGED: this machine was too busy for a verdict; all else holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
