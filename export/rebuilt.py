"""Is this the graph that HAVOC writes: built anew from configuration, structure and options, and compared byte by byte.

No weights are needed, and no base. A graph that works less when it is timed is another graph, however it hides.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ..errors import HavocError, IdentityError
from ..model.config_file import read_config
from ..model.structure import Structure
from .runtime.artifact import MANIFEST
from .runtime.options import options_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..model.config import HavocConfig
    from .layout import Layout
    from .runtime.artifact import ArtifactManifest
    from .runtime.options import GraphOptions


def why_not_rebuilt(manifest: ArtifactManifest) -> str | None:
    """Why this artifact's graphs cannot be built anew here, as a sentence; None where they can."""
    if importlib.util.find_spec("onnx_ir") is None:
        return "onnx-ir, which builds a graph, is not installed: pip install 'havoc-core[lab]'"
    if manifest.structure.get("weight_format") == "keep":
        return "a GGUF file's own blocks decide its layout: verify it with --base"
    return None


def require_own_graphs(directory: Path, manifest: ArtifactManifest) -> int:
    """Build the artifact's graphs anew and return how many; one with other bytes is an `IdentityError`.

    Ask `why_not_rebuilt` first. What the manifest says is believed only as far as such a graph comes of it.
    """
    try:
        config = read_config(directory)
        structure = Structure.from_fields(manifest.structure)
        options = options_of(manifest).fitted(config.max_seq_len)
        layout = _layout(config, structure, manifest)
    except (KeyError, ValueError, HavocError) as error:
        raise IdentityError(f"{directory / MANIFEST}: no graph can be built of what it says ({error})") from error
    return compare_graphs(directory, manifest, config, structure, options, layout)


def _layout(config: HavocConfig, structure: Structure, manifest: ArtifactManifest) -> Layout:
    from .layout import plan_layout, promoted_layout

    if structure.average_bits is None:
        return plan_layout(config, structure)
    promoted = (manifest.calibration or {}).get("int8")
    return promoted_layout(config, structure, _names(promoted))


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
    """Compare each graph with what is built here, and return how many there are; another is an `IdentityError`."""
    from .graph import build_graphs, serialize

    built = {name: serialize(model) for name, model in build_graphs(config, structure, options, layout=layout).items()}
    for name in sorted(built.keys() | {name for name in manifest.files if name.endswith(".onnx")}):
        path = directory / name
        if name not in built or not path.is_file() or path.read_bytes() != built[name]:
            raise IdentityError(f"{path}: not the graph that this version of HAVOC builds for this configuration")
    return len(built)
