"""How far graphs are from float64 in units of torch's own error, and what formats cost: the tables of two decisions.

    python tests/export/parity_table.py [HF-DIRECTORY ...] [--widths 64,256,1024]

Random models of several widths, depths, architectures and kinds of weights, the bundled nano and every directory that
is named, each in five structures: nothing is refused, the ratio of every case is kept, and one line a model says its
median and its largest by what the error is measured against. The second table is what the five cost on the bundled
text, of every model that can read it: docs/decisions/0016 and 0017.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from havoc_core.export import parity
from havoc_core.export.package import export_artifact
from havoc_core.export.runtime.artifact import read_manifest
from havoc_core.export.runtime.options import GraphOptions
from havoc_core.export.source import Source, open_source
from havoc_core.model.config import AttentionConfig, HavocConfig, MLPConfig
from havoc_core.model.structure import Structure
from havoc_core.model.tensors import tensor_shapes

STRUCTURES = [
    Structure(),
    Structure("int4", compute="fp32"),
    Structure("int8", compute="int8"),
    Structure("int4", compute="int8"),
    Structure("fp16", "fp16"),
]
MEASURES = {
    "torch fp32": "fp32",
    "torch fp32 over int8 activations": "int8 activations",
    "torch fp32 rounded to fp16": "fp16",
}
WIDTHS = (64, 256, 1024, 4096)


def shape(width: int, *, kind: str, num_layers: int) -> HavocConfig:
    """A decoder of that width; wide ones are shallow, so that the table is made in minutes."""
    head_dim = 16 if width < 256 else 64
    attention = AttentionConfig(
        num_heads=width // head_dim, num_kv_heads=max(width // head_dim // 4, 1), head_dim=head_dim
    )
    return HavocConfig.pico().replace(
        vocab_size=1024,
        d_model=width,
        num_layers=num_layers,
        attention=replace(attention, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3"),
        mlp=MLPConfig(hidden_dim=min(2 * width, 4096)),
        norm_eps=1e-6 if kind != "llama" else 1e-5,
    )


def weights(config: HavocConfig, *, seed: int, has_outliers: bool) -> dict[str, torch.Tensor]:
    """Weights of trained scale; with outliers, a few columns thirty times as large, as real activations have them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in tensor_shapes(config).items():
        noise = torch.randn(size, generator=generator)
        if len(size) == 2:
            tensors[name] = noise * (1.0 if "embed_tokens" in name else 1.2 * size[1] ** -0.5)
        else:
            tensors[name] = noise * 0.3 if name.endswith("bias") else 1 + noise * 0.2
        if has_outliers and name.endswith("embed_tokens.weight"):
            tensors[name][:, :: max(size[1] // 4, 1)] *= 30
        if has_outliers and name.endswith("layernorm.weight"):
            tensors[name][torch.randperm(size[0], generator=generator)[:2]] *= 10
    return tensors


def sources(widths: list[int], directories: list[str]) -> Iterator[tuple[str, Source]]:
    """Models by name; wide ones in fewer variants."""
    for name in ["nano", *directories]:
        yield Path(name).name, open_source(name)
    for width in widths:
        kinds = ["llama", "qwen2", "qwen3"] if width <= 256 else ["llama", "qwen3"] if width <= 1024 else ["llama"]
        variants = [("llama", False), *((kind, True) for kind in kinds)] if width <= 256 else [(k, True) for k in kinds]
        for kind, has_outliers in variants:
            config = shape(width, kind=kind, num_layers=8 if width <= 256 else 2)
            tensors = weights(config, seed=width, has_outliers=has_outliers)
            name = f"random {kind}{', outliers' if has_outliers else ''}, width {width}, {config.num_layers} layers"
            yield name, Source("random", config, tensors, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directories", nargs="*")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    args = parser.parse_args()
    parity.MAX_RATIO = 1e9
    torch.set_num_threads(1)
    costs: list[str] = []
    print("| model | cases | " + " | ".join(f"{name}: median, most" for name in MEASURES.values()) + " |")
    print("|---|---|" + "---|" * len(MEASURES))
    for name, source in sources([int(width) for width in args.widths.split(",") if width], args.directories):
        ratios: dict[str, list[float]] = defaultdict(list)
        for structure in STRUCTURES:
            dialect = "contrib" if structure.activation_dtype == "fp16" else "standard"
            with tempfile.TemporaryDirectory() as folder:
                options = GraphOptions(dialect=dialect)
                manifest = read_manifest(
                    export_artifact(source, Path(folder) / "a", structure=structure, options=options)
                )
            for case in manifest.parity["cases"]:
                ratios[MEASURES[case["measure"]]].append(case["ratio"])
            costs += _cost_row(name, structure, manifest.format_cost or {})
        cells = [f"{np.median(ratios[key]):.2f}, {max(ratios[key]):.2f}" for key in MEASURES.values()]
        print(f"| {name} | {sum(map(len, ratios.values()))} | " + " | ".join(cells) + " |", flush=True)
    print("\n| model | structure | KL mean | KL p99 | same next token | perplexity |\n|---|---|---|---|---|---|")
    print("\n".join(costs))


def _cost_row(name: str, structure: Structure, cost: dict[str, Any]) -> list[str]:
    if cost["text_sha256"] is None:
        return []
    kl = f"{cost['kl_mean']:.2g} | {cost['kl_p99']:.2g}"
    return [f"| {name} | {structure} | {kl} | {cost['top1_share']:.1%} | x {cost['perplexity_ratio']:.4g} |"]


if __name__ == "__main__":
    main()
