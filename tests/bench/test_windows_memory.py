"""Windows' own count of a process's card memory, read from a library with the functions of its pdh.dll."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from havoc_core.bench.windows_memory import open_counters

SOURCE = Path(__file__).parent / "nvml_simulator" / "pdh.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")
INSTANCES = """\
pid_77_luid_0x00000000_0x0000C2F1_phys_0 400000000 1000000
pid_77_luid_0x00000000_0x0000A001_phys_0 20000000 0
pid_7_luid_0x00000000_0x0000C2F1_phys_0 900000000 0
pid_78_luid_0x00000000_0x0000C2F1_phys_0 -1 0
"""


@pytest.fixture(scope="module")
def pdh(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("pdh") / "pdh.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *flags, "-o", library, SOURCE], check=True)
    return ctypes.CDLL(str(library))


def test_a_process_is_counted_over_its_adapters(
    pdh: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only instances of that number count, not those it begins; what has no valid value or no instance is None."""
    (tmp_path / "instances").write_text(INSTANCES)
    monkeypatch.setenv("HAVOC_PDH", str(tmp_path / "instances"))
    with open_counters(pdh) as counters:
        assert counters.usage_bytes(77) == (420_000_000, 1_000_000)
        assert counters.usage_bytes(7) == (900_000_000, 0)
        assert counters.usage_bytes(78) is None
        assert counters.usage_bytes(5) is None
        (tmp_path / "instances").write_text("")
        assert counters.usage_bytes(77) is None
        (tmp_path / "instances").unlink()
        assert counters.usage_bytes(77) is None


def test_a_system_without_the_counters_has_none(pdh: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an old Windows nor any other system."""
    monkeypatch.delenv("HAVOC_PDH", raising=False)
    with open_counters(pdh) as counters:
        assert counters is None
    if sys.platform != "win32":
        with open_counters() as counters:
            assert counters is None
