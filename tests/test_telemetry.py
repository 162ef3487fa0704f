"""ONNX Runtime's telemetry is off in every process that HAVOC starts: no file in the home folder, no network."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="the trap is a seccomp filter for Linux on x86_64",
    ),
]

_SOCKET, _AF_INET, _AF_INET6 = 41, 2, 10
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_NUMBER_AT, _FIRST_ARGUMENT_AT = 0, 16
_PROGRAM = (
    (_LOAD, 0, 0, _NUMBER_AT),
    (_EQUAL, 0, 4, _SOCKET),
    (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
    (_EQUAL, 1, 0, _AF_INET),
    (_EQUAL, 0, 1, _AF_INET6),
    (_RETURN, 0, 0, _KILL),
    (_RETURN, 0, 0, _ALLOW),
)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def kill_at_an_internet_socket() -> None:
    """Have the kernel end this process, and any child of it, at the first socket of the internet."""
    steps = (_Instruction * len(_PROGRAM))(*(_Instruction(*step) for step in _PROGRAM))
    program = _Filter(len(steps), ctypes.cast(steps, ctypes.POINTER(_Instruction)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# ONNX Runtime sends nothing by itself where it sees one of these
_BUILD_MACHINES = (
    "APPVEYOR BITBUCKET_BUILD_NUMBER BUILDKITE CI CIRCLECI CODEBUILD_BUILD_ID GITHUB_ACTIONS GITLAB_CI JENKINS_URL "
    "TEAMCITY_VERSION TF_BUILD TRAVIS"
).split()
_LEFT_OUT = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME", *_BUILD_MACHINES}


def trapped(command: list[str], home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return subprocess.run(
        [sys.executable, *command],
        env={**environment, "HOME": str(home), **more},
        preexec_fn=kill_at_an_internet_socket,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


OPENS_A_SESSION = """
    import sys, time
    from pathlib import Path
    from havoc_core.export.runtime.session import DecoderSession
    DecoderSession.open(Path(sys.argv[1]))
    time.sleep(1)  # the look-up comes from a thread of its own
"""
PLUGIN = """
    import time
    def test_gate(havoc_judgement):
        time.sleep(1)
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from havoc_core.export.package import export_artifact

    return export_artifact("pico", tmp_path_factory.mktemp("quiet") / "artifact")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_trap_shuts(home: Path) -> None:
    """A socket ends the process, and ONNX Runtime by itself leaves files behind: so their absence means something."""
    done = trapped(["-c", "import socket; socket.socket()"], home)
    assert done.returncode == -signal.SIGSYS
    trapped(["-c", "import onnxruntime, time; time.sleep(1)"], home)
    assert {"deviceid", "onnxruntime.db"} <= {path.name for path in home.rglob("*")}


@pytest.mark.parametrize("process", ["session", "generate", "verify", "bench", "eval", "doctor", "plugin"])
def test_no_process_leaves_a_trace_or_calls_anyone(process: str, artifact: Path, home: Path, tmp_path: Path) -> None:
    """This process, the command, its measuring children and the plugin's."""
    havoc = ["-m", "havoc_core"]
    (tmp_path / "test_plugin.py").write_text(textwrap.dedent(PLUGIN))
    plugin = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_plugin.py")]
    commands = {
        "session": ["-c", textwrap.dedent(OPENS_A_SESSION), str(artifact)],
        "generate": [*havoc, "generate", str(artifact), "--prompt", "a"],
        "verify": [*havoc, "verify", str(artifact), "--quiet"],
        "bench": [*havoc, "bench", str(artifact), "--n", "0", "--out", str(tmp_path / "run"), "--quiet"],
        "eval": [*havoc, "eval", str(artifact), "--n", "2", "--domain", "math"],
        "doctor": [*havoc, "doctor"],
        "plugin": [*plugin, "--havoc-artifact", str(artifact), "--havoc-rows", "0"],
    }
    done = trapped(commands[process], home)
    assert done.returncode not in {-signal.SIGSYS, 70}, done.stderr
    assert "SIGSYS" not in done.stderr
    assert "signal 31" not in done.stderr + done.stdout
    assert not [path for path in home.rglob("*") if "onnxruntime" in str(path) or path.name == "deviceid"]
