"""The pace of a search: the seconds that its costs and answered samples took, stored next to its journal.

`pace.json` is rewritten at most once a second. It is for progress displays and estimates: no result depends on it, and
a file that cannot be read is ignored. Pauses between two runs of a search do not count.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .. import storage
from ..errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE_NAME: Final = "pace.json"
_WRITTEN_EVERY_S: Final = 1.0
_MAX_BYTES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of work on costs and on answered samples, KL divergences included, and how many there were of each."""

    cost_s: float = 0.0
    num_costs: int = 0
    sample_s: float = 0.0
    num_samples: int = 0

    @property
    def s_per_cost(self) -> float | None:
        """Seconds to measure a structure once; None if none was measured."""
        return self.cost_s / self.num_costs if self.num_costs else None

    @property
    def s_per_sample(self) -> float | None:
        """Seconds until a candidate has answered one sample; None while none has."""
        return self.sample_s / self.num_samples if self.num_samples else None

    def after(self, kind: str, seconds: float) -> Pace:
        """Count one line more of the journal, of that kind: "cost", "divergence" or "evaluation"."""
        if kind == "cost":
            return dataclasses.replace(self, cost_s=self.cost_s + seconds, num_costs=self.num_costs + 1)
        num_samples = self.num_samples + (kind == "evaluation")
        return dataclasses.replace(self, sample_s=self.sample_s + seconds, num_samples=num_samples)


def read_pace(folder: Path) -> Pace:
    """Return the pace of the search whose journal is in `folder`; an empty pace if it is unknown."""
    try:
        found = storage.read_json(folder / FILE_NAME, max_bytes=_MAX_BYTES)
        pace = Pace(**found)
        values = dataclasses.astuple(pace)
    except (HavocError, TypeError):
        return Pace()
    is_sound = all(type(value) in {int, float} and math.isfinite(value) and value >= 0 for value in values)
    return pace if is_sound else Pace()


class Pacer:
    """Counts the lines of a journal as they are written, with the time since the one before."""

    def __init__(self, folder: Path, *, clock: Callable[[], float]) -> None:
        """Continue from the file in `folder`; `clock` counts seconds."""
        self.pace = read_pace(folder)
        self._path, self._clock = folder / FILE_NAME, clock
        self._counted_s = clock()
        self._written_s = -math.inf

    def count(self, kind: str) -> None:
        """Count a line of that kind, finished now."""
        now_s = self._clock()
        self.pace = self.pace.after(kind, now_s - self._counted_s)
        self._counted_s = now_s
        if now_s - self._written_s >= _WRITTEN_EVERY_S:
            self._written_s = now_s
            storage.write_json(self._path, dataclasses.asdict(self.pace))
