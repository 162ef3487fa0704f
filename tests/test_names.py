"""One name for one thing: no two modules of the product define public classes of one name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("track", "model", "adapt", "export", "bench", "cluster")
ALLOWED = {
    "FormatCost": "what a proof finds, and the record's copy of it",
    "SearchSettings": "a recipe's section, and the settings that it becomes",
}
"""Names that stand twice, and why."""


def homes_of_classes(files: dict[str, str]) -> dict[str, list[str]]:
    """Where each public class of some modules is defined."""
    homes: dict[str, list[str]] = defaultdict(list)
    for place, text in files.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(place)
    return homes


def product() -> dict[str, str]:
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_no_two_classes_share_a_name() -> None:
    """A reader who meets a name knows which one it is; what stands twice says why."""
    twice = {name: places for name, places in homes_of_classes(product()).items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) == set(twice)


def test_a_second_class_of_a_name_is_seen() -> None:
    """The test above can fail."""
    homes = homes_of_classes({"a.py": "class Check: ...", "b.py": "class Check: ...\nclass _Own: ..."})
    assert homes == {"Check": ["a.py", "b.py"]}
