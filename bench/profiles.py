"""How long to measure: four plans, from seconds (for a search) to ten busy minutes (for a release)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import HavocError


@dataclass(frozen=True)
class Series:
    """Repeat until both minima are met, or until the longest time has passed with at least `least` repetitions."""

    min_calls: int
    min_busy_s: float
    max_s: float
    least: int = 2


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The plan of one session: the number of fresh processes, and the repetitions in each."""

    name: str
    num_processes: int
    num_memory_processes: int
    num_retries: int
    warmup_window_s: float
    warmup_max_s: float
    prefill: Series
    ttft: Series
    decode: Series
    memory: Series

    @property
    def timeout_s(self) -> float:
        """A process that runs longer than this hangs."""
        spans = (self.prefill, self.ttft, self.decode, self.memory)
        return 300.0 + 4 * (self.warmup_max_s + sum(series.max_s for series in spans))


_SCREEN = Profile(
    name="screen",
    num_processes=1,
    num_memory_processes=0,
    num_retries=0,
    warmup_window_s=0.03,
    warmup_max_s=0.4,
    prefill=Series(8, 0.4, 3.0),
    ttft=Series(2, 0.0, 2.0),
    decode=Series(3, 0.3, 4.0),
    memory=Series(2, 0.0, 2.0),
)
_QUICK = Profile(
    name="quick",
    num_processes=5,
    num_memory_processes=1,
    num_retries=2,
    warmup_window_s=0.1,
    warmup_max_s=3.0,
    prefill=Series(20, 0.4, 3.5, least=6),  # five processes then make 30 calls: fewer prove no upper bound of a p90
    ttft=Series(8, 0.1, 0.7, least=1),
    decode=Series(3, 0.4, 2.0, least=1),
    memory=Series(3, 0.2, 1.0, least=1),
)
_STANDARD = Profile(
    name="standard",
    num_processes=5,
    num_memory_processes=2,
    num_retries=2,
    warmup_window_s=0.25,
    warmup_max_s=6.0,
    prefill=Series(40, 6.0, 120.0),
    ttft=Series(20, 1.0, 60.0),
    decode=Series(5, 6.0, 120.0),
    memory=Series(5, 2.0, 60.0),
)
_RELEASE = Profile(
    name="release",
    num_processes=5,
    num_memory_processes=3,
    num_retries=3,
    warmup_window_s=0.5,
    warmup_max_s=60.0,
    prefill=Series(64, 58.0, 900.0),
    ttft=Series(40, 4.0, 300.0),
    decode=Series(10, 60.0, 900.0),
    memory=Series(10, 10.0, 300.0),
)
PROFILES = {profile.name: profile for profile in (_SCREEN, _QUICK, _STANDARD, _RELEASE)}


def profile_named(name: str) -> Profile:
    """Return a profile; an unknown name is a `HavocError`."""
    if name not in PROFILES:
        raise HavocError(f"unknown profile {name!r}: choose from quick, standard, release")
    return PROFILES[name]
