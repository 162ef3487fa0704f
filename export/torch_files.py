"""`--to pt`: the experts and the folded model as `.pt`, as seed 003 names them, for a next phase that reads them so.

    z_vectors_<task>.pt     format, formula, domain, base_hash, basis_hash; `deltas`: delta = z - 1 by matrix, fp32 [R]
    svf_adapted_model.pt    the dense folded weights by their Hugging Face names; a tied head is not listed
    mixture.json            base, experts, alpha and rule that they were made from

`torch.load(path, weights_only=True)` opens both: they hold tensors, text and dictionaries, and no code. The model is
whole in memory while it is written; `--to hf` writes a larger one in shards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from ..adapt.expert import FORMULA
from ..model.tensors import tensor_shapes
from ..progress import SILENT, Progress
from ..storage import new_directory, open_atomic, write_json
from .fold import FoldedTensors
from .huggingface import DTYPES, finite
from .package import Mixture, mixture_document
from .source import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..adapt.expert import Expert
    from ..adapt.mixture import MixingRule
    from ..adapt.svf import Basis
    from ..model.checkpoint import Base

MODEL: Final = "svf_adapted_model.pt"


def expert_file(domain: str) -> str:
    """Name of the file of an expert, as seed 003 has it."""
    return f"z_vectors_{domain}.pt"


def export_torch(
    base: Source | Base | Path | str,
    out: Path,
    *,
    experts: Sequence[Expert] = (),
    alpha: Sequence[float] = (),
    rule: MixingRule = "delta",
    weight_format: str = "fp32",
    basis: Basis | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Fold and write the model, "fp32" or "fp16", and the experts in the same folder; return `out`.

    Weights that are not finite, experts of another base, and a folder with other files are a `HavocError`.
    """
    source, dtype = open_source(base), DTYPES[weight_format]
    mixture = Mixture(experts=tuple(experts), alpha=tuple(alpha), rule=rule)
    folded = FoldedTensors(source.tensors, mixture.deltas(source, basis), basis)
    with new_directory(out, marker=MODEL) as folder:
        shapes = tensor_shapes(source.config)
        weights = {}
        with progress.stage("fold the model", len(shapes), unit="tensors") as stage:
            for name in shapes:
                weights[name] = finite(name, folded[name].to(dtype)).detach().cpu().contiguous().clone()
                stage.advance()
        _save(folder / MODEL, weights)
        for expert in experts:
            _save(folder / expert_file(expert.domain), _expert_document(expert))
        write_json(folder / "mixture.json", mixture_document(source, mixture))
    return out


def _expert_document(expert: Expert) -> dict[str, Any]:
    return {
        "format": "havoc-expert/1",
        "formula": FORMULA,
        "domain": expert.domain,
        "base_hash": expert.base_hash,
        "basis_hash": expert.basis_hash,
        "deltas": {name: delta.detach().cpu().contiguous().clone() for name, delta in expert.deltas.items()},
    }


def _save(path: Path, document: object) -> None:
    with open_atomic(path) as file:
        torch.save(document, file)
