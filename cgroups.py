"""The CPU quota of a container, and how often the container was stopped because the quota was used up.

Linux limits CPU time by control groups (`man 7 cgroups`). Any group above the process may have the limit: in version 1
in `cpu.cfs_quota_us` and `cpu.cfs_period_us`, in version 2 in `cpu.max`. The smallest limit of all groups from the
process's own up to the root counts; the number of stops is that of the group that was stopped most often.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path("/")
"""Where `proc/self` is looked for; a test puts a tree of its own there."""


@dataclass(frozen=True, slots=True)
class Throttling:
    """Counters of the group that was stopped most: periods in which it ran, periods with stops, and stopped time."""

    num_periods: int
    num_throttled_periods: int
    throttled_ns: int

    def since(self, before: Throttling) -> Throttling:
        """Return the counts since an earlier reading; 0 if the counters were reset."""
        return Throttling(
            max(self.num_periods - before.num_periods, 0),
            max(self.num_throttled_periods - before.num_throttled_periods, 0),
            max(self.throttled_ns - before.throttled_ns, 0),
        )


def cpu_quota_cores(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time the process may use per period; None without a limit, or off Linux."""
    return min((quota for group in _groups(root) if (quota := _quota_of(group)) is not None), default=None)


def throttling(root: Path = ROOT) -> Throttling | None:
    """Read how often the process's groups were stopped so far; None if no group counts it."""
    found = [counted for group in _groups(root) if (counted := _throttling_of(group)) is not None]
    return max(found, key=lambda counted: counted.num_throttled_periods, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's CPU groups, its own first, then each parent up to the hierarchy's root."""
    for number, controllers, name in _memberships(root):
        is_second = number == "0" and not controllers
        if not is_second and "cpu" not in controllers.split(","):
            continue
        for place, base in _mounts(root, is_second=is_second):
            inside = _below(name, base)
            if inside is None:
                continue
            folder = root / place.relative_to("/")
            parts = Path(inside).parts
            for length in range(len(parts), -1, -1):
                yield folder.joinpath(*parts[:length])


def _memberships(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield hierarchy number, controllers and the group's name from `/proc/self/cgroup`."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, name = rest.partition(":")
            if name.startswith("/"):
                yield number, controllers, name


def _mounts(root: Path, *, is_second: bool) -> Iterator[tuple[Path, str]]:
    """Yield the mount points of a version's CPU hierarchy, and the group that is the root there.

    The fields are those of `/proc/self/mountinfo` (`man 5 proc_pid_mountinfo`).
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text(errors="replace").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(" "), after.split(" ")
            if len(fields) < 5 or not fields[4].startswith("/"):  # noqa: PLR2004 - the mount point is the fifth
                continue
            is_cpu = kind[0] == "cgroup" and "cpu" in kind[-1].split(",")
            if kind[0] == "cgroup2" if is_second else is_cpu:
                yield Path(fields[4]), fields[3]


def _below(name: str, base: str) -> str | None:
    """Return a group's name seen from the root of a mount; None for a group outside it.

    A container's own mount often shows its group as the root, while the name counts from the host's.
    """
    if base == "/" or name == "/":
        return name.strip("/")
    if name == base or name.startswith(f"{base}/"):
        return name[len(base) :].strip("/")
    return None


def _quota_of(group: Path) -> float | None:
    """Return the group's own limit in cores: version 2's file, else version 1's two."""
    words = _text(group / "cpu.max").split()
    if len(words) == 2:  # noqa: PLR2004 - quota and period
        return _cores(words[0], words[1])
    return _cores(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _cores(quota_us: str, period_us: str) -> float | None:
    try:
        quota, period = int(quota_us), int(period_us)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _throttling_of(group: Path) -> Throttling | None:
    pairs = (line.split() for line in _text(group / "cpu.stat").splitlines())
    values = {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}  # noqa: PLR2004
    if "nr_throttled" not in values:
        return None
    throttled_ns = values.get("throttled_time", 1000 * values.get("throttled_usec", 0))
    return Throttling(values.get("nr_periods", 0), values["nr_throttled"], throttled_ns)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
