"""Search on the simulated card, a CPU session behind it; one JSON document out: how it was bound, and what it found.

simulated_search.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from havoc_core import measuring
from havoc_core.adapt.basis import base_basis
from havoc_core.adapt.expert import Expert, save_expert
from havoc_core.adapt.search import search
from havoc_core.config import Recipe
from havoc_core.errors import HavocError
from havoc_core.export.runtime.devices import CPU_PROVIDER
from havoc_core.jobs import Place
from havoc_core.measuring import BenchMeasurer, bind, search_settings
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT

RECIPE = {
    "experts": {"tasks": ["math", "reasoning"], "num_validation_rows": 2, "max_new_tokens": 8},
    "search": {
        "population": 4,
        "generations": 1,
        "num_rows": 2,
        "weight_formats": ["fp32", "int8"],
        "on_this_machine": True,
    },
    "gate": {"targets": ["gtx1660"]},
}


def main(folder: str) -> None:
    """Bind, search, and print what a test asks for."""
    out = Path(folder)
    measuring.COST_WAIT_S = 0.0
    recipe = Recipe.model_validate(RECIPE)
    strict = recipe.model_copy(update={"search": recipe.search.model_copy(update={"on_this_machine": False})})
    try:
        bind(strict)
        refusal = ""
    except HavocError as error:
        refusal = str(error)
    bound = dataclasses.replace(bind(recipe), provider=CPU_PROVIDER)
    base = load_base("nano")
    basis = base_basis(base, out, SILENT)
    deltas = {name: torch.full((matrix.num_directions,), 0.01) for name, matrix in basis.matrices.items()}
    experts = [
        Expert(domain=name, deltas=deltas, base_hash=base.weight_hash, basis_hash=basis.hash)
        for name in recipe.experts.tasks
    ]
    for expert in experts:
        save_expert(expert, out / "experts")
    place = Place(recipe, out, out / "experts", num_threads=1)
    with BenchMeasurer(place, base, num_experts=2, bound=bound) as measurer:
        settings = search_settings(recipe, base, experts, bound)
        result = search(measurer, settings=settings, journal_path=out / "journal.jsonl")
    print(
        json.dumps(
            {
                "refusal": refusal,
                "device": bound.device.model_dump(mode="json"),
                "limits": {name: list(limit) for name, limit in settings.limits.items()},
                "journal_device": settings.measured["device"]["kind"],
                "front": result.to_json(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
