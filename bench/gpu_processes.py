"""Find out which process on a card is ours, and how many others there are.

Inside a container the driver may list processes by the host's numbers, which do not exist here. Then a new process
since the start of our child counts as ours; if there are two new ones, ours is unknown.
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
    """Our process on the card, if it is listed, and the numbers of others that compute there or only draw."""

    own: GpuProcess | None
    num_foreign: int
    num_drawing: int


def is_visible(pid: int) -> bool:
    """Whether the number is that of a process visible here."""
    return Path(f"/proc/{pid}").exists()


def sort_out(
    processes: Sequence[GpuProcess],
    *,
    own_pid: int | None,
    idle_pids: Collection[int],
    exists: Callable[[int], bool] = is_visible,
) -> Occupants:
    """Find our process by its number, or as a new process with an unknown number that is not in `idle_pids`."""
    own = next((process for process in processes if process.pid == own_pid), None)
    if own is None:
        new = [process for process in processes if process.pid not in idle_pids and not exists(process.pid)]
        own = new[0] if len(new) == 1 else None
    others = [process for process in processes if process is not own]
    num_foreign = sum(process.does_compute for process in others)
    return Occupants(own=own, num_foreign=num_foreign, num_drawing=len(others) - num_foreign)
