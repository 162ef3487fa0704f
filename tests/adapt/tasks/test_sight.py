"""Pictures that a model's patches or context cannot hold are refused in one line, with a size that fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import havoc_core
from havoc_core.adapt.tasks.evaluation import Scoring
from havoc_core.adapt.tasks.names import BUNDLED
from havoc_core.adapt.tasks.sight import require_fitting_pictures
from havoc_core.adapt.tasks.task import load_task
from havoc_core.cli import main
from havoc_core.config import Recipe
from havoc_core.errors import HavocError
from havoc_core.model.checkpoint import load_base
from havoc_core.model.config import HavocConfig, VisionConfig
from havoc_core.pipeline import require_eyes

NANO = HavocConfig.nano()


def with_patches(size: int) -> HavocConfig:
    return dataclasses.replace(NANO, vision=VisionConfig(patch_size=size, image_token_id=3))


def of_size(folder: Path, side: int) -> Path:
    text = (BUNDLED / "textvqa.toml").read_text().replace("image_side = 224", f"image_side = {side}")
    path = folder / "pictures.toml"
    path.write_text(text.replace('name = "textvqa"', 'name = "pictures"'))
    return path


def test_the_bundled_tasks_fit_the_bundled_base() -> None:
    """Drawn signs, and the public pictures at a size at which they can be read."""
    for name in ("vision", "textvqa"):
        require_fitting_pictures(load_task(name), NANO)
    assert (load_task("vision").image_side, load_task("textvqa").image_side) == (32, 224)


def test_pictures_that_patches_do_not_divide_are_refused(tmp_path: Path) -> None:
    """With the size to write instead, which then fits."""
    with pytest.raises(HavocError, match=r"^textvqa: .*224 x 224 .*15 x 15; .*image_side = 210 under \[prompt\]"):
        require_fitting_pictures(load_task("textvqa"), with_patches(14 + 1))
    require_fitting_pictures(load_task(str(of_size(tmp_path, 210))), with_patches(15))


def test_pictures_that_the_context_cannot_hold_are_refused(tmp_path: Path) -> None:
    """1,024 tokens less an answer of 32 and a question leave 960: 30 x 30 patches, but not 32 x 32."""
    with pytest.raises(HavocError, match=r"1,024 tokens, .* 960; .*image_side = 240"):
        require_fitting_pictures(load_task(str(of_size(tmp_path, 256))), NANO)
    require_fitting_pictures(load_task(str(of_size(tmp_path, 240))), NANO)


def test_drawn_pictures_have_one_size() -> None:
    """Nothing that a user could write would change them."""
    with pytest.raises(HavocError, match="vision: .*32 x 32 pixels .*another base"):
        require_fitting_pictures(load_task("vision"), with_patches(10))


def test_a_model_without_eyes_is_another_question() -> None:
    """It is refused, or its picture tasks are left out, elsewhere."""
    require_fitting_pictures(load_task("textvqa"), dataclasses.replace(NANO, vision=None))


def test_a_scoring_refuses_them_before_any_row_is_read(tmp_path: Path) -> None:
    """The data is not even there."""
    with pytest.raises(HavocError, match="take 1,024 tokens"):
        Scoring(tasks=(str(of_size(tmp_path, 256)),)).load(NANO)


def test_training_refuses_them_before_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with nothing left behind; a run before its first expert."""
    path, out = of_size(tmp_path, 256), tmp_path / "out"
    assert main(["train", "nano", "--task", str(path), "--out", str(out), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("havoc: error: pictures: pictures of 256 x 256 pixels take 1,024 tokens")
    assert said.count("\n") == 1
    assert not out.exists()
    recipe = Recipe.model_validate({"experts": {"tasks": [str(path)]}})
    with pytest.raises(HavocError, match="take 1,024 tokens"):
        require_eyes(recipe, load_base("nano"))


def test_the_size_is_part_of_what_is_asked(tmp_path: Path) -> None:
    """Another size is another task; a file that says none is hashed as before there was a size."""
    sizes = {load_task(str(of_size(tmp_path, side))).sha256 for side in (224, 240)}
    assert len(sizes) == 2
    records = (Path(havoc_core.__file__).parent / "reports").glob("*/record.json")
    hashes = {json.loads(path.read_text())["accuracy"].get("math", {}).get("task_sha256") for path in records}
    assert load_task("math").sha256 in hashes


@pytest.mark.parametrize("side", ["0", "5000", '"big"'])
def test_a_size_that_means_nothing_is_refused(side: str, tmp_path: Path) -> None:
    """By the key's name."""
    with pytest.raises(HavocError, match=r"prompt\.image_side"):
        load_task(str(of_size(tmp_path, side)))  # type: ignore[arg-type]


def test_a_size_without_a_picture_is_refused(tmp_path: Path) -> None:
    """It would be ignored."""
    path = of_size(tmp_path, 224)
    path.write_text(path.read_text().replace('image = "image"', ""))
    with pytest.raises(HavocError, match="name prompt.image too"):
        load_task(str(path))
