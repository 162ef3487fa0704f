"""Every key of a recipe reaches the work: changing it changes what a room is handed, and no key is left out here."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import havoc_core
from havoc_core import config, jobs, measuring, pipeline
from havoc_core.adapt.optimizer import MuGrokConfig
from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.task import load_task
from havoc_core.bench.accuracy import AccuracyRun
from havoc_core.config import Recipe, bundled_recipes, load_recipe
from havoc_core.errors import HavocError
from havoc_core.jobs import training_settings
from havoc_core.measuring import bind, recipe_tasks, search_settings
from havoc_core.messages import plain
from havoc_core.model.checkpoint import load_base
from havoc_core.progress import SILENT
from havoc_core.tracking import open_tracking

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(havoc_core.__file__).parent


def trained(recipe: Recipe) -> object:
    """What the first expert's training is handed, as the expert's file keeps it."""
    task = recipe_tasks(recipe)[0]
    return task.name, dataclasses.asdict(training_settings(recipe.experts, task))


def searched(recipe: Recipe) -> object:
    """What the search is handed: its settings, and the samples it draws."""
    settings = search_settings(recipe, load_base("nano"), [], bind(recipe))
    return dataclasses.asdict(settings)


def exported(recipe: Recipe) -> object:
    """What `export_artifact` is handed for a chosen candidate."""
    handed: dict[str, Any] = {}

    def export_artifact(*args: object, **options: object) -> Path:
        handed.update(options)
        return Path()

    chosen = type("Chosen", (), {"candidate": measuring.Candidate((1.0,) * 4, jobs_structure())})
    result = type("Result", (), {"chosen": chosen})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.export.package.export_artifact", export_artifact)
        pipeline.export_mixture(recipe, None, None, [], result, Path("nowhere"), SILENT)  # type: ignore[arg-type]
    return {name: value for name, value in handed.items() if name != "progress"}


def jobs_structure() -> Any:
    from havoc_core.model.structure import Structure

    return Structure()


class Unwritten:
    """A journal that stays in memory."""

    def __init__(self, _: Path) -> None:
        self.entries: list[dict[str, Any]] = []

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)


def measured(recipe: Recipe) -> object:
    """What scoring and measuring the artifact are handed."""
    handed: dict[str, Any] = {}

    class Stop(Exception):  # noqa: N818 - no error
        pass

    def run_accuracy(_: Path, scoring: Scoring, **options: object) -> Any:
        handed.update(dataclasses.asdict(scoring) | options)
        return AccuracyRun(files={}, manifest_sha256="", tasks={}, right={})

    def score_table(place: jobs.Place, *_: object, **__: object) -> dict[str, Any]:
        handed["gate rows"] = place.recipe.gate.num_rows
        return {}

    def measure(_: Path, **options: object) -> None:
        handed.update(options)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.gate_split.run_accuracy", run_accuracy)
        patch.setattr("havoc_core.bench.judge.gate.hash_artifact", lambda _: {"manifest.json": "0"})
        patch.setattr("havoc_core.storage.Journal", Unwritten)
        patch.setattr("havoc_core.bench.measure.measure", measure)
        patch.setattr("havoc_core.gate_split.score_rows", score_table)
        patch.setattr("havoc_core.pipeline.linked", lambda document, _: document)
        patch.setattr("havoc_core.storage.write_json", lambda *_: None)
        chosen = type("Chosen", (), {"candidate": measuring.Candidate((1.0,) * 4, jobs_structure())})
        result = type("Result", (), {"chosen": chosen})
        place = jobs.Place(recipe, Path("nowhere"), Path("nowhere/experts"))
        with pytest.raises(Stop):
            pipeline.measure_artifact(place, load_base("nano"), [], result, Path("nowhere"), SILENT)  # type: ignore[arg-type]
    return {name: value for name, value in handed.items() if name != "progress"}


def filed(recipe: Recipe) -> object:
    """Which folder of `.pt` files is written."""
    written: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.export.torch_files.export_torch", lambda _, out, **__: written.append(out))
        chosen = type("Chosen", (), {"candidate": measuring.Candidate((1.0,) * 4, jobs_structure())})
        result: Any = type("Result", (), {"chosen": chosen})
        place = jobs.Place(recipe, Path("nowhere"), Path("nowhere/experts"))
        pipeline.write_torch_files(place, None, None, [], result, SILENT)  # type: ignore[arg-type]
    return written


def judged(recipe: Recipe) -> object:
    """What the gate is asked."""
    return recipe.gate.targets, bind(recipe).workload


def prompted(recipe: Recipe) -> object:
    """Whether prompts go through the base's template: what a base is opened with."""
    handed = []

    def load(path: str, *, is_chat: bool) -> Any:
        handed.append((path, is_chat))
        raise HavocError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.model.checkpoint.load_base", load)
        with pytest.raises(HavocError, match="seen"):
            pipeline.run(recipe, Path("nowhere"), progress=SILENT)
    return handed


