"""A taste of what `make fuzz` runs a hundred times longer: damaged files end in one line, or are read."""

from __future__ import annotations

import runpy
from pathlib import Path


def test_damaged_files_give_only_typed_errors() -> None:
    """Every reader, 100 inputs each; some are refused and, for most readers, some are harmless."""
    run = runpy.run_path(str(Path(__file__).with_name("fuzzing.py")), run_name="fuzzing")["run"]
    found = run(1000, 1)
    assert len(found) == 10
    assert all(sum(counts.values()) == 100 for counts in found.values())
    assert all(counts["refused"] > 10 for counts in found.values())
