"""Write an artifact: fold, plan the layout, write, prove, sign; the folder appears complete or not at all.

Everything is built under a temporary name next to `out`. Weights are written one tensor at a time. ONNX Runtime opens
the finished graphs, and they are compared with torch. Only then the manifest is written and the folder renamed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..adapt.expert import save_expert
from ..adapt.mixture import mix
from ..adapt.svf import matrix_basis
from ..errors import HavocError
from ..model.cost import num_parameters
from ..model.hf_config import to_hf, with_ends
from ..model.pretrained import generation_fields
from ..model.structure import Structure
from ..model.tokenizer import Tokenizer
from ..progress import SILENT, Progress
from ..storage import new_directory, sha256_file, write_bytes, write_json, write_text
from .bom import BOM_FILE, bill_of_materials
from .calibration import held_out, read_calibration
from .card import model_card
from .datafile import StoredWeights, write_data_file
from .fold import FoldedTensors
from .genai import genai_config
from .graph import build_graphs, serialize
from .keep import require_unfolded
from .layout import DATA_FILE, plan_layout
from .live import expert_folds, live_layout, prove_switches, require_live, write_experts
from .parity import ParityReport
from .proof import NOWHERE_ELSE, Proof, prove
from .runtime.artifact import MANIFEST, ArtifactFile, ArtifactManifest, refuse_files_of_others
from .runtime.companions import carried_files, carry, licence_of
from .runtime.live_table import EXPERTS_FILE, LiveTable
from .runtime.options import DEFAULT_OPTIONS, GraphOptions
from .runtime.sample import Sample, read_sample
from .source import Source, open_source
from .storing import Storage, plan_storage
from .tape import ACCURACY_LEVELS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from ..adapt.expert import Expert
    from ..adapt.mixture import MixingRule
    from ..adapt.svf import Basis, MatrixBasis
    from ..model.checkpoint import Base
    from ..model.config import HavocConfig
    from .layout import Layout
    from .runtime.signature import Signer

EXPERTS_FOLDER, MIXTURE_FILE = "experts", "mixture.json"
_MAX_PACKED_BYTES = 1 << 29
"""Above this number of bytes, ONNX Runtime's packed copy of the weights would decide the memory of an export."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Experts, their weights and the rule: everything besides the base that decides the folded weights."""

    experts: tuple[Expert, ...] = ()
    alpha: tuple[float, ...] = ()
    rule: MixingRule = "delta"

    def deltas(self, source: Source, basis: Basis | None) -> dict[str, Tensor]:
        """The mixture's delta by tensor name; none without experts. Experts of another base are a `HavocError`."""
        if not self.experts:
            return {}
        for expert in self.experts:
            if expert.base_hash != source.hash:
                raise HavocError(
                    f"the {expert.domain} expert was trained on base {expert.base_hash[:12]}, {source.name} is base "
                    f"{source.hash[:12]}; z vectors fit only the base they were trained on"
                )
        values = None
        if self.rule == "renorm":
            names = sorted({name for expert in self.experts for name in expert.deltas} & set(source.tensors))
            values = {name: _basis_of(source, basis, name).singular_values for name in names}
        return mix(self.experts, self.alpha, rule=self.rule, singular_values=values)

    @property
    def weights(self) -> dict[str, float]:
        """Alpha by domain."""
        return {expert.domain: float(weight) for expert, weight in zip(self.experts, self.alpha, strict=True)}


def _basis_of(source: Source, basis: Basis | None, name: str) -> MatrixBasis:
    """One matrix's basis; the bases of all, computed and kept, would be larger than the base."""
    return matrix_basis(source.tensors[name], name=name) if basis is None else basis.matrices[name]