def computed(recipe: Recipe) -> object:
    """What an expert is trained on."""
    handed = []

    def load(path: str, *, is_chat: bool, device: str) -> Any:
        handed.append((path, is_chat, device))
        raise HavocError("seen")

    place = jobs.Place(recipe, Path("nowhere"), Path("nowhere/experts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.model.checkpoint.load_base", load)
        patch.setattr(jobs, "limit_threads", lambda _: None)
        with pytest.raises(HavocError, match="seen"):
            jobs.train(plain(jobs.TrainRequest(place=place, metrics=place.out, num_threads=1, task="math")), SILENT)
    return handed


def hubbed(recipe: Recipe) -> object:
    """What the tasks mean, and where their rows come from."""
    return [(task.name, task.sha256) for task in load_asked(recipe)]


def tracked(recipe: Recipe) -> object:
    """What trackers are told of a run, and which there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("havoc_core.tracking.Tracking", lambda about, names: (about, names))
        return open_tracking(recipe, Path("nowhere"), job="run")


def load_asked(recipe: Recipe) -> Any:
    return recipe_tasks(recipe)


# section.key: another value, and what it must change
KEYS: dict[str, tuple[object, Callable[[Recipe], object]]] = {
    "model.base": ("pico", prompted),
    "model.chat": (False, prompted),
    "model.device": ("cuda", computed),
    "data.source": (str(ROOT), hubbed),
    "data.online": (True, hubbed),
    "data.seed": (1, measured),
    "experts.tasks": (("code", "math"), trained),
    "experts.method": ("next-token", trained),
    "experts.num_steps": (3, trained),
    "experts.prompts_per_step": (7, trained),
    "experts.samples_per_prompt": (5, trained),
    "experts.signal_prompts": (2, trained),
    "experts.max_draws": (2, trained),
    "experts.learning_rate": (0.5, trained),
    "experts.kl_coefficient": (0.5, trained),
    "experts.enable_grokfast": (False, trained),
    "experts.grokfast_lambda": (0.5, trained),
    "experts.fallback_type": ("lion", trained),
    "experts.max_kl": (0.5, trained),
    "experts.max_new_tokens": (9, trained),
    "experts.trained_layers": (2, trained),
    "experts.num_train_rows": (9, trained),
    "experts.num_validation_rows": (9, trained),
    "experts.validate_every": (9, trained),
    "experts.seed": (9, trained),
    "search.population": (9, searched),
    "search.generations": (9, searched),
    "search.num_rows": (9, searched),
    "search.weight_formats": (("int8",), searched),
    "search.rule": ("renorm", searched),
    "search.alpha_bounds": ((0.0, 1.0), searched),
    "search.normalize_alpha": (True, searched),
    "search.num_repeats": (2, searched),
    "search.seed": (9, searched),
    "export.weights": ("int4", exported),
    "export.compute": ("fp32", exported),
    "export.calibration": ("text.txt", exported),
    "export.dialect": ("contrib", exported),
    "export.pt": (True, filed),
    "bench.profile": ("standard", measured),
    "gate.targets": (("host-text",), judged),
    "gate.num_rows": (9, measured),
    "track.to": (("wandb",), tracked),
    "track.online": (True, tracked),
    "track.project": ("another", tracked),
    "track.name": ("another", tracked),
    "track.group": ("another", tracked),
}
ELSEWHERE = {
    "experts.use_qk_clip": "tests/test_recipe_keys.py",  # refused where it is true
    "search.on_this_machine": "tests/bench/nvml_simulator/simulated_search.py",  # refused without it, on another device
}
NEEDS = {"export.compute": {"export": {"weights": "int4"}}}


def with_key(name: str, value: object, **others: dict[str, object]) -> Recipe:
    section, key = name.split(".")
    return Recipe.model_validate({**others, section: {**others.get(section, {}), key: value}})


def keys_of_the_schema() -> set[str]:
    return {f"{name}.{key}" for name, section in Recipe() for key in type(section).model_fields}


def test_no_key_is_left_out() -> None:
    """A new key of the schema turns this red until somebody shows what it does."""
    assert keys_of_the_schema() == set(KEYS) | set(ELSEWHERE)
    for name, path in ELSEWHERE.items():
        assert name.partition(".")[2] in (ROOT / path).read_text()


@pytest.mark.parametrize("name", KEYS)
def test_a_key_changes_what_is_done(name: str) -> None:
    """What the room is handed differs from what it is handed without the key."""
    value, look = KEYS[name]
    others = NEEDS.get(name, {})
    changed = with_key(name, value, **others)
    assert look(changed) != look(Recipe.model_validate(others))


def test_a_key_that_nothing_reads_is_found() -> None:
    """The test of the test: the settings that training gets do not know of another section's key."""
    assert trained(with_key("bench.profile", "standard")) == trained(Recipe())


def test_qk_clip_is_refused_in_one_line(tmp_path: Path) -> None:
    """It cannot be done to z, so it is not ignored."""
    path = tmp_path / "recipe.toml"
    path.write_text("[experts]\nuse_qk_clip = true\n")
    with pytest.raises(HavocError, match="experts.use_qk_clip: .*QK-Clip"):
        load_recipe(path)


SEED_003 = MuGrokConfig(
    enable_muon=False,
    fallback_type="adamw",
    fallback_lr=2e-3,
    fallback_betas=(0.9, 0.999),
    fallback_weight_decay=0.01,
    enable_grokfast=True,
    grokfast_alpha=0.98,
    grokfast_lambda=0.05,
    use_qk_clip=False,
    kl_coefficient=0.2,
    phase_name="phase7_transformer2",
)


@pytest.mark.parametrize("name", ["phase7", "paper"])
def test_the_seeds_recipes_are_the_seeds(name: str) -> None:
    """The optimizer of `from_phase(7)`, every value; `paper` searches as the seed says too."""
    recipe = load_recipe(Path(name))
    for task in map(load_task, recipe.experts.tasks):
        assert training_settings(recipe.experts, task).optimizer == SEED_003
    search = recipe.search
    if name == "paper":
        assert (search.population, search.generations, search.num_rows) == (50, 100, 100)
        assert (search.rule, search.alpha_bounds, search.normalize_alpha) == ("literal", (0.0, 2.0), False)


def test_bundled_recipes_are_named_where_people_look() -> None:
    """In the help of `run`, and every file of the folder is a right recipe."""
    from havoc_core import arguments

    (help_text,) = re.findall(r'"TOML file, or a bundled one: ([\w, ]+) \(', inspect.getsource(arguments))
    assert tuple(help_text.split(", ")) == bundled_recipes()
    assert all(load_recipe(config.BUNDLED_RECIPES / f"{name}.toml") != Recipe() for name in bundled_recipes())
