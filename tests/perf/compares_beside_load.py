"""A commit compared with itself, again and again beside random load: how often is that red?

    .venv/bin/python tests/perf/compares_beside_load.py --out DIR [--comparisons 40]      (make compare-test)

Two copies of the same commit, each with its own code, interpreter and artifact, are exported once and then measured as
`compare_commits.py` does, beside 0 to 3 busy processes that work now and then, and beside whatever else the machine
does. Every comparison is a line of DIR/compares.jsonl, so that a run which was stopped goes on where it was; --at-most
ends it earlier. Exit 1 where any comparison is red.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import runpy
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from havoc_core.bench.judge.paired import judge_blocks, verdict_of
from havoc_core.bench.lockstep import Side, measure_in_lockstep
from havoc_core.storage import scratch_directory

HERE = Path(__file__).parent
commits = SimpleNamespace(**runpy.run_path(str(HERE / "compare_commits.py")))
loaded = SimpleNamespace(**runpy.run_path(str(HERE / "benches_beside_load.py")))


def both_sides(commit: str, folder: Path) -> list[Side]:
    """Unpack a commit twice and export nano from each."""
    sides = []
    for name in ("one copy", "another copy"):
        place = folder / name.replace(" ", "-")
        place.mkdir()
        sides.append(commits.side_of(name, commits.unpack(commit, place / "tree"), place))
        commits.prepare(sides[-1])
    return sides


def comparison(sides: list[Side], place: int) -> dict[str, Any]:
    """Compare beside load that only `place` decides."""
    generator = random.Random(place)
    number, on_s = generator.randint(0, 3), math.exp(generator.uniform(math.log(0.1), math.log(30)))
    off_s = on_s * math.exp(generator.uniform(-1.5, 2.5))
    began = time.monotonic()
    with loaded.neighbours(number, on_s=on_s, off_s=off_s, seed=1000 * place):
        blocks = measure_in_lockstep(*sides, budget_s=commits.BUDGET_S)
    rows = judge_blocks(blocks, margin=commits.MARGIN)
    load = {"neighbours": number, "on_s": on_s, "off_s": off_s, "took_s": time.monotonic() - began}
    return {"place": place, **load, "verdict": verdict_of(rows), "rows": [asdict(row) for row in rows]}


def main() -> int:
    """Compare as often as is missing, and print what came of all."""
    parser = argparse.ArgumentParser(description="compare a commit with itself beside load and count the reds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--at-most", type=int, default=sys.maxsize, help="comparisons of this call")
    parser.add_argument("--commit", default="HEAD")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "compares.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    missing = range(len(lines), min(chosen.comparisons, len(lines) + chosen.at_most))
    if missing:
        with scratch_directory("havoc-compare-") as folder:
            sides = both_sides(commits.commit_of(chosen.commit), folder)
            for place in missing:
                lines.append(comparison(sides, place))
                with path.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(f"{len(lines)} of {chosen.comparisons}: {lines[-1]['verdict']}", flush=True)
    words = [line["verdict"] for line in lines]
    counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
    print(f"{len(words)} comparisons of a commit with itself: {counts}")
    return int("worse" in words)


if __name__ == "__main__":
    sys.exit(main())
