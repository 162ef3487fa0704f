"""The model card (`README.md`) of an artifact: what it is, how it was checked, how to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..model.structure import Structure
    from .artifact import ArtifactManifest
    from .source import Source


def model_card(source: Source, alpha: Mapping[str, float], structure: Structure, manifest: ArtifactManifest) -> str:
    """Markdown; every figure comes from the manifest, so the card cannot say anything else."""
    config = source.config
    kind = "text and vision" if config.vision is not None else "text"
    random_note = "\n**The weights are random**: fit for measuring cost, not for answers.\n" if source.is_random else ""
    return f"""---
library_name: onnxruntime
pipeline_tag: {"image-text-to-text" if config.vision is not None else "text-generation"}
tags: [havoc, onnx]
---
# {source.name}, {structure.weight_format} weights, {structure.activation_dtype} activations
{random_note}
A {kind} decoder of {manifest.num_parameters:,} parameters ({config.num_layers} layers, width {config.d_model},
{config.attention.num_heads} query and {config.attention.num_kv_heads} key-value heads, {config.vocab_size:,} tokens,
context {config.max_seq_len:,}), exported by HAVOC {manifest.versions["havoc"]}.

| made from | |
|---|---|
| base | {source.name}, weights SHA-256 `{manifest.base_hash}` |
| mixture | {_mixture(alpha, manifest.rule)} |
| weight format | {structure.weight_format}{_blocks(structure)} |
| activations | {structure.activation_dtype} |
| graph | {manifest.graph["dialect"]} dialect, opset {manifest.graph["opset"]}, IR {manifest.graph["ir_version"]} |

## Checked against torch when it was written

{_parity_table(manifest)}

## Run

    havoc verify DIR
    havoc generate DIR --prompt "..."
    havoc bench DIR --out report

`manifest.json` lists the SHA-256 of every file; `mixture.json` and `experts/` are enough to fold the weights again.
"""


def _mixture(alpha: Mapping[str, float], rule: str) -> str:
    if not alpha:
        return "none: the base itself"
    return ", ".join(f"{domain} {weight:g}" for domain, weight in alpha.items()) + f" (rule {rule})"


def _blocks(structure: Structure) -> str:
    return f", symmetric, blocks of {structure.block_size}" if structure.is_quantized else ""


def _parity_table(manifest: ArtifactManifest) -> str:
    lines = ["| case | largest difference | mean | top-1 |", "|---|---|---|---|"]
    drift = manifest.parity["format_drift"] | {"name": "format: stored weights against the exact fold"}
    lines += [
        f"| {case['name']} | {case['max_abs_diff']:.2e} | {case['mean_abs_diff']:.2e} | {case['top1_share']:.3f} |"
        for case in [*manifest.parity["cases"], drift]
    ]
    return "\n".join(lines)
