"""What every format costs a model, as a table: `python tests/export/format_table.py BASE [--fold 0.05] [NAMES ...]`.

Each row is an export with its own proof, so the cost is measured on the bundled sample (or `--text FILE`, of which only
the last quarter is measured where a format calibrates), through ONNX Runtime, against the exact weights in fp32.
`--fold S` first multiplies every singular value of every projection by 1 + S times a random normal number, as experts
do: a file's own grid is gone then.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from havoc_core.adapt.svf import fold_matrix, matrix_basis
from havoc_core.export.layout import plan_layout
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.source import Source, open_source
from havoc_core.export.storing import bits_per_weight
from havoc_core.model.structure import Structure

NAMES = ("int8", "int4", "int4a-hqq", "int4a-k_quant", "int4-gptq", "int4a-gptq")
NAMES += ("int4-gptq-mix4.75", "int4-gptq-mix5.0", "int4-gptq-mix5.5", "int4a-gptq-mix5.5")


def folded(source: Source, size: float) -> Source:
    """The base with every singular value of its projections moved at random (seed 0)."""
    generator, tensors = torch.Generator().manual_seed(0), dict(source.tensors)
    for name in sorted(tensors):
        if name.endswith("_proj.weight"):
            weight = tensors[name].to(torch.float32)
            basis = matrix_basis(weight, name=name)
            delta = torch.randn(min(weight.shape), generator=generator) * size
            tensors[name] = fold_matrix(weight, basis.factor, basis.side, delta)
    return replace(source, tensors=tensors)


def row(source: Source, name: str, text: Path | None) -> str:
    """One format's line: bits a weight, KL mean and 99th percentile, equal first choices, perplexity ratio."""
    structure = Structure.named(name)
    with tempfile.TemporaryDirectory() as folder:
        manifest = read_manifest(export_artifact(source, Path(folder) / "a", structure=structure, calibration=text))
    cost, said = manifest.format_cost or {}, manifest.calibration
    bits = said["bits_per_weight"] if said else bits_per_weight(plan_layout(source.config, structure))
    figures = (
        f"{cost['kl_mean']:.4f} | {cost['kl_p99']:.3f} | {cost['top1_share']:.1%} | {cost['perplexity_ratio']:.3f}"
    )
    return f"| `{name}` | {bits or 0:.3f} | {figures} |"


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--fold", type=float, default=0.0)
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    source = open_source(args.base)
    if args.fold:
        source = folded(source, args.fold)
    print("| structure | bits a weight | KL mean | KL p99 | same next token | perplexity |\n|---|---|---|---|---|---|")
    for name in args.names:
        print(row(source, name, args.text), flush=True)


if __name__ == "__main__":
    main()
