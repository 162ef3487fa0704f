"""The house has floors: a module imports only from its own room and from below, and the edge rooms do without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"ground": 0, "model": 1, "adapt": 2, "export": 3, "bench": 4, "roof": 5}
GROUND = {
    "__init__",
    "errors",
    "storage",
    "progress",
    "config",
    "cgroups",
    "cores",
    "processes",
    "children",
}  # other modules at the root are the roof
LAZY = {
    ("config", "model.config"),  # re-exports HavocConfig for those who look for it there, on first use
    ("config", "adapt.candidate"),
    ("config", "adapt.tasks.task"),  # knows the names of the tasks that a recipe may train for
    ("config", "model.structure"),  # knows which names of structures a recipe may use
}

EDGE_BLOCKED = (
    "torch safetensors onnx onnx_ir onnxscript pymoo datasets pyarrow pandas matplotlib gguf transformers".split()
)
DRAWING = {
    f"bench.{name}" for name in ("charts", "drawing", "history", "page", "report")
}  # for `havoc report` alone, which says what to install
EDGE_MODULES = (
    "errors storage progress cgroups children cores processes config arguments cli __main__".split()
    + "export.artifact export.likelihood export.session".split()
    + [
        f"model.{name}"
        for name in "base_tokenizer chat chat_renderer config cost gguf_config gguf_header gguf_tokenizer".split()
        + "likelihood prompt stopping structure tokenizer vision".split()
    ]
)


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it, e.g. "adapt.tasks.math"."""
    files = [*ROOT.glob("*.py"), *(path for room in list(FLOORS)[1:-1] for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def floor(module: str) -> int:
    room = module.partition(".")[0]
    if room in GROUND:
        return FLOORS["ground"]
    return FLOORS.get(room, FLOORS["roof"])


def imported(module: str, tree: ast.AST) -> set[str]:
    """The package's own modules that `module` imports anywhere, functions and TYPE_CHECKING blocks included."""
    package = module.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            found |= {".".join(base)} if node.module else {".".join([*base, name.name]) for name in node.names}
    return found - {"", "__version__"}


def test_every_import_goes_down() -> None:
    """model < adapt < export < bench < pipeline and cli; errors, storage, progress and config are the ground."""
    imports = {
        (module, other) for module, path in modules().items() for other in imported(module, ast.parse(path.read_text()))
    }
    upward = {(module, other) for module, other in imports if floor(other) > floor(module)}
    assert upward - LAZY == set()


def test_imports_inside_the_package_are_relative() -> None:
    """The package works under whatever name the clone has, and every tool can follow its imports."""
    absolute = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            absolute += [f"{module}: {name}" for name in names if name.partition(".")[0] == "havoc_core"]
    assert absolute == []


def test_the_floors_test_sees_an_upward_import() -> None:
    """An import hidden in a function is found, relative or by package."""
    hidden = ast.parse("def f():\n    from ..bench.gate import judge\n    from .. import pipeline")
    assert imported("adapt.search", hidden) == {"bench.gate", "pipeline"}
    assert all(floor(other) > floor("adapt.search") for other in imported("adapt.search", hidden))


def edge_modules() -> list[str]:
    rooms = [name for name in modules() if name.startswith(("bench.", "adapt.tasks."))]
    return [*EDGE_MODULES, *(name.removesuffix(".__init__") for name in rooms)]


BLOCK = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {names}:
    try:
        importlib.import_module("havoc_core." + name)
    except ModuleNotFoundError as error:
        print(f"{{name}} needs {{error.name}}")
"""


@pytest.mark.parametrize(
    ("blocked", "names"),
    [(EDGE_BLOCKED, set(edge_modules()) - DRAWING), (set(EDGE_BLOCKED) - {"matplotlib"}, DRAWING)],
)
def test_the_edge_needs_no_lab(blocked: list[str], names: set[str]) -> None:
    """bench, gate, verify and the tasks import on a device where torch and its like were never installed."""
    script = BLOCK.format(blocked=blocked, names=sorted(names))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def known_names() -> set[str]:
    return {name.removesuffix(".__init__") for name in modules()}


def test_all_edge_modules_exist() -> None:
    """The list above names real files, so none of them escapes the test by being renamed."""
    assert set(EDGE_MODULES) <= known_names()
