"""Open graphs in ONNX Runtime on the requested provider, or say why that is not possible. No torch.

ONNX Runtime falls back to the CPU without a message: with its CUDA build on a machine without CUDA libraries, the
session opens and runs on the CPU. So the provider of the session is compared with the requested one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import onnxruntime as ort

from ...errors import HavocError, IdentityError
from .denormals import FlushedDenormals
from .devices import CPU_PROVIDER, CUDA_PROVIDER, DEVICE_KINDS, kind_of_provider

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

ort.set_default_logger_severity(3)  # while a graph is opened it warns of kernels that are right, on stderr
ort.disable_telemetry_events()  # for the case that it was imported before this package could disable them

SHAPE_OPERATORS = frozenset({"Cast", "Squeeze", "Sub"})
"""What HAVOC's graphs compute of shapes. ONNX Runtime runs such nodes on the CPU whatever was asked for: lengths lie
there, and kernels on a card read them there."""


class Placement(NamedTuple):
    """Sorted `graph:/node` names by the provider that runs them, and apart those on the CPU that compute shapes."""

    by_provider: dict[str, list[str]]
    shapes: list[str]


def open_graph(
    graph: Path | bytes,
    *,
    provider: str,
    num_threads: int | None,
    weights: Mapping[str, NDArray[Any]],
    packs_weights: bool,
    provider_options: Mapping[str, str],
    profile: Path | None = None,
    data_folder: Path | None = None,
) -> tuple[ort.InferenceSession, list[ort.OrtValue]]:
    """Open one graph; also return the values that alias `weights`, which must live as long as the session.

    A graph in memory finds its data file in `data_folder`. `profile` begins the name of the file to which every node's
    time and memory are written while it is set.
    A graph that does not load is a `HavocError`; one that would run on another provider an `IdentityError`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if not packs_weights:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # it would keep every unpacked matrix
    if data_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_folder))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    if values:
        options.add_external_initializers(list(weights), values)
    source = graph if isinstance(graph, bytes) else str(graph)
    label = "graph" if isinstance(graph, bytes) else str(graph)
    if provider == CUDA_PROVIDER:
        _preload_cuda()
    try:
        providers = [(provider, {**kind_of_provider(provider).provider_options, **provider_options})]
        with FlushedDenormals():
            session = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:
        raise HavocError(f"{label}: ONNX Runtime cannot open it ({_first_line(error)})") from error
    if session.get_providers()[0] != provider:
        msg = f"{label}: asked for {provider}, ONNX Runtime would run on {session.get_providers()[0]}"
        msg += '; CUDA\'s libraries come with pip install "havoc-core[gpu]"' if provider == CUDA_PROVIDER else ""
        raise IdentityError(msg)
    session.disable_fallback()
    try:
        _ = [(item.name, item.type, item.shape) for item in (*session.get_inputs(), *session.get_outputs())]
    except UnicodeDecodeError as error:
        raise HavocError(f"{label}: a name in it is not UTF-8; export the artifact again") from error
    return session, values


def require_provider(provider: str) -> None:
    """Raise an `IdentityError` unless this build of ONNX Runtime has `provider`."""
    known = {kind.provider for kind in DEVICE_KINDS.values()}
    available = [name for name in ort.get_available_providers() if name in known]
    if provider not in available:
        raise IdentityError(
            f"execution provider {provider!r} is not in this ONNX Runtime; there are {', '.join(available)}"
        )


def placement(sessions: Mapping[str, ort.InferenceSession], provider: str) -> Placement:
    """Which provider runs each node, as ONNX Runtime recorded it for sessions that were opened on `provider`."""
    nodes: dict[str, list[str]] = {}
    shapes: list[str] = []
    for graph, session in sessions.items():
        for part in session.get_provider_graph_assignment_info():
            try:
                found = [(f"{graph}:{node.name}", node.op_type) for node in part.get_nodes()]
            except UnicodeDecodeError as error:
                raise HavocError(f"{graph}: the name of a node is not UTF-8; export the artifact again") from error
            for name, operator in found:
                is_of_shapes = part.ep_name == CPU_PROVIDER != provider and operator in SHAPE_OPERATORS
                (shapes if is_of_shapes else nodes.setdefault(part.ep_name, [])).append(name)
    return Placement({name: sorted(found) for name, found in nodes.items()}, sorted(shapes))


def run(session: ort.InferenceSession, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
    """Run a bound session; any error of ONNX Runtime becomes a one-line `HavocError`."""
    try:
        with FlushedDenormals():
            session.run_with_iobinding(binding, options)
    except Exception as error:
        raise HavocError(f"ONNX Runtime failed while running the model ({_first_line(error)})") from error


@functools.cache
def _preload_cuda() -> None:
    """Load CUDA's libraries from pip's folders, once; their output must not mix with that of a command."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls(cudnn=False, msvc=False)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
