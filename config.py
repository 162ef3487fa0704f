"""A recipe: all settings of `havoc run`, from TOML to frozen, validated values.

    recipe = load_recipe(Path("recipe.toml"))      # None: the bundled nano model's own
    recipe.experts.samples_per_prompt              # 8
    recipe_toml(recipe)                            # the text that is saved beside every result

A key that is not written keeps its default, so an empty file is the bundled demo. An unknown key, a value of another
type, NaN or infinity is refused in one line with the key's name and the nearest known one.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .adapt.tasks.names import DOMAINS, Method, require_name
from .cores import TorchDevice
from .errors import HavocError
from .mistakes import mistakes
from .storage import explained, read_bounded
from .track.tracker import NAME, PROJECT

if TYPE_CHECKING:
    from .model.config import AttentionConfig as AttentionConfig  # noqa: PLC0414 - re-exported
    from .model.config import HavocConfig as HavocConfig  # noqa: PLC0414 - re-exported
    from .model.config import MLPConfig as MLPConfig  # noqa: PLC0414 - re-exported


def _structure_name(name: str) -> str:
    from .model.structure import Structure

    try:
        Structure.named(name)
    except HavocError as error:
        raise ValueError(str(error)) from error
    return name


def _task_name(name: str) -> str:
    try:
        require_name(name)
    except HavocError as error:
        raise ValueError(str(error)) from error
    return name


def _dialect_name(name: str) -> str:
    from .export.runtime.dialects import DIALECTS

    if name not in DIALECTS:
        raise ValueError(f"unknown dialect {name!r}; known are {', '.join(DIALECTS)}")
    return name


Rule = Literal["delta", "literal", "renorm"]

# TOML arrays become tuples; what they hold is checked as strictly as everything else
StructureName = Annotated[str, AfterValidator(_structure_name)]
StructureNames = Annotated[tuple[StructureName, ...], Field(strict=False, min_length=1)]
TaskNames = Annotated[tuple[Annotated[str, AfterValidator(_task_name)], ...], Field(strict=False, min_length=1)]
DialectName = Annotated[str, AfterValidator(_dialect_name)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
Trackers = Annotated[tuple[Literal["wandb", "trackio"], ...], Field(strict=False)]
TrackName = Annotated[str, Field(min_length=1, max_length=128)]  # the longest that W&B takes
Bounds = Annotated[tuple[float, float], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) < len(value):
        raise ValueError("names an entry twice")
    return value


class ModelSettings(_Section):
    """Which base is adapted, and what computes."""

    base: str = Field(default="nano", min_length=1, description="a preset, a model directory or a .gguf file")
    chat: bool = Field(default=True, description="prompts go through the base's chat template if it has one")
    device: TorchDevice = Field(
        default="cpu", description='what trains experts and answers for candidates: "cpu", or an NVIDIA card, "cuda"'
    )


class DataSettings(_Section):
    """Where the tasks come from."""

    source: str = Field(default="builtin", min_length=1, description='"builtin" or a directory with the real data sets')
    online: bool = Field(default=False, description="may fetch data sets from the hub")
    seed: Seed = Field(default=0, description="seed of the built-in tasks and of the splits")

    @property
    def directory(self) -> Path | None:
        """The directory of real data sets; None for the built-in tasks."""
        return None if self.source == "builtin" else Path(self.source)


class ExpertSettings(_Section):
    """How each expert is trained, with a penalty on the KL divergence from the base."""

    tasks: TaskNames = Field(
        default=DOMAINS,
        description="one expert each, in this order: bundled tasks, or TOML files of your own",
    )
    method: Method = Field(
        default="auto",
        description='"expected-reward", "reinforce", "next-token"; auto: expected-reward where answers can be listed',
    )
    num_steps: Count | None = Field(default=None, description="optimizer steps; left out: the method's own")
    prompts_per_step: Count | None = Field(
        default=None, description="prompts per optimizer step; left out: the method's own"
    )
    samples_per_prompt: int = Field(
        default=8, ge=2, description="completions per prompt; the others' mean is the baseline"
    )
    signal_prompts: int = Field(
        default=1, ge=0, description="reinforce draws prompts until this many have samples with different rewards"
    )
    max_draws: Count = Field(default=4, description="the most draws of prompts_per_step in a step")
    learning_rate: float | None = Field(default=None, gt=0, description="of delta = z - 1; left out: the method's own")
    kl_coefficient: float = Field(default=0.05, ge=0, description="weight of KL(policy || base)")
    enable_grokfast: bool = Field(default=True, description="the gradients' slow part is amplified (MuonGrokfast)")
    grokfast_lambda: float = Field(default=0.05, ge=0, description="how much of the slow part is added")
    fallback_type: Literal["adamw", "lion"] = Field(
        default="adamw", description="optimizer of z, which is a vector and so never Muon's"
    )
    use_qk_clip: bool = Field(default=False, description="must stay false: z scales directions that span all heads")
    max_kl: float = Field(
        default=1.0, gt=0, description="limit of KL(adapted || base), nats per token, for experts, candidates, artifact"
    )
    max_new_tokens: Count | None = Field(default=None, description="longest answer, in tokens; left out: the task's")
    trained_layers: Count | None = Field(
        default=None, description="last layers whose matrices are trained; left out: all layers"
    )
    num_train_rows: Count = Field(default=2000, description="rows of the train split, or all it has")
    num_validation_rows: Count = Field(default=200, description="rows of the search split that pick the best step")
    validate_every: Count | None = Field(
        default=None, description="steps from one validation to the next; left out: the method's own"
    )
    seed: Seed = Field(default=0, description="seed of prompts and samples")

    _distinct = field_validator("tasks")(_distinct)

    @field_validator("use_qk_clip")
    @classmethod
    def _no_qk_clip(cls, value: bool) -> bool:
        if value:
            raise ValueError("cannot be true: QK-Clip scales each head by itself, and z spans all heads")
        return value

    @model_validator(mode="before")
    @classmethod
    def _other_word(cls, value: object) -> object:
        """Take `domains`, as recipes wrote it before tasks were files, for `tasks`."""
        if not isinstance(value, dict) or "domains" not in value:
            return value
        if "tasks" in value:
            raise ValueError("has both tasks and domains, which mean the same: keep tasks")
        return {"tasks" if key == "domains" else key: part for key, part in value.items()}


class SearchSettings(_Section):
    """How mixture and structure are searched (NSGA-II)."""

    population: int = Field(default=8, ge=4, description="candidates per generation")
    generations: Count = Field(default=4, description="number of generations")
    num_rows: Count = Field(default=200, description="items per task that score a candidate")
    weight_formats: StructureNames = Field(
        default=("fp32", "int8", "int4", "int4-cfp32"), description="structures to choose from"
    )
    rule: Rule = Field(default="delta", description="how experts are mixed")
    alpha_bounds: Bounds = Field(default=(0.0, 2.0), description="lowest and highest weight of an expert")
    normalize_alpha: bool = Field(default=False, description="scale the weights of a mixture to a sum of 1")
    num_repeats: int = Field(default=1, ge=1, le=100, description="samples of num_rows items that score a candidate")
    on_this_machine: bool = Field(
        default=False, description="may measure costs here though the first target is another device"
    )
    seed: Seed = Field(default=0, description="seed of the search")

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        if not self.normalize_alpha and self.alpha_bounds == type(self).model_fields["alpha_bounds"].default:
            return self
        from .adapt.candidate import require_bounds

        try:
            require_bounds(*self.alpha_bounds, is_normalized=self.normalize_alpha)
        except HavocError as error:
            raise ValueError(str(error)) from error
        return self

    _distinct = field_validator("weight_formats")(_distinct)


class ExportSettings(_Section):
    """The artifact for deployment."""

    weights: StructureName | None = Field(default=None, description="structure; left out: the search's choice")
    compute: Literal["auto", "int8", "fp32", "w8a8"] = Field(
        default="auto", description="rounding of activations in products; auto: as in the structure"
    )
    calibration: str | None = Field(
        default=None, min_length=1, description="text file that gptq and mixed bits calibrate on; left out: bundled"
    )
    dialect: DialectName = Field(default="standard", description="operators of the graph")
    pt: bool = Field(default=False, description="also write experts and folded model as .pt; handoff.json names those")

    @model_validator(mode="after")
    def _is_a_structure(self) -> Self:
        if self.compute == "auto":
            return self
        if self.weights is None:
            raise ValueError("has compute without weights: give both, or leave both to the search")
        from .model.structure import Structure

        try:
            replace(Structure.named(self.weights), compute=self.compute)
        except HavocError as error:
            raise ValueError(str(error)) from error
        return self


class BenchSettings(_Section):
    """How the artifact is measured."""

    profile: Literal["quick", "standard", "release"] = Field(default="quick", description="how long to measure")


class GateSettings(_Section):
    """The targets of the verdict."""

    targets: Names = Field(default=("host", "gtx1660"), description="names of targets, or TOML files of your own")
    num_rows: Count = Field(default=1000, description="items per task that prove the accuracy, or all a data set has")

    _distinct = field_validator("targets")(_distinct)


class TrackSettings(_Section):
    """The trackers of metrics, besides `metrics.jsonl`, which always has them. No result depends on it."""

    to: Trackers = Field(default=(), description='trackers: "wandb", "trackio"; each needs the extra of its name')
    online: bool = Field(default=False, description="may send metrics to the trackers' servers; false: they stay here")
    project: TrackName = Field(default=PROJECT, description="project that the run is listed under")
    name: TrackName = Field(default=NAME, description="name of the run")
    group: TrackName | None = Field(default=None, description="runs listed together; left out: those of one recipe")

    _distinct = field_validator("to")(_distinct)


_MAX_RECIPE_BYTES = 1_000_000


class Recipe(_Section):
    """The settings of one run, in sections."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    experts: ExpertSettings = ExpertSettings()
    search: SearchSettings = SearchSettings()
    export: ExportSettings = ExportSettings()
    bench: BenchSettings = BenchSettings()
    gate: GateSettings = GateSettings()
    track: TrackSettings = TrackSettings()


