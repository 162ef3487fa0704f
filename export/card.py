"""The model card (`README.md`) of an export: what it is, how to run it, how it was checked, its limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .runtime.live_table import EXPERTS_FILE
from .runtime.options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..model.config import HavocConfig
    from ..model.structure import Structure
    from .runtime.artifact import ArtifactManifest
    from .runtime.companions import Licence
    from .source import Source

_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.")
_RANDOM = "**The weights are random**: fit for measuring cost, not for answers.\n\n"
_GENAI = """
or, with [onnxruntime-genai](https://onnxruntime.ai/docs/genai/), which can open this folder directly:

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length={length})
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("..."))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""


def model_card(
    source: Source,
    alpha: Mapping[str, float],
    structure: Structure,
    manifest: ArtifactManifest,
    licence: Licence,
    *,
    reads_text: bool,
    has_genai: bool,
) -> str:
    """Card of an artifact, in Markdown; every figure comes from the manifest, so the card cannot say anything else."""
    config = source.config
    return f"""{_front_matter(config, licence, library="onnxruntime", tags="havoc, onnx")}
# {_inline(source.name)}, {structure.weight_format} weights, {structure.activation_dtype} activations

{_RANDOM if source.is_random else ""}{_sentence(config, manifest.num_parameters)}
as an ONNX graph by HAVOC {manifest.versions["havoc"]}.

## Run it

```sh
pip install "havoc-core[edge]"
{'havoc generate . --prompt "..."' if reads_text else "# no tokenizer came with the base: token ids in, logits out"}
havoc bench . --out ../report     # latency, throughput, memory on this machine
```
{_GENAI.format(length=min(config.max_seq_len, 256)) if reads_text and has_genai else ""}
`model.onnx` is a plain graph: any program that uses ONNX Runtime can run it.

## What it was made from

| | |
|---|---|
| base | {_inline(source.name)}, weights SHA-256 `{manifest.base_hash}` |
| mixture | {_mixture(alpha, manifest.rule)} |{_live(manifest)}
| weight format | {structure.weight_format}{_blocks(structure)}{_rank(structure, manifest)} |
| activations | {structure.activation_dtype} |
| graph | {options_of(manifest).description}, opset {manifest.graph["opset"]}, IR {manifest.graph["ir_version"]} |

`manifest.json` lists the SHA-256 of every file, `bom.cdx.json` is its bill of materials (CycloneDX 1.6), `mixture.json`
{_folding(alpha)}. `havoc verify . --base BASE` hashes every file, folds the weights again and compares the logits.

## How it was checked

Against the same forward pass in float64 over the stored weights, when it was written; a graph is refused above
{manifest.parity["max_ratio"]:g} times torch's own error:

{_parity_table(manifest)}

What the format costs: {cost_sentence(manifest.format_cost or {})}.

## Limits

{_limits(config, manifest, structure)}

## Licence

{_licence(source, licence)}
"""


def huggingface_card(source: Source, alpha: Mapping[str, float], rule: str, dtype: str, licence: Licence) -> str:
    """Card of a Hugging Face directory that holds the folded model."""
    config = source.config
    return f"""{_front_matter(config, licence, library="transformers", tags="havoc")}
# {_inline(source.name)}, {"mixture folded in" if alpha else "as exported"}, {dtype}

{_RANDOM if source.is_random else ""}The weights of {_inline(source.name)}, SHA-256 `{source.hash}`.
Mixture: {_mixture(alpha, rule)}.

`mixture.json` names their sources; `havoc import .` checks the directory and describes it.

## Licence

{_licence(source, licence)}
"""


def _front_matter(config: HavocConfig, licence: Licence, *, library: str, tags: str) -> str:
    """The metadata of a model page; a licence without an identifier is `other` with a link to its text."""
    lines = ["---", f"library_name: {library}"]
    lines += [f"pipeline_tag: {'image-text-to-text' if config.vision is not None else 'text-generation'}"]
    lines += [f"tags: [{tags}]"]
    if licence.identifier or licence.file:
        lines += [f"license: {licence.identifier or 'other'}"]
    if licence.file and licence.identifier in {None, "other"}:
        lines += ["license_name: see-file", f"license_link: {licence.file}"]
    return "\n".join([*lines, "---"])


