"""Which metrics go where: a recipe's [track] section, and `--track`, as a `Tracking` of a folder of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .storage import sha256_json
from .track import results
from .track.catalogue import PROCESS
from .track.tracker import About, Tracking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .adapt.search import SearchResult
    from .bench.judge.gate import Judgement
    from .config import Recipe

_GROUP_CHARS = 12


def with_trackers(recipe: Recipe, names: Sequence[str] | None) -> Recipe:
    """Return the recipe with the trackers that a command line names; None leaves it as it is."""
    if names is None:
        return recipe
    return recipe.model_copy(update={"track": recipe.track.model_copy(update={"to": tuple(names)})})


def without_trackers(recipe: Recipe) -> Recipe:
    """Return the recipe without its [track] section: what its results depend on."""
    return recipe.model_copy(update={"track": type(recipe)().track})


def open_tracking(recipe: Recipe, out: Path, *, job: str) -> Tracking:
    """Log the work of the verb `job` in the folder `out`; runs of one recipe are one group."""
    section = recipe.track
    plain = without_trackers(recipe).model_dump(mode="json", exclude={"track"})
    about = About(
        folder=out,
        config=config_of(recipe, plain),
        job=job,
        group=section.group or sha256_json(plain)[:_GROUP_CHARS],
        project=section.project,
        name=section.name,
        online=section.online,
    )
    return Tracking(about, section.to)


def config_of(recipe: Recipe, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in the form of seed 003, and every section of the recipe."""
    return {
        "phase": 7,
        "num_experts": len(recipe.experts.tasks),
        "adas_generations": recipe.search.generations,
        "adas_population": recipe.search.population,
        **plain,
    }


def log_search(tracking: Tracking, result: SearchResult, domains: Sequence[str]) -> None:
    """Log the mixture that a search chose, and its candidates and front as tables."""
    tracking.log(None, None, results.mixture_values(domains, result.chosen.candidate.alpha))
    front = result.to_json()
    for name in ("candidates", "front"):
        columns, rows = results.candidate_table(front, domains, only_front=name == "front")
        tracking.table(f"adas/{name}", columns, rows)


def log_final(
    tracking: Tracking, out: Path, result: SearchResult, judgements: Mapping[str, Judgement], *, artifact: Path
) -> None:
    """Log the measurements of a finished run, and the path of its artifact."""
    from .storage import read_json

    documents = {name: read_json(out / f"{name}.json") for name in ("handoff", "scores", "record")}
    for process, values in results.process_points(documents["record"]):
        tracking.log(PROCESS, process, values)
    exit_codes = {name: judgement.exit_code for name, judgement in judgements.items()}
    tracking.log(
        None, None, results.final_values(**documents, exit_codes=exit_codes, is_disturbed=bool(result.disturbance))
    )
    tracking.reference("artifact", "model", artifact, documents["scores"]["artifact_sha256"])