def export_artifact(
    base: Source | Base | Path | str,
    out: Path,
    *,
    experts: Sequence[Expert] = (),
    alpha: Sequence[float] = (),
    rule: MixingRule = "delta",
    structure: Structure | None = None,
    options: GraphOptions = DEFAULT_OPTIONS,
    basis: Basis | None = None,
    signer: Signer | None = None,
    calibration: Path | None = None,
    is_compute_open: bool = False,
    is_live: bool = False,
    also_on: Mapping[str, str] = NOWHERE_ELSE,
    progress: Progress = SILENT,
) -> Path:
    """Fold `experts` with weights `alpha` into `base` and write the artifact folder `out`; return it.

    Without experts the base itself is exported. A given `basis` is not computed again. With a `signer` the artifact is
    signed before it appears. `calibration` is the user's text for calibration and for the cost of the format, instead
    of the bundled ones. With `is_compute_open`, products that would round activations to int8 compute in fp32 if only
    that keeps the cost small (`FormatCost.is_small`). With `is_live` the artifact also has the folds of the base and of
    every expert alone, so that a device can choose alpha at run time. The graph is proven on the CPU and on the
    providers of `also_on` (`prove`). An existing artifact at `out` is replaced when the new one is complete. Raises
    `MeasurementError` if the graph does not compute the model of the weights, `HavocError` for a problem with the input
    or the disk; then nothing remains at `out`.
    """
    source = open_source(base)
    structure = structure or Structure()
    require_companions(source)
    require_calibration(source, structure, calibration)
    plan_layout(source.config, structure)  # a structure that this model cannot have is refused before any work
    options = options.fitted(source.config.max_seq_len)
    _require_possible(structure, source, experts, also_on)
    mixture = Mixture(experts=tuple(experts), alpha=tuple(alpha), rule=rule)
    if is_live:
        require_live(experts, structure)
    refuse_files_of_others(out)
    with new_directory(out, marker=MANIFEST) as folder, _torch_threads(torch.get_num_threads() if experts else 1):
        source.read_hash(progress)
        deltas = mixture.deltas(source, basis)
        folded = FoldedTensors(source.tensors, deltas, basis)
        storage = plan_storage(source, structure, folded, calibration, progress)
        replaceable = [item.source for item in live_layout(storage.layout, experts, rule)] if is_live else []
        hashes = {DATA_FILE: _write_model(folder, source.config, storage, options, folded, progress, replaceable)}
        live = None
        if is_live:
            folds = expert_folds(source, experts, deltas, rule=rule, layout=storage.layout, basis=basis)
            live, hashes[EXPERTS_FILE] = write_experts(
                folder / EXPERTS_FILE, folds, num_matrices=len(replaceable), progress=progress
            )
        write_companions(folder, source, mixture, options)
        proof = _prove(folder, source, storage, options, folded, calibration, also_on, progress)
        if is_compute_open and structure.compute == "int8" and not proof.cost.is_small:
            exact = replace(storage, structure=replace(structure, compute="fp32"))
            _write_graphs(folder, source.config, exact, options)
            exact_proof = _prove(folder, source, exact, options, folded, calibration, also_on, progress)
            if exact_proof.cost.is_small:
                storage, proof = exact, exact_proof
            else:
                _write_graphs(folder, source.config, storage, options)
        if live is not None:
            live, proof = _prove_live(folder, source, storage, options, mixture, live, proof, calibration, progress)
        manifest = replace(_manifest(source, mixture, storage, options, proof), live=live)
        _write_papers(folder, source, mixture, storage.structure, manifest, hashes)
        if signer is not None:
            signer.sign(folder, name=out.resolve().name)
    return out


def _require_possible(
    structure: Structure, source: Source, experts: Sequence[Expert], also_on: Mapping[str, str]
) -> None:
    """Refuse W8A8 on other devices than the CPU, and kept blocks of a base with experts."""
    if structure.is_w8a8 and also_on:
        raise HavocError(f"w8a8 products run on the CPU only, not on {', '.join(also_on.values())}: use --compute int8")
    if structure.weight_format == "keep":
        require_unfolded(source, experts)


