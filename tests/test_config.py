"""A recipe means what it says, or is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from havoc_core.config import DataSettings, ExpertSettings, ModelSettings, Recipe, load_recipe, recipe_toml
from havoc_core.errors import HavocError

DOMAIN_LISTS = st.lists(st.sampled_from(["math", "code", "reasoning", "vision"]), min_size=1, unique=True)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_demo(tmp_path: Path) -> None:
    """Every key has a default, and no file at all means the same as an empty one."""
    assert load_recipe(written(tmp_path, "")) == load_recipe(None) == Recipe()
    assert Recipe().model.base == "nano"


def test_what_is_written_is_taken(tmp_path: Path) -> None:
    """Values reach their section; the others keep their defaults."""
    recipe = load_recipe(
        written(tmp_path, '[experts]\ndomains = ["code"]\nlearning_rate = 1\n[export]\nweights = "int8"')
    )
    assert recipe.experts == ExpertSettings(domains=("code",), learning_rate=1.0)
    assert recipe.export.weights == "int8"
    assert recipe.search == Recipe().search


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('compute = "int8"', "export: has compute without weights"),
        ('weights = "fp16"\ncompute = "int8"', "export: fp16 weights compute in fp32"),
        ('weights = "int8"\ncompute = "int4"', "export.compute = 'int4': input should be 'auto', 'int8', 'fp32'"),
    ],
)
def test_what_products_compute_in_fits_the_weights(tmp_path: Path, text: str, message: str) -> None:
    """Refused when the recipe is read, not after the hours before the export."""
    with pytest.raises(HavocError, match=message):
        load_recipe(written(tmp_path, f"[export]\n{text}"))


def test_the_default_recipe_is_readable(tmp_path: Path) -> None:
    """The text saved beside a result explains every key and reads back to the same settings."""
    text = recipe_toml(Recipe())
    assert "kl_coefficient = 0.05 # weight of KL(policy || base)" in text
    assert "# learning_rate: of delta = z - 1; left out: the method's own" in text
    assert load_recipe(written(tmp_path, text)) == Recipe()


@given(
    base=st.text(st.characters(codec="utf-8"), min_size=1),
    domains=DOMAIN_LISTS,
    learning_rate=st.floats(min_value=1e-300, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_saved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, base: str, domains: list[str], learning_rate: float, seed: int
) -> None:
    """Any recipe, with any text and number in it, survives being saved beside its result."""
    experts = ExpertSettings(domains=tuple(domains), learning_rate=learning_rate, seed=seed)
    recipe = Recipe(model=ModelSettings(base=base), experts=experts)
    assert load_recipe(written(tmp_path_factory.mktemp("recipe"), recipe_toml(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[experts]\nnum_stpes = 3", "unknown key experts.num_stpes; did you mean num_steps?"),
        ("[expert]", "unknown key expert; did you mean experts?"),
        ("zzz = 1", "unknown key zzz; known are model, data, experts, search, export, bench, gate"),
        ("[bench]\nzzz = 1", "unknown key bench.zzz; known are profile"),
        ("[search]\nweight_formats = ['int5']", "weight_formats.0: unknown structure 'int5'"),
        ("[export]\nweights = 'int8a-hqq'", "export.weights: the quantizer hqq makes int4 weights"),
        ("[experts]\nnum_steps = '3'", "experts.num_steps = '3': input should be a valid integer"),
        ("[experts]\nnum_steps = true", "experts.num_steps = True: input should be a valid integer"),
        ("[experts]\nnum_steps = 2.0", "experts.num_steps = 2.0: input should be a valid integer"),
        ("[experts]\nnum_steps = 0", "experts.num_steps = 0: input should be greater than or equal to 1"),
        ("[experts]\nlearning_rate = nan", "experts.learning_rate = nan"),
        ("[experts]\nlearning_rate = inf", "experts.learning_rate = inf"),
        ("[experts]\nlearning_rate = 1e400", "experts.learning_rate = inf"),
        ("[experts]\ntasks = ['math', 'maths']", "experts.tasks.1: unknown task 'maths': did you mean"),
        ("[experts]\ntasks = ['math', 'math']", "experts.tasks: names an entry twice"),
        ("[experts]\ntasks = []", "experts.tasks = []: tuple should have at least 1 item"),
        ("[experts]\ntasks = ['math']\ndomains = ['math']", "experts: has both tasks and domains"),
        ("[search]\nrule = 'delat'", "search.rule = 'delat': input should be 'delta'"),
        ("experts = 3", "experts is a section: write [experts] on its own line"),
        ("[experts", "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        (f"[model]\nbase = {'x' * 5000!r}\nx = 1", "unknown key model.x"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str, complaint: str) -> None:
    """The file, the key, the value and the nearest right word, without a traceback."""
    path = written(tmp_path, text)
    with pytest.raises(HavocError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert complaint in message
    assert "\n" not in message
    assert len(message) < 500


def test_several_mistakes_are_named_together(tmp_path: Path) -> None:
    """A person mends a file once, not once per mistake."""
    with pytest.raises(HavocError, match=r"num_stpes.*; .*population = 1"):
        load_recipe(written(tmp_path, "[experts]\nnum_stpes = 3\n[search]\npopulation = 1"))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Missing, a folder, not text."""
    with pytest.raises(HavocError, match="No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(HavocError, match="directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(HavocError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


@given(st.text())
def test_any_text_is_a_recipe_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """No content raises anything else."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_recipe(path)
    except HavocError as error:
        assert "\n" not in str(error)


def test_settings_cannot_change_after_loading() -> None:
    """What is saved beside the result is what was used."""
    with pytest.raises(ValidationError):
        Recipe().experts.num_steps = 1


def test_the_source_of_data_is_the_builtin_tasks_or_a_directory() -> None:
    """One word stands for the built-in tasks; anything else is a path."""
    assert DataSettings().directory is None
    assert DataSettings(source="data/gsm8k").directory == Path("data/gsm8k")


def test_havoc_config_is_here_too_but_late() -> None:
    """`from havoc_core.config import HavocConfig` works, and reading a recipe does not load the model's room."""
    script = """
import sys
from havoc_core.config import load_recipe
load_recipe(None)
assert not [name for name in sys.modules if name.startswith("havoc_core.model")]
from havoc_core.config import HavocConfig
from havoc_core.model.config import HavocConfig as ours
assert HavocConfig is ours and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        from havoc_core import config

        _ = config.Nothing