def _sentence(config: HavocConfig, num_parameters: int) -> str:
    kind = "text and vision" if config.vision is not None else "text"
    attention = config.attention
    return (
        f"A {kind} decoder of {num_parameters:,} parameters ({config.num_layers} layers, width {config.d_model},\n"
        f"{attention.num_heads} query and {attention.num_kv_heads} key-value heads, {config.vocab_size:,} tokens, "
        f"context {config.max_seq_len:,}), written"
    )


def _inline(name: str) -> str:
    """A folder's name as plain words in any place: no markup, no link, no table cell, no tag."""
    escaped = _MARKUP.sub(r"\\\g<0>", printable(name))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _live(manifest: ArtifactManifest) -> str:
    """The row of a live artifact: what can be chosen, and who reads what."""
    if manifest.live is None:
        return ""
    choice = f"{len(manifest.live.matrices)} matrices of every expert are in `{EXPERTS_FILE}`"
    how = "`havoc generate . --alpha NAME=W,...` answers with any mixture; other programs read the one above"
    return f"\n| live | {choice}: {how} |"


def _mixture(alpha: Mapping[str, float], rule: str) -> str:
    if not alpha:
        return "none: the base itself"
    return ", ".join(f"{domain} {weight:g}" for domain, weight in alpha.items()) + f" (rule {rule})"


def _folding(alpha: Mapping[str, float]) -> str:
    return "and `experts/` are enough to fold the weights again" if alpha else "names the base"


def _rank(structure: Structure, manifest: ArtifactManifest) -> str:
    if structure.rank_fraction == 1:
        return ""
    return f", {structure.rank_fraction:g} of the rank: {manifest.graph['factored']} as two factors"


def _blocks(structure: Structure) -> str:
    if not structure.is_quantized:
        return ""
    if structure.weight_format == "keep":
        return ": the blocks of the file as they are"
    symmetry = "symmetric" if structure.is_symmetric else "asymmetric"
    mixed = (
        "" if structure.average_bits is None else f", int8 where it matters most up to {structure.average_bits:g} bits"
    )
    return f", {symmetry}, blocks of {structure.block_size}, {structure.quantizer}{mixed}"


def _parity_table(manifest: ArtifactManifest) -> str:
    lines = ["| way of running it | error, of the logits' spread | in units of torch's own | torch computing in |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {case['name']} | {case['error']:.1e} | {case['ratio']:.2f} | {case['measure']} |"
        for case in manifest.parity["cases"]
    ]
    return "\n".join(lines)


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """The cost of the format, in one sentence."""
    return (
        f"KL divergence from the exact fold {cost['kl_mean']:.2g} nats on average ({cost['kl_p99']:.2g} at the 99th "
        f"percentile), the same next token at {cost['top1_share']:.1%}, perplexity times "
        f"{cost['perplexity_ratio']:.4g}, over {cost['num_positions']} positions of {_sample(cost)}"
    )


def _sample(cost: Mapping[str, Any]) -> str:
    if cost["text_sha256"] is None:
        return "random ids"
    return f"{'the bundled' if cost['text'] == 'bundled text' else 'a given'} text"


def _limits(config: HavocConfig, manifest: ArtifactManifest, structure: Structure) -> str:
    return "\n".join(f"- {line}" for line in _limit_lines(config, manifest, structure))


def _limit_lines(config: HavocConfig, manifest: ArtifactManifest, structure: Structure) -> Iterator[str]:
    yield f"At most {config.max_seq_len:,} tokens of prompt and answer together."
    if structure.is_quantized:
        share = f"{(manifest.format_cost or {})['top1_share']:.1%} of the next tokens"
        yield f"{structure.weight_format} weights keep {share}; only an evaluation shows the cost in answers."
    if structure.activation_dtype == "fp16":
        yield "Activations beyond 65,504 overflow in fp16; the check above found none on its inputs."
    yield "This card does not state speed or accuracy: `havoc bench` measures them, `havoc gate` judges them."


def _licence(source: Source, licence: Licence) -> str:
    name = _inline(source.name)
    where = f"; the text is in `{licence.file}`" if licence.file else ""
    if licence.identifier:
        return f"That of the base, {name}: {licence.identifier}{where}."
    if licence.file:
        return f"That of the base, {name}: see `{licence.file}`."
    if source.is_random:
        return "Random weights have no licence."
    return f"That of the base, {name}. Its directory names no licence: ask its authors before you publish this."
