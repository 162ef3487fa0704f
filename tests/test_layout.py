"""What is in the repository is what is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_PACKAGED = {"tests", "docs", "reports", "demo", "build", "dist"}


def code_folders() -> set[Path]:
    modules = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    folders = {path.parent for path in modules if not any(part.startswith(".") for part in path.parts)}
    return {folder for folder in folders if not set(folder.parts[:1]) & NOT_PACKAGED}


def test_every_code_folder_is_packaged() -> None:
    """A new folder of code is listed in pyproject.toml, and everything listed there exists."""
    named = {".".join(("havoc_core", *folder.parts)) for folder in code_folders()}
    assert named == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_every_code_folder_is_a_package() -> None:
    """Relative imports work from every module, in the checkout and in the wheel."""
    assert [folder for folder in code_folders() if not (ROOT / folder / "__init__.py").is_file()] == []


def test_no_tests_among_the_code() -> None:
    """pytest finds all tests under tests/, and the wheel holds none."""
    strays = [path for folder in code_folders() for path in (ROOT / folder).glob("*.py")]
    assert [path.name for path in strays if path.name.startswith(("test_", "conftest"))] == []


def test_tests_mirror_the_code() -> None:
    """A reader who knows a folder of code knows where its tests are."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - {Path("perf"), Path("gpu")} <= code_folders()  # what needs a quiet machine, or a card


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    source, out = tmp_path_factory.mktemp("source") / "clone", tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "demo", "build", "dist", "*.egg-info", "__pycache__", "tests", "reports")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--disable-pip-version-check", "-w", out, source], check=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_and_data_file(wheel_names: set[str]) -> None:
    """What runs from the checkout runs from the wheel: code, types marker, targets, schema, templates, bundled base."""
    suffixes = {".py", ".toml", ".json", ".jinja", ".safetensors", ".typed", ".md"}
    wanted = {path for folder in code_folders() - {Path()} for path in (ROOT / folder).rglob("*")}
    wanted |= {*ROOT.glob("*.py"), ROOT / "py.typed"}
    names = {f"havoc_core/{path.relative_to(ROOT).as_posix()}" for path in wanted if path.suffix in suffixes}
    assert {name for name in names if "__pycache__" not in name} <= wheel_names


def test_the_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    """Nobody gets our tests, reports or tools' settings into site-packages."""
    rooms = {folder.parts[0] for folder in code_folders() if folder.parts}
    strays = [name for name in wheel_names if name.startswith("havoc_core/") and name.count("/") > 1]
    assert [name for name in strays if name.split("/")[1] not in rooms] == []
    assert not [name for name in wheel_names if name.endswith("pyproject.toml")]
