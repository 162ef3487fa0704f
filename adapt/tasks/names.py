"""Names of the bundled tasks, rules for other names, and names of the training methods."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterable

DOMAINS = ("math", "code", "reasoning", "vision")
"""The tasks of seed 003: the default tasks."""

Method = Literal["auto", "expected-reward", "reinforce", "next-token"]
"""How an expert of a task is trained: the loss of a step."""

ARMS = ("svf-reward", "svf-next-token", "lora-reward", "lora-next-token", "kind-next-token")
"""The arms that `havoc baselines` can compare: the trained values and the training signal."""

BUNDLED = Path(__file__).with_name("files")
CLASSIFIER = "classifier"
"""The name of the scales of the first pass; no task may have this name."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def bundled_tasks() -> tuple[str, ...]:
    """Names of the bundled tasks, the four domains first."""
    return (*DOMAINS, *sorted(path.stem for path in BUNDLED.glob("*.toml") if path.stem not in DOMAINS))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of tasks in the order in which `havoc export` reads experts: the four domains first, then by name."""
    return sorted(names, key=lambda name: (DOMAINS.index(name) if name in DOMAINS else len(DOMAINS), name))


def require_name(name: str) -> None:
    """Refuse a name that is neither a bundled task nor a TOML file; the file is not opened."""
    if name in bundled_tasks() or name.endswith(".toml"):
        return
    near = difflib.get_close_matches(name, bundled_tasks(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(bundled_tasks())}"
    raise HavocError(f"unknown task {name[:80]!r}: {hint}, or give the path of your own .toml file")
