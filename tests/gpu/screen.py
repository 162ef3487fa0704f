"""Seconds on the card for each artifact, as a search measures: prefill, decoding with and without capture, memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from havoc_core.bench.measure import measure_cost
from havoc_core.export.runtime.devices import CUDA_PROVIDER as CUDA
from havoc_core.storage import read_json


def main(folders: list[str]) -> None:
    """Print one JSON line for each artifact and way of stepping."""
    for folder in folders:
        cache = read_json(Path(folder) / "manifest.json")["graph"].get("cache", "dynamic")
        for captures in (False, True) if cache == "static" else (False,):
            cost = measure_cost(Path(folder), provider=CUDA, captures_steps=captures)
            series = cost.record.memory.vram[0]
            line = {
                "artifact": Path(folder).name,
                "captures_steps": captures,
                "prefill_ms": cost.prefill_ms,
                "decode_tok_per_s": cost.decode_tok_per_s,
                "peak_vram_bytes": cost.peak_bytes,
                "method": series.method,
                "cross_check": [series.cross_check_method, series.cross_check_bytes],
                "weight_bytes": cost.record.subject.weight_bytes,
                "disturbance": cost.disturbance,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