@contextlib.contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    """Give torch this number of threads. Only folding is faster with several; beside other work, threads must wait.

    Measured for edge-135m on two busy cores: a forward pass of the probe takes 0.4 s with one, 4 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_model(
    folder: Path,
    config: HavocConfig,
    storage: Storage,
    options: GraphOptions,
    tensors: FoldedTensors,
    progress: Progress,
    replaceable: Collection[str] = (),
) -> str:
    """Write data file and graphs; return the data file's SHA-256."""
    _write_graphs(folder, config, storage, options, replaceable)
    return write_data_file(
        folder / DATA_FILE,
        tensors,
        config=config,
        structure=storage.structure,
        layout=storage.layout,
        blocks_of=storage.blocks_of(tensors, config),
        progress=progress,
    )


def _write_graphs(
    folder: Path, config: HavocConfig, storage: Storage, options: GraphOptions, replaceable: Collection[str] = ()
) -> None:
    graphs = build_graphs(config, storage.structure, options, layout=storage.layout, replaceable=replaceable)
    for name, graph in graphs.items():
        write_bytes(folder / name, serialize(graph))


def require_companions(source: Source) -> None:
    """Read what goes along with the weights before they are folded, which may take long."""
    carried_files(source.directory)
    _ = source.tokenizer


def require_calibration(source: Source, structure: Structure, calibration: Path | None) -> None:
    """Read the user's text before any work: one that cannot be used is a `HavocError`."""
    if calibration is None:
        return
    read = read_calibration if structure.is_calibrated else read_sample
    read(source.config, source.tokenizer, file=calibration)


def write_companions(folder: Path, source: Source, mixture: Mixture, options: GraphOptions) -> None:
    """Write all files but weights and graphs: configurations, tokenizer, licence, experts and mixture."""
    config = source.config
    write_json(folder / "config.json", to_hf(config))
    ends = config if source.tokenizer is None else with_ends(config, source.tokenizer.eos_ids)
    write_json(folder / "generation_config.json", generation_fields(ends))
    if config.vision is None:
        write_json(folder / "genai_config.json", genai_config(ends, options))
    carry(source.directory, folder)
    for expert in mixture.experts:
        save_expert(expert, folder / EXPERTS_FOLDER)
    write_json(folder / MIXTURE_FILE, mixture_document(source, mixture))


def _write_papers(
    folder: Path,
    source: Source,
    mixture: Mixture,
    structure: Structure,
    manifest: ArtifactManifest,
    hashes: dict[str, str],
) -> None:
    """Model card, bill of materials and, last, the manifest: each lists the files written before it.

    `hashes` are the SHA-256 of files that were hashed while they were written.
    """
    licence = licence_of(source.directory)
    reads_text, has_genai = ((folder / name).is_file() for name in ("tokenizer.json", "genai_config.json"))
    card = model_card(source, mixture.weights, structure, manifest, licence, reads_text=reads_text, has_genai=has_genai)
    write_text(folder / "README.md", card)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = replace(manifest, files={name: _file(path, hashes.get(name)) for name, path in files.items()})
    write_json(folder / BOM_FILE, bill_of_materials(source.config, manifest, licence))
    manifest = replace(manifest, files={**manifest.files, BOM_FILE: _file(folder / BOM_FILE)})
    write_json(folder / MANIFEST, manifest.to_json())


def _file(path: Path, sha256: str | None = None) -> ArtifactFile:
    return ArtifactFile(sha256=sha256 or sha256_file(path), num_bytes=path.stat().st_size)


def mixture_document(source: Source, mixture: Mixture) -> dict[str, Any]:
    """The content of `mixture.json`: the sources of the folded weights."""
    return {
        "base": {"name": source.name, "hash": source.hash, "random_weights": source.is_random},
        "experts": [
            {"domain": expert.domain, "alpha": mixture.weights[expert.domain], "hash": expert.hash}
            for expert in mixture.experts
        ],
        "rule": mixture.rule,
        "formula": "W' = U diag(s z) V^T with z from alpha and the experts' deltas by the rule",
    }


