"""Devices: what this machine is, said without naming it; what is missing or doubled, said in one line."""

from __future__ import annotations

import json
import os
import platform
import socket
from pathlib import Path

import pytest

from havoc_core.bench import device as device_module
from havoc_core.bench.device import identify_cpu, identify_device, identify_host, runtime_package
from havoc_core.bench.nvml import loaded_library
from havoc_core.errors import HavocError
from havoc_core.export.runtime.devices import CPU_PROVIDER, CUDA_PROVIDER


def test_cpu_is_identified() -> None:
    """Model, vendor, instruction sets and cores of this CPU; asked twice, the same fingerprint."""
    cpu = identify_cpu()
    assert cpu.name
    assert cpu.architecture == platform.machine()
    assert 1 <= cpu.num_usable_cores <= cpu.num_logical_cores
    assert "smep" not in cpu.features
    assert identify_device(CPU_PROVIDER) == identify_device(CPU_PROVIDER)


def test_host_is_described_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, kernel and versions, but neither host name nor user, however short this machine's are."""
    uname = os.uname()
    named = os.uname_result((uname.sysname, "a-name-like-no-other", *uname[2:]))
    monkeypatch.setattr(os, "uname", lambda: named)
    monkeypatch.setattr(platform, "_uname_cache", None, raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: named.nodename)
    monkeypatch.setenv("USER", "a-user-like-no-other")
    assert platform.node() == named.nodename
    host = identify_host()
    assert host.ram_bytes > 10**8
    assert {"python", "numpy"} < set(host.versions)
    text = json.dumps(host.model_dump(mode="json"))
    assert "like-no-other" not in text


def test_two_runtimes_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime beside onnxruntime-gpu overwrite each other: refused, with the command that mends it."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{name.replace('-', '_')}-9.9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HavocError, match="onnxruntime onnxruntime-gpu"):
        runtime_package()


def test_no_runtime_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ONNX Runtime the error says what to install."""
    monkeypatch.setattr(device_module, "RUNTIME_PACKAGES", ("onnxruntime-nowhere",))
    with pytest.raises(HavocError, match="pip install"):
        runtime_package()


def test_gpu_that_is_not_there_is_one_line() -> None:
    """Asking for CUDA on a machine without a card is a HavocError that names both witnesses' reasons."""
    if loaded_library("libcuda.so") is not None or Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(HavocError, match=r"NVML.*CUDA"):
        identify_device(CUDA_PROVIDER)


def test_loaded_library_is_found() -> None:
    """A mapped shared library is found by a part of its name, another is not."""
    assert loaded_library("libc.so") is not None
    assert loaded_library("no-such-library") is None
