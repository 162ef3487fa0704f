"""What `havoc plan` says a CPU process takes, beside what it takes: 6 shapes in 5 formats, and a table of the pairs.

python tests/perf/memory_pairs.py FOLDER

Lines that FOLDER/pairs.jsonl holds already are not measured again. Memory is the resident set's high-water mark of one
fresh process that reads 512 tokens and writes 128, at batch 1 on one thread, so nothing else on the machine matters.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from havoc_core.bench.judge.targets import load_target
from havoc_core.bench.measure import measure_cost
from havoc_core.bench.plan import peak_memory_bytes
from havoc_core.export.package import export_artifact
from havoc_core.model.config import AttentionConfig, HavocConfig, MLPConfig
from havoc_core.model.structure import Structure
from havoc_core.model.transformer import HavocModel

FORMATS = ("fp32", "int8", "int8-cfp32", "int4", "int4-cfp32")
SHAPES = {
    "pico, 1024 tokens": dataclasses.replace(HavocConfig.pico(), max_seq_len=1024),
    "nano": HavocConfig.nano(),
    "width 256, 8 layers, vocabulary 8,192": dataclasses.replace(
        HavocConfig.edge_135m(),
        vocab_size=8192,
        d_model=256,
        num_layers=8,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
        mlp=MLPConfig(hidden_dim=768),
    ),
    "width 512, 12 layers, vocabulary 32,000": dataclasses.replace(
        HavocConfig.edge_135m(),
        vocab_size=32_000,
        d_model=512,
        num_layers=12,
        attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64),
        mlp=MLPConfig(hidden_dim=1408),
    ),
    "edge-135m": HavocConfig.edge_135m(),
    "edge-135m, head of its own": dataclasses.replace(HavocConfig.edge_135m(), tie_word_embeddings=False),
}
TARGET = load_target("host")


def main(folder: str) -> None:
    """Measure what is missing, then print the table."""
    path = Path(folder) / "pairs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(pair["shape"], pair["format"]) for pair in known}
    for shape, config in SHAPES.items():
        missing = [name for name in FORMATS if (shape, name) not in done]
        with tempfile.TemporaryDirectory() as scratch:
            if missing:
                HavocModel.from_config(config).save_pretrained(Path(scratch) / "base")
            for name in missing:
                artifact = export_artifact(
                    Path(scratch) / "base", Path(scratch) / name, structure=Structure.named(name)
                )
                peak_bytes = measure_cost(artifact, num_threads=1).peak_bytes
                pair = {"shape": shape, "format": name, "measured": peak_bytes}
                known.append(pair)
                with path.open("a") as file:
                    file.write(json.dumps(pair) + "\n")
                print(json.dumps(pair), flush=True)
    print("| shape | format | predicted | measured | ratio |\n|---|---|---|---|---|")
    for pair in known:
        _, predicted = peak_memory_bytes(SHAPES[pair["shape"]], Structure.named(pair["format"]), TARGET)
        ratio = predicted / pair["measured"]
        print(
            f"| {pair['shape']} | {pair['format']} | {predicted / 1e6:.0f} MB | {pair['measured'] / 1e6:.0f} MB "
            f"| {ratio:.2f} |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
