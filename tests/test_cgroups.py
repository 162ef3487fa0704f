"""CPU limits of containers and services: found on every group above the process, of both versions, and told apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core import cores as cores_of
from havoc_core.bench import device
from havoc_core.cgroups import Throttling, cpu_quota_cores, throttling

pytestmark = pytest.mark.alone

V1_MOUNTS = """22 1 0:20 / /proc rw - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {base} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = "32 31 0:29 {base} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1_STAT = "nr_periods 1496\nnr_throttled 1490\nthrottled_time 119000000000\n"
V2_STAT = "usage_usec 5\nnr_periods 100\nnr_throttled 7\nthrottled_usec 350000\n"


def tree(root: Path, *, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """Lay out a /proc/self and control groups as a kernel shows them."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def first_version(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    return {
        f"cpu,cpuacct/{folder}cpu.cfs_quota_us": quota,
        f"cpu,cpuacct/{folder}cpu.cfs_period_us": period,
        f"cpu,cpuacct/{folder}cpu.stat": V1_STAT,
    }


def test_a_limit_of_the_first_version(tmp_path: Path) -> None:
    """20 ms in each 100 ms are 0.2 cores; `-1` above it is no limit."""
    root = tree(
        tmp_path,
        cgroup="5:memory:/elsewhere\n4:cpu,cpuacct:/havoc-quota\n",
        mounts=V1_MOUNTS.format(base="/"),
        files=first_version("havoc-quota/", "20000") | first_version("", "-1"),
    )
    assert cpu_quota_cores(root) == pytest.approx(0.2)
    assert throttling(root) == Throttling(1496, 1490, 119_000_000_000)


@pytest.mark.parametrize("limited", ["", "system.slice/", "system.slice/job.service/"])
def test_a_limit_on_any_parent_counts(limited: str, tmp_path: Path) -> None:
    """The root, a slice or the group itself: wherever the limit sits, it holds for the process."""
    groups = ("", "system.slice/", "system.slice/job.service/")
    files = {f"{name}cpu.max": "150000 100000" if name == limited else "max 100000" for name in groups}
    root = tree(tmp_path, cgroup="0::/system.slice/job.service\n", mounts=V2_MOUNTS.format(base="/"), files=files)
    assert cpu_quota_cores(root) == pytest.approx(1.5)
    assert throttling(root) is None


def test_the_smallest_limit_counts(tmp_path: Path) -> None:
    """Three cores for the service within two for its slice are two; the group that stood still most is counted."""
    files = {
        "a/b/cpu.max": "300000 100000",
        "a/cpu.max": "200000 100000",
        "a/b/cpu.stat": "usage_usec 5\nnr_periods 9\nnr_throttled 0\nthrottled_usec 0\n",
        "a/cpu.stat": V2_STAT,
    }
    root = tree(tmp_path, cgroup="0::/a/b\n", mounts=V2_MOUNTS.format(base="/"), files=files)
    assert cpu_quota_cores(root) == 2.0
    assert throttling(root) == Throttling(100, 7, 350_000_000)


@pytest.mark.parametrize(
    ("name", "base"), [("/docker/abc", "/docker/abc"), ("/docker/abc/job", "/docker/abc"), ("/", "/")]
)
def test_a_container_sees_its_own_group_as_the_root(name: str, base: str, tmp_path: Path) -> None:
    """The mount shows the container's group at its root, while the name may count from the host's."""
    files = {"cpu.max": "50000 100000", "cpu.stat": V2_STAT}
    root = tree(tmp_path, cgroup=f"0::{name}\n", mounts=V2_MOUNTS.format(base=base), files=files)
    assert cpu_quota_cores(root) == 0.5
    assert throttling(root) == Throttling(100, 7, 350_000_000)


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    """A hybrid system has the CPU controller in the first version: that is where the limit is."""
    root = tree(
        tmp_path,
        cgroup="2:cpu,cpuacct:/job\n0::/other\n",
        mounts=V1_MOUNTS.format(base="/") + "40 31 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        files=first_version("job/", "100000"),
    )
    assert cpu_quota_cores(root) == 1.0


@pytest.mark.parametrize("text", ["max 100000", "", "broken", "0 100000", "-1 100000", "100000 0", "1 2 3"])
def test_no_limit_is_none(text: str, tmp_path: Path) -> None:
    """No word, no file and no sane figure are no limit; and no counters are no throttling."""
    root = tree(tmp_path, cgroup="0::/a\n", mounts=V2_MOUNTS.format(base="/"), files={"a/cpu.max": text})
    assert cpu_quota_cores(root) is None
    assert throttling(root) is None
    assert cpu_quota_cores(tmp_path / "nowhere") is None


def test_throttling_is_what_came_since() -> None:
    """The group's counters are older than the measurement; counters that began anew are no negative time."""
    before, now = Throttling(100, 7, 900), Throttling(150, 9, 1000)
    assert now.since(before) == Throttling(50, 2, 100)
    assert before.since(now) == Throttling(0, 0, 0)


@pytest.mark.parametrize(("quota", "cores"), [(0.2, 1), (1.0, 1), (1.5, 1), (2.0, 2), (64.0, None), (None, None)])
def test_usable_cores_follow_the_quota(quota: float | None, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole cores of it, so that as many threads never use it up; at least one, and no more than there are."""
    free = len(os.sched_getaffinity(0))
    monkeypatch.setattr(device, "cpu_quota_cores", lambda: quota)
    monkeypatch.setattr(cores_of, "cpu_quota_cores", lambda: quota)
    assert cores_of.num_usable_cores() == min(cores or free, free)
    assert device.identify_host().cpu_quota_cores == quota


def quota_group() -> Path | None:
    """A control group of the first version that may be made here; None where this machine does not allow it."""
    folder = Path("/sys/fs/cgroup/cpu")
    is_open = os.geteuid() == 0 and (folder / "cpu.cfs_quota_us").exists() and os.access(folder, os.W_OK)
    return folder / f"havoc-test-{os.getpid()}" if is_open else None


@pytest.mark.skipif(quota_group() is None, reason="needs root and the CPU controller of version 1")
def test_a_real_quota_is_seen_and_its_throttling_counted() -> None:
    """A process held at a fiftieth of a core sees its quota, is stopped in most periods, and has one usable core."""
    group = quota_group()
    assert group is not None
    script = """
import json, os, sys, time
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from havoc_core.cgroups import cpu_quota_cores, throttling
from havoc_core.cores import num_usable_cores
before, end = throttling(), time.time() + 2
while time.time() < end: pass
since = throttling().since(before)
print(json.dumps([cpu_quota_cores(), num_usable_cores(), since.num_periods, since.num_throttled_periods]))
"""
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("2000")  # so little that a busy machine gives it, too
        done = subprocess.run([sys.executable, "-c", script, str(group)], capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    quota, cores, periods, stopped = json.loads(done.stdout)
    assert (quota, cores) == (0.02, 1)
    assert periods > 5
    assert stopped > 0.2 * periods
