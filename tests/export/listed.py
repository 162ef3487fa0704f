"""Forgeries that the hashes do not give away."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def relist(artifact: Path, name: str, content: bytes | None = None) -> None:
    """Let the manifest list a file as it is now, or as `content`, which replaces it."""
    if content is not None:
        (artifact / name).write_bytes(content)
    content = (artifact / name).read_bytes()
    document = json.loads((artifact / "manifest.json").read_text())
    document["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
    (artifact / "manifest.json").write_text(json.dumps(document))