def _prove(
    folder: Path,
    source: Source,
    storage: Storage,
    options: GraphOptions,
    folded: FoldedTensors,
    calibration: Path | None,
    also_on: Mapping[str, str],
    progress: Progress,
) -> Proof:
    sample = _sample(folder, source, calibration)
    return prove(
        folder,
        config=source.config,
        structure=storage.structure,
        options=options,
        stored=StoredWeights(folder / DATA_FILE, storage.layout),
        folded=folded,
        layout=storage.layout,
        sample=held_out(sample) if storage.calibration is not None and calibration is not None else sample,
        packs_weights=_is_packed(storage.layout, storage.structure),
        also_on=also_on,
        progress=progress,
    )


def _sample(folder: Path, source: Source, calibration: Path | None) -> Sample:
    """The text that the proofs read."""
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    return read_sample(source.config, tokenizer, file=calibration)


def _prove_live(
    folder: Path,
    source: Source,
    storage: Storage,
    options: GraphOptions,
    mixture: Mixture,
    live: LiveTable,
    proof: Proof,
    calibration: Path | None,
    progress: Progress,
) -> tuple[LiveTable, Proof]:
    """The table with its fingerprints, and the proof with the cases of every switch."""
    live, cases = prove_switches(
        folder,
        live,
        config=source.config,
        options=options,
        stored=StoredWeights(folder / DATA_FILE, storage.layout),
        alpha=mixture.weights,
        rule=mixture.rule,
        sample=_sample(folder, source, calibration),
        progress=progress,
    )
    return live, replace(proof, parity=ParityReport(cases=(*proof.parity.cases, *cases)))


def _is_packed(layout: Layout, structure: Structure) -> bool:
    """Whether the runtime may copy the weights into its own order: quantized products are slow without, floats not.

    The manifest says it, because int8 products over packed weights round differently.
    """
    return structure.is_quantized and layout.num_bytes <= _MAX_PACKED_BYTES


def _manifest(
    source: Source,
    mixture: Mixture,
    storage: Storage,
    options: GraphOptions,
    proof: Proof,
) -> ArtifactManifest:
    structure = storage.structure
    names = ("onnxruntime-gpu", "onnxruntime")
    runtime = next((found for name in names if (found := _installed(name))), "unknown")
    return ArtifactManifest(
        files={},
        base_hash=source.hash,
        base_name=source.name,
        has_random_weights=source.is_random,
        alpha=mixture.weights,
        rule=mixture.rule,
        expert_hashes={expert.domain: expert.hash for expert in mixture.experts},
        structure={name: str(value) for name, value in structure.to_fields().items()},
        graph=graph_fields(source.config, structure, options),
        versions={
            "havoc": __version__,
            "onnxruntime": runtime,
            **{name: version(name) for name in ("onnx-ir", "numpy", "torch")},
        },
        num_parameters=num_parameters(source.config),
        fingerprint=proof.fingerprint,
        parity={
            **proof.parity.to_json(),
            "has_packed_weights": _is_packed(storage.layout, structure),
        },
        format_cost=proof.cost.to_json(),
        calibration=storage.to_json(),
    )


def graph_fields(config: HavocConfig, structure: Structure, options: GraphOptions) -> dict[str, Any]:
    """The manifest's description of the graph; `options` are adapted to the model's context."""
    level = {"accuracy_level": ACCURACY_LEVELS[structure.compute]} if structure.has_compute else {}
    return {
        **options.to_json(),
        "opset": options.opset,
        "ir_version": options.ir_version,
        **level,
        **_factored(config, structure),
    }


def _factored(config: HavocConfig, structure: Structure) -> dict[str, str]:
    """The number of projections stored as two factors, if the structure asks for factors."""
    if structure.rank_fraction == 1:
        return {}
    layout = plan_layout(config, structure)
    num_projections = sum(weight.source.endswith("_proj.weight") for weight in layout.weights)
    return {"factored": f"{layout.num_factored} of {num_projections} projections"}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None
