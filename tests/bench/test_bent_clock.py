"""Time that somebody bends is noticed: a child is not reached by the environment, and clocks are compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from havoc_core.bench.clocks import clock_readings, clock_spans
from havoc_core.bench.judge.gate import judge
from havoc_core.bench.judge.record import load_record
from havoc_core.bench.judge.targets import load_target, read_targets
from havoc_core.errors import HavocError

pytestmark = [pytest.mark.alone, pytest.mark.skipif(sys.platform != "linux", reason="it has other clocks")]

BENT = """
import time
_real, _begin = time.perf_counter_ns, time.perf_counter_ns()
time.perf_counter_ns = lambda: _begin + (_real() - _begin) // 4
"""
ASK = """
import json, sys, time
from havoc_core.bench.clocks import clock_readings, clock_spans
before = clock_readings()
time.sleep(0.5)
print(json.dumps(clock_spans(before)))
"""


def test_honest_clocks_agree() -> None:
    """All three are here, and none differs from the others by more than the rule allows."""
    before = clock_readings()
    assert set(before) == {"perf_counter", "monotonic_raw", "uptime"}
    sum(range(3_000_000))
    spans = clock_spans(before)
    assert max(spans.values()) - min(spans.values()) < 0.01 * max(spans.values()) + 100_000_000


def spans_of(environment: dict[str, str]) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_clock_bent_by_a_sitecustomize_differs(tmp_path: Path) -> None:
    """It runs at a quarter, the others do not: more than the rule allows after a second."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(BENT))
    spans = spans_of({"PYTHONPATH": str(tmp_path)})
    assert spans["perf_counter"] < 0.5 * spans["monotonic_raw"]
    assert spans["uptime"] > 0.8 * spans["monotonic_raw"]


SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, t);
    long long ns = (t->tv_sec * 1000000000LL + t->tv_nsec) / 4;
    t->tv_sec = ns / 1000000000LL; t->tv_nsec = ns % 1000000000LL;
    return failed;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_a_clock_bent_by_a_preloaded_library_differs(tmp_path: Path) -> None:
    """The system call and the kernel's own file do not go through the C library."""
    (tmp_path / "slow.c").write_text(SLOW)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "slow.so", tmp_path / "slow.c", "-ldl"], check=True)
    spans = spans_of({"LD_PRELOAD": str(tmp_path / "slow.so")})
    assert spans["perf_counter"] < 0.5 * spans["monotonic_raw"]


def test_a_measuring_child_is_isolated_and_the_record_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    """With a `sitecustomize` on PYTHONPATH nothing showed: now it does not reach the child, and the gate says why not.

    The child's own counter agrees with the other clocks, and rule V30 refuses the record.
    """
    site = tmp_path / "site"
    site.mkdir()
    marker = tmp_path / "was-here"
    (site / "sitecustomize.py").write_text(
        f"import sys\nif 'bench.worker' in ' '.join(sys.orig_argv): open({str(marker)!r}, 'w').close()\n"
    )
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "havoc_core",
        "bench",
        str(tiny_artifact),
        "--profile",
        "quick",
        "--n",
        "0",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--quiet"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (out / "record.json").exists(), done.stderr
    assert not marker.exists()
    record = load_record(out / "record.json")
    assert all(len(process.clock_span_ns) == 3 for process in record.samples)
    rules = {finding.rule: finding.reason for finding in judge([record], load_target("host")).findings}
    assert "PYTHONPATH" in rules["V30"]
    assert "V31" not in rules


@pytest.mark.parametrize("name", ["gtx1660", "GTX1660", "gtx-1660", "host", "Host"])
def test_a_bundled_targets_name_is_reserved(name: str, tmp_path: Path) -> None:
    """A CPU called gtx1660 passed "on gtx1660"."""
    path = tmp_path / "own.toml"
    path.write_text(
        f'["{name}"]\ntitle = "x"\n["{name}".device]\nkind = "cpu"\nnames = ["x"]\n'
        f'[["{name}".limits]]\nmetric = "prefill_ms"\nbelow = 1\nunit = "s"\n'
    )
    with pytest.raises(HavocError, match="to the bundled target"):
        read_targets(path)


def test_a_target_names_its_file_and_hash_and_may_not_do_so_itself(tmp_path: Path) -> None:
    """`origin` is what was read, never what the file says of itself."""
    path = tmp_path / "own.toml"
    limit = '[[own.limits]]\nmetric = "load_s"\nbelow = 1\nunit = "s"\n'
    text = '[own]\ntitle = "x"\n{}[own.device]\nkind = "cpu"\nnames = ["x"]\n' + limit
    path.write_text(text.format(""))
    origin = load_target(str(path)).origin
    assert origin is not None
    assert (origin.file, len(origin.sha256)) == ("own.toml", 64)
    bundled = load_target("gtx1660").origin
    assert bundled is not None
    assert bundled.file == "targets.toml"
    path.write_text(text.format('origin = {file = "targets.toml", sha256 = "' + "0" * 64 + '"}\n'))
    with pytest.raises(HavocError, match="origin: no such key"):
        load_target(str(path))