BUNDLED_RECIPES = Path(__file__).parent / "adapt" / "recipes"


def bundled_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with HAVOC, beside the default one."""
    return tuple(sorted(path.stem for path in BUNDLED_RECIPES.glob("*.toml")))


def load_recipe(path: Path | None) -> Recipe:
    """Read a recipe, a file or the name of a bundled one; None is the default one.

    A file that cannot be read or holds a mistake is a `HavocError`.
    """
    if path is None:
        return Recipe()
    if str(path) in bundled_recipes() and not path.exists():
        path = BUNDLED_RECIPES / f"{path}.toml"
    try:
        return Recipe.model_validate(tomllib.loads(read_bounded(path, max_bytes=_MAX_RECIPE_BYTES).decode("utf-8")))
    except OSError as error:
        raise explained(error, path) from error
    except ValidationError as error:
        raise HavocError(f"{path}: {mistakes(error, Recipe)}") from error
    except (ValueError, RecursionError) as error:
        raise HavocError(f"{path}: not valid TOML ({str(error) or 'nested too deep'})") from error


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key written with its meaning; `load_recipe` reads it back to an equal recipe."""
    lines = ["# A recipe of havoc: every key with the value that was used. `havoc run THIS_FILE` runs it again.\n"]
    for name, section in recipe:
        lines.append(f"\n[{name}]\n")
        for key, value in section:
            meaning = type(section).model_fields[key].description
            lines.append(f"# {key}: {meaning}\n" if value is None else f"{key} = {_toml(value)} # {meaning}\n")
    return "".join(lines)


def _toml(value: object) -> str:
    """A TOML value; the escapes of a JSON string are those of a TOML string but for DEL."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007F")


def __getattr__(name: str) -> object:
    if name in {"AttentionConfig", "HavocConfig", "MLPConfig"}:
        from .model.config import AttentionConfig, HavocConfig, MLPConfig

        return {"AttentionConfig": AttentionConfig, "HavocConfig": HavocConfig, "MLPConfig": MLPConfig}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
