"""The house has floors: a module imports only from its own folder and from below, and the edge folders need no lab."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    "ground",
    "track",
    "model",
    "adapt.sandbox",
    "adapt.tasks",
    "adapt",
    "export.runtime",
    "config",
    "export",
    "bench.judge",
    "bench.engines",
    "bench",
    "bench.report",
    "roof",
)
ROOMS = ("track", "model", "adapt", "export", "bench", "cluster")
GROUND = "errors messages mistakes storage progress bounds cgroups cores processes children".split()
HANDLERS = ("commands", "adapt.commands", "export.commands", "bench.commands", "bench.pytest_plugin")
"""They take a command line apart, so they belong to the roof, whatever room they serve."""

EDGE_FOLDERS = ("track", "adapt.sandbox", "adapt.tasks", "export.runtime", "bench.judge", "bench.engines", "bench")
EDGE_ROOF = (
    "errors messages storage progress bounds cgroups children cores processes config arguments cli __main__ "
    "cluster.commands"
).split()
EDGE_BLOCKED = (
    "torch safetensors onnx onnx_ir onnxscript pymoo datasets pyarrow pandas matplotlib gguf transformers wandb "
    "trackio dask distributed"
).split()


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it, e.g. "adapt.tasks.math"; a folder's is "adapt.tasks"."""
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files, strict=True)}


def floor(module: str) -> int:
    """The floor that a module stands on, 0 the lowest."""
    if module in GROUND:
        return 0
    if module in HANDLERS:
        return FLOORS.index("roof")
    parts = module.split(".")
    folders = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return FLOORS.index(next((folder for folder in folders if folder in FLOORS), "roof"))


def imported(module: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The package's own modules that `module` imports anywhere, functions and TYPE_CHECKING blocks included."""
    parts = [] if module == "__init__" else module.split(".")
    package = parts if modules()[module].name == "__init__.py" else parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            start = ".".join(part for part in base if part)
            for name in node.names:
                whole = f"{start}.{name.name}".lstrip(".")
                found = whole if whole in known else start
                if found not in {"", module}:
                    yield found


def graph() -> dict[str, set[str]]:
    """Every module with what it imports."""
    files = modules()
    return {name: set(imported(name, ast.parse(path.read_text()), set(files))) for name, path in files.items()}


def test_every_import_goes_down() -> None:
    """The floors, from the ground up: FLOORS."""
    upward = {(module, other) for module, others in graph().items() for other in others if floor(other) > floor(module)}
    assert upward == set()


def test_there_is_no_import_circle() -> None:
    """Not even one that only a type checker sees, or that a function hides: two files in a circle are one thought."""
    graphlib.TopologicalSorter(graph()).prepare()


def test_a_hidden_circle_is_found() -> None:
    """The test above can fail: one import back, in a function, and it does."""
    back = ast.parse("def f():\n    from .commands import handle_gate")
    circle = graph() | {"bench.measure": set(imported("bench.measure", back, set(modules())))}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(circle).prepare()


def imports_of(*packages: str) -> list[str]:
    """Each absolute import of these packages, in any function of any module."""
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found += [f"{module}: {name}" for name in names if name.partition(".")[0] in packages]
    return found


def test_imports_inside_the_package_are_relative() -> None:
    """The package works under whatever name the clone has, and every tool can follow its imports."""
    assert imports_of("havoc_core") == []


def test_the_decoder_is_our_own() -> None:
    """No module imports transformers or peft, oracles of tests; but for the engine that a duel measures, and LoRA."""
    assert {name.partition(":")[0] for name in imports_of("transformers", "peft")} == {
        "bench.engines.hugging_face", "adapt.lora"
    }  # fmt: skip


def test_the_floors_test_sees_an_upward_import() -> None:
    """An import hidden in a function is found, relative or by package."""
    hidden = ast.parse("def f():\n    from ..bench.judge.gate import judge\n    from .. import pipeline")
    found = set(imported("adapt.search", hidden, set(modules())))
    assert found == {"bench.judge.gate", "pipeline"}
    assert all(floor(other) > floor("adapt.search") for other in found)


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


def edge_modules(folders: tuple[str, ...]) -> list[str]:
    """The modules of some folders, without those of the folders inside them."""
    return [name for name in modules() if name.rpartition(".")[0] in folders or name in folders]


@pytest.mark.parametrize(
    ("blocked", "names"),
    [
        (EDGE_BLOCKED, [*EDGE_ROOF, *edge_modules(EDGE_FOLDERS)]),
        (set(EDGE_BLOCKED) - {"matplotlib"}, edge_modules(("bench.report",))),
    ],
    ids=["edge", "report"],
)
def test_the_edge_needs_no_lab(blocked: list[str], names: list[str]) -> None:
    """Folders of the edge, and all they import, import where torch and its like were never installed."""
    assert len(names) > 5
    script = BLOCK.format(blocked=blocked, names=sorted(names))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
