"""Everything a lent card can settle, in one go: `python tests/gpu/day.py --out DIR [--base FILE.gguf]`.

docs/gpu-day.md tells how to bring it there.

Each step is a command of its own whose output and exit code are kept in DIR; one that fails does not stop the others.
Nothing is downloaded. Steps that no longer fit into `--minutes` are left out, and day.json says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HAVOC = (sys.executable, "-m", "havoc_core")
VARIANTS = {
    "fp32": ("--weights", "fp32", "--for", "cuda"),
    "fp16": ("--weights", "fp16", "--activations", "fp16", "--for", "cuda", "--cache", "static", "--cache-len", "1024"),
    "int8": ("--weights", "int8", "--activations", "fp16", "--for", "cuda", "--cache", "static", "--cache-len", "1024"),
    "int4": ("--weights", "int4", "--activations", "fp16", "--for", "cuda", "--cache", "static", "--cache-len", "1024"),
}
"""Weight formats, and how an artifact of each is written for a card: fp32 with a cache that grows."""


@dataclass(frozen=True)
class Step:
    """One command: what it is called, its words, the seconds it may take, and the exit codes that are right."""

    name: str
    words: tuple[str, ...]
    most_s: float = 120.0
    right: tuple[int, ...] = (0,)


def steps(out: Path, base: str | None) -> list[Step]:
    """The whole day in order, the cheap and certain first."""
    days = [
        Step("doctor", (*HAVOC, "doctor"), 60),
        Step("card", (sys.executable, str(HERE / "card_target.py"), str(out / "target.toml")), 60),
    ]
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s")
    adaptation = str(HERE / "test_adaptation_on_card.py")
    tests = Step("tests", (*pytest, str(HERE), "--ignore", adaptation), 240)
    days += [*_of_model(out, "nano", "nano"), tests, Step("adaptation", (*pytest, adaptation), 240)]
    if base is not None:
        days += _of_model(out, "model", base)
    return days


def _of_model(out: Path, name: str, source: str) -> list[Step]:
    """Export in every format, screen all of them, race torch, and measure and gate two."""
    artifacts = {variant: str(out / "artifacts" / f"{name}-{variant}") for variant in VARIANTS}
    found = [
        Step(f"export-{name}-{variant}", (*HAVOC, "export", source, *words, "--out", artifacts[variant]))
        for variant, words in VARIANTS.items()
    ]
    found.append(Step(f"screen-{name}", (sys.executable, str(HERE / "screen.py"), *artifacts.values())))
    found.append(Step(f"eager-{name}", (sys.executable, str(HERE / "eager.py"), source, artifacts["fp16"])))
    for variant, options in (("fp16", ("--cuda-graph",)), ("fp32", ())):
        record = str(out / f"bench-{name}-{variant}")
        bench = (*HAVOC, "bench", artifacts[variant], "--n", "0", "--wait", "0", *options, "--out", record)
        gate = (*HAVOC, "gate", record, "--artifact", artifacts[variant], "--target")
        found.append(Step(f"bench-{name}-{variant}", bench))
        found.append(Step(f"gate-{name}-{variant}", (*gate, str(out / "target.toml")), 60))
        found.append(Step(f"gate-gtx1660-{name}-{variant}", (*gate, "gtx1660"), 60, right=(5,)))
    return found


def main() -> int:
    """Run the steps and tell which went as they should; 0 where all did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="a .gguf file or Hugging Face directory to measure beside nano")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step begins after so many (default: 8)")
    parser.add_argument("--only", nargs="*", help="steps whose names begin so")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began, told = time.monotonic(), []
    for step in steps(args.out.resolve(), args.base):
        if args.only and not step.name.startswith(tuple(args.only)):
            continue
        left_s = 60 * args.minutes - (time.monotonic() - began)
        told.append(_run(step, args.out, left_s))
        print("{name:28} {verdict:9} exit {exit_code}, {seconds:.1f} s".format(**told[-1]), flush=True)
    (args.out / "day.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0 if all(item["verdict"] == "right" for item in told) else 1


def _run(step: Step, out: Path, left_s: float) -> dict[str, Any]:
    if left_s <= 0:
        return {"name": step.name, "verdict": "left out", "exit_code": None, "seconds": 0.0}
    began = time.monotonic()
    with (out / f"{step.name}.txt").open("w") as log:
        try:
            done = subprocess.run(step.words, stdout=log, stderr=log, timeout=min(step.most_s, left_s), check=False)
            exit_code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            exit_code = None
    verdict = "right" if exit_code in step.right else "wrong"
    return {"name": step.name, "verdict": verdict, "exit_code": exit_code, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
