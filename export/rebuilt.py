"""Check that a graph is the one HAVOC writes: build it again from configuration, structure and options, compare bytes.

This needs neither weights nor the base. A graph that does less work when it is timed has other bytes, so it is found.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ..errors import HavocError, IdentityError
from ..model.config_file import read_config
from ..model.structure import BlockFormat, Structure
from .runtime.artifact import MANIFEST
from .runtime.decoder import DECODER
from .runtime.options import options_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.config import HavocConfig
    from ..model.structure import Zeros
    from .layout import Layout, MatrixFormat
    from .runtime.artifact import ArtifactManifest
    from .runtime.options import GraphOptions


def why_not_rebuilt() -> str | None:
    """Why graphs cannot be built again here, as a sentence; None if they can."""
    if importlib.util.find_spec("onnx_ir") is None:
        return "onnx-ir, which builds a graph, is not installed: pip install 'havoc-core[lab]'"
    return None


def require_own_graphs(directory: Path, manifest: ArtifactManifest) -> int:
    """Build the artifact's graphs again and return their number; a graph with other bytes is an `IdentityError`.

    Ask `why_not_rebuilt` first. The manifest's values are trusted only if they give exactly this graph.
    """
    try:
        config = read_config(directory)
        structure = Structure.from_fields(manifest.structure)
        options = options_of(manifest).fitted(config.max_seq_len)
        layout = _layout(directory, config, structure, manifest)
    except (LookupError, ValueError, ArithmeticError, HavocError) as error:
        raise IdentityError(f"{directory / MANIFEST}: no graph can be built from it ({error})") from error
    return compare_graphs(directory, manifest, config, structure, options, layout)


def _layout(directory: Path, config: HavocConfig, structure: Structure, manifest: ArtifactManifest) -> Layout:
    from .layout import plan_layout, promoted_layout

    if structure.weight_format == "keep":
        return plan_layout(config, structure, _kept_formats(directory / DECODER, config))
    if structure.average_bits is None:
        return plan_layout(config, structure)
    promoted = (manifest.calibration or {}).get("int8")
    return promoted_layout(config, structure, _names(promoted))


def _kept_formats(path: Path, config: HavocConfig) -> dict[str, MatrixFormat]:
    """How each matrix of a GGUF file is stored, by its graph; a wrong declaration gives a different rebuilt graph."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    from ..model.tensors import tensor_shapes

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path.name} is not a graph") from error
    declared = {tensor.name: tensor for tensor in model.graph.initializer}
    dtypes: dict[int, MatrixFormat] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    formats: dict[str, MatrixFormat] = {}
    for name in (name for name, shape in tensor_shapes(config).items() if len(shape) > 1):
        num_bits = next((bits for bits in (4, 8) if f"{name}_Q{bits}" in declared), None)
        if num_bits is None:
            formats[name] = dtypes[declared[name].data_type]
            continue
        block_size = declared[f"{name}_Q{num_bits}"].dims[-1] * 8 // num_bits
        zeros: Zeros = "minimums" if f"{name}_minimums" in declared else "middle"
        is_half = declared[f"{name}_scales"].data_type == onnx.TensorProto.FLOAT16
        formats[name] = BlockFormat(num_bits, block_size, zeros, 2 if is_half else 4)
    return formats


def _names(value: object) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("calibration names no int8 matrices")
    return value


def compare_graphs(
    directory: Path,
    manifest: ArtifactManifest,
    config: HavocConfig,
    structure: Structure,
    options: GraphOptions,
    layout: Layout,
) -> int:
    """Compare each graph with the one built here, and return their number; a difference is an `IdentityError`."""
    from .graph import build_graphs, serialize

    replaceable = () if manifest.live is None else manifest.live.names
    graphs = build_graphs(config, structure, options, layout=layout, replaceable=replaceable)
    built = {name: serialize(model) for name, model in graphs.items()}
    for name in sorted(built.keys() | {name for name in manifest.files if name.endswith(".onnx")}):
        path = directory / name
        if name not in built or not path.is_file() or path.read_bytes() != built[name]:
            raise IdentityError(f"{path}: not the graph that this version of HAVOC builds for this configuration")
    return len(built)
