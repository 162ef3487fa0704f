"""Whose are the processes on a card: ours, or somebody else's.

Inside a container the driver may list processes by the host's numbers, which do not exist here. Then the one that was
not there before our child began is taken for ours; two such are one too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from .nvml import GpuProcess


@dataclass(frozen=True, kw_only=True)
class Occupants:
    """Our process on the card, if it shows, and how many others compute there or only draw."""

    own: GpuProcess | None
    num_foreign: int
    num_drawing: int


def is_visible(pid: int) -> bool:
    """Whether the number names a process of this machine, as seen from here."""
    return Path(f"/proc/{pid}").exists()


def sort_out(
    processes: Sequence[GpuProcess],
    *,
    own_pid: int | None,
    idle_pids: Collection[int],
    exists: Callable[[int], bool] = is_visible,
) -> Occupants:
    """Find our process by its number, or by its coming after `idle_pids` were listed under a number unknown here."""
    own = next((process for process in processes if process.pid == own_pid), None)
    if own is None:
        new = [process for process in processes if process.pid not in idle_pids and not exists(process.pid)]
        own = new[0] if len(new) == 1 else None
    others = [process for process in processes if process is not own]
    num_foreign = sum(process.does_compute for process in others)
    return Occupants(own=own, num_foreign=num_foreign, num_drawing=len(others) - num_foreign)
