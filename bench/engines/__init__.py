"""Other engines, timed by the same code as HAVOC's artifacts.

`engine` is the child process that times; each engine is one file beside it with `PACKAGE` and `open_model`. Neither
imports HAVOC, so an engine may be installed in its own environment.
"""

from __future__ import annotations

from typing import Final

ENGINES: Final = {
    "llama_cpp": "llama.cpp",
    "genai": "onnxruntime-genai",
    "openvino": "OpenVINO",
    "hugging_face": "transformers",
}
"""The supported engines: file name and usual name."""


def key_of(shown: str) -> str:
    """The file name of an engine by its usual name."""
    return next((key for key, name in ENGINES.items() if name == shown), shown)
