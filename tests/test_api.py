"""What `havoc_core` exports: loaded late, typed, and each with an example that runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import havoc_core

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize("name", havoc_core.__all__)
def test_every_name_is_there_and_shown(name: str) -> None:
    """It is a function, and the page uses it."""
    assert callable(getattr(havoc_core, name))
    assert f"havoc_core.{name}(" in PAGE


def test_a_type_checker_sees_the_same_names() -> None:
    """Those that it reads are those that are exported."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [name.name for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(seen) == havoc_core.__all__ == sorted(havoc_core._HOME)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'fold'"):
        _ = havoc_core.fold


def test_the_names_load_nothing_before_they_are_used() -> None:
    """Importing the package loads neither torch, numpy, ONNX Runtime nor pydantic."""
    code = "import sys, havoc_core; print(sorted({'torch', 'numpy', 'onnxruntime', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.alone
def test_the_page_runs(tmp_path: Path) -> None:
    """Its blocks, one after the other, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "reports").symlink_to(ROOT / "reports")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifact" / "manifest.json").is_file()
    assert "prefill" in done.stdout
