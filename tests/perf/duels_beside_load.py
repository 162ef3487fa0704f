"""Real duels beside random load: is nano ever worse than itself, and is needless work found?

    .venv/bin/python tests/perf/duels_beside_load.py --out DIR [--same 40] [--slower 5]      (make duel-test)

First duels of nano with itself, then against graphs that do 2 % and 5 % of needless work (`needless_work.py`), each
beside 0 to 3 busy processes that work now and then. What two sessions one after the other would have said stands
beside it, of the same calls: the old side's of the first half of the duel against the new side's of the second, every
call taken for independent. Every duel is a line of DIR/duels.jsonl, so that a run which was stopped goes on where it
was; --at-most ends it earlier. It needs a machine that does nothing else, and hours. Exit 1 where a duel of nano with
itself is worse, or needless work was not found.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from havoc_core.bench.duel import MOST_BLOCKS, judge_until_proven
from havoc_core.bench.judge.paired import DECIDING, Block
from havoc_core.bench.lockstep import Side, blocks_in_lockstep

HERE = Path(__file__).parent
loaded = SimpleNamespace(**runpy.run_path(str(HERE / "benches_beside_load.py")))
needless = SimpleNamespace(**runpy.run_path(str(HERE.parent / "bench" / "needless_work.py")))
SHARES = (0.02, 0.05)
MARGIN = 0.005  # 2 % must lie beyond it
BUDGET_S = 600.0
SIGMAS = 2.576  # a two-sided 99 % of the normal distribution


def naive_verdict(blocks: Sequence[Block], *, margin: float) -> str:
    """Judge as two sessions one after the other are usually judged: worse if any quantity's bound lies beyond."""
    half = len(blocks) // 2
    words = []
    for quantity in DECIDING["latency"]:
        old = [ns for block in blocks[:half] for turn, _ in block.turns[quantity] for ns in turn.wall_ns]
        new = [ns for block in blocks[half:] for _, turn in block.turns[quantity] for ns in turn.wall_ns]
        logs = [[math.log(ns) for ns in side] for side in (old, new)]
        if min(map(len, logs)) < 2:
            return "undecided"
        apart = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
        reach = SIGMAS * math.sqrt(sum(statistics.variance(side) / len(side) for side in logs))
        low, high = apart - reach, apart + reach
        edge = math.log1p(margin)
        words.append("worse" if low > edge else "better" if high < -edge else "equal" if max(-low, high) < edge else "")
    if "worse" in words:
        return "worse"
    return "undecided" if "" in words else "better" if "better" in words else "equal"


def duel_once(old: Path, new: Path, kind: str, place: int, budget_s: float) -> dict[str, Any]:
    """Let two artifacts meet beside load that only kind and place decide."""
    generator = random.Random(f"{kind} {place}")
    number, on_s = generator.randint(0, 3), math.exp(generator.uniform(math.log(0.1), math.log(30)))
    off_s = on_s * math.exp(generator.uniform(-1.5, 2.5))
    seen: list[Block] = []

    def kept() -> Iterator[Block]:
        sides = Side(name="old", artifact=old), Side(name="new", artifact=new)
        for block in blocks_in_lockstep(*sides, num_blocks=MOST_BLOCKS, budget_s=budget_s):
            seen.append(block)
            yield block

    began = time.monotonic()
    with loaded.neighbours(number, on_s=on_s, off_s=off_s, seed=generator.randrange(10**6)):
        outcome = judge_until_proven(kept(), margin=MARGIN)
    return {
        "kind": kind,
        "place": place,
        "neighbours": number,
        "on_s": on_s,
        "off_s": off_s,
        "took_s": time.monotonic() - began,
        "verdict": outcome.verdict,
        "naive": naive_verdict(seen, margin=MARGIN),
        "num_blocks": outcome.num_blocks,
        "rows": [asdict(row) for row in outcome.rows],
    }


def artifacts(out: Path) -> dict[str, Path]:
    """Export nano once, and write its copies that work more than they need."""
    found = {"same": out / "artifact"}
    if not found["same"].is_dir():
        subprocess.run([sys.executable, "-m", "havoc_core", "export", "nano", "--out", str(found["same"])], check=True)
    for share in SHARES:
        kind = f"{share:.0%} needless"
        found[kind] = out / f"needless-{round(100 * share)}"
        if not found[kind].is_dir():
            needless.with_needless_work(found["same"], found[kind], share)
    return found


def told(lines: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """Return a table of all duels so far, and the exit code."""
    rows, code = [], 0
    for kind in dict.fromkeys(line["kind"] for line in lines):
        its = [line for line in lines if line["kind"] == kind]
        words, naive = (Counter(line[name] for line in its) for name in ("verdict", "naive"))
        rows.append(f"{kind}: {dict(words)} in {len(its)} duels; two sessions: {dict(naive)}")
        code |= words["worse"] > 0 if kind == "same" else words["worse"] < len(its)
    return "\n".join(rows), int(code)


def main() -> int:
    """Fight the duels that are missing, and print what came of all."""
    parser = argparse.ArgumentParser(description="let nano meet itself and slower copies beside load")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--same", type=int, default=40, help="duels of nano with itself")
    parser.add_argument("--slower", type=int, default=5, help="duels with each slower copy")
    parser.add_argument("--at-most", type=int, default=sys.maxsize, help="duels of this call")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="longest duel")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "duels.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = artifacts(chosen.out)
    asked = [(kind, place) for kind in found for place in range(chosen.same if kind == "same" else chosen.slower)]
    done = {(line["kind"], line["place"]) for line in lines}
    for kind, place in [pair for pair in asked if pair not in done][: chosen.at_most]:
        lines.append(duel_once(found["same"], found[kind], kind, place, chosen.budget_s))
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"{kind} {place}: {lines[-1]['verdict']} after {lines[-1]['num_blocks']} blocks", flush=True)
    text, code = told(lines)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
